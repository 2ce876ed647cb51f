"""The laws of a surgery plan, for our own rules and for anyone's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from transferjax._errors import LawError, PlanError, listing
from transferjax._types import Model
from transferjax.surgery import Move, Plan, Rule, Spec, assemble, leaves, plan
from transferjax.surgery._resize import RESIZERS
from transferjax.surgery._rules import Naming, Transform
from transferjax.surgery._structure import Tie


def check_plan(source_shapes: Any, target: Any, rules: Iterable[Rule] = ()) -> Plan:
    """Makes a plan and holds it to the laws that every plan keeps.

    Total: each target leaf has one move, each source leaf is read or waived. Minimal: without any one rule the plan is
    another or none (a rule whose leaves are all fresh or waived by others is let pass, and ``adapt``, which acts only
    where sizes differ). Deterministic, and independent of the order of dicts and of all rules but ``permute, reshape,
    adapt, cast``. ``from_json(to_json(p)) == p``. Applying to random arrays equals the numpy operations, and the result
    goes back into the target's structure. Where the plan has an inverse, it gives back every source leaf that is read.

    Args:
      source_shapes: as for ``transferjax.surgery.plan``.
      target: as for ``transferjax.surgery.plan``.
      rules: the rules to check.

    Returns:
      The :class:`Plan`.

    Raises:
      PlanError: there is no plan.
      LawError: a law is broken; the message names it.

    >>> from transferjax.surgery import rename
    >>> import numpy as np
    >>> check_plan({"w": np.zeros(2)}, {"bias": np.zeros(2)}, [rename("w", "bias")])
    Plan(1 sources -> 1 targets: 1 copied, 0 transformed, 0 fresh, 0 waived)
    """
    rules = tuple(rules)
    made = plan(source_shapes, target, *rules)
    _check_total(made, source_shapes, target)
    _check_minimal(made, source_shapes, target, rules)
    _check_order(made, source_shapes, target, rules)
    _check_json(made)
    _check_apply(made, target)
    _check_inverse(made)
    return made


def _law(holds: bool, name: str, fact: str) -> None:
    if not holds:
        raise LawError(f"the plan is not {name}: {fact}.")


def _check_total(made: Plan, source: Any, target: Any) -> None:
    targets = [move.target for move in made.moves]
    odd = sorted(set(targets) ^ set(leaves(target)))
    _law(len(set(targets)) == len(targets) and not odd, "total", f"targets without one move: {listing(odd)}")
    used = {name for move in made.moves for name in move.sources}
    odd = sorted((used ^ set(made.waived)) ^ set(leaves(source)))
    _law(not odd, "total", f"sources not read or waived, or both: {listing(odd)}")


def _check_minimal(made: Plan, source: Any, target: Any, rules: tuple[Rule, ...]) -> None:
    decided = {*made.waived}, {move.target for move in made.moves if move.source is None}
    for number, rule in enumerate(rules):
        if _plan_or_none(source, target, rules[:number] + rules[number + 1 :]) != made:
            continue
        if isinstance(rule, Tie):
            free = [path for path in leaves(target) if rule(path) is not None]
        elif isinstance(rule, Naming):
            specs = made.sources.items()
            free = [name for name, spec in specs if name not in decided[0] and rule.leads(name, spec) is not None]
        elif isinstance(rule, Transform) and rule.conditional:
            free = []
        else:
            side, done = (target, decided[1]) if isinstance(rule, Transform) else (source, decided[0])
            selector = getattr(rule, "selector", lambda path, leaf: True)
            free = [path for path, leaf in leaves(side).items() if selector(path, leaf) and path not in done]
        _law(not free, "minimal", f"{rule!r} can be removed")


def _check_order(made: Plan, source: Any, target: Any, rules: tuple[Rule, ...]) -> None:
    again = plan(source, target, *rules)
    _law(again == made and str(again) == str(made), "deterministic", "made twice, it differs")
    turned = plan(_reversed(source), _reversed(target), *rules)
    _law(turned == made and turned.to_json() == made.to_json(), "independent of dict order", "reversed, it differs")
    steps = [rule for rule in rules if isinstance(rule, Transform)]
    others = [rule for rule in rules if not isinstance(rule, Transform)]
    turned = plan(source, target, *steps, *reversed(others))
    _law(turned == made, "independent of the order of its rules", "reversed, they make another plan")


def _check_json(made: Plan) -> None:
    for one in (made, made.with_source("sha256:0123")):
        back = Plan.from_json(one.to_json())
        _law(back == one and back.to_json() == one.to_json(), "its JSON", "from_json(to_json(plan)) differs")


def _check_apply(made: Plan, target: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: _random(rng, spec) for name, spec in made.sources.items()}
    initial = {m.target: _random(rng, made.shapes[m.target]) for m in made.moves if m.source is None}
    out = made.apply(arrays.__getitem__, initial.__getitem__)
    _law(list(out) == [move.target for move in made.moves], "applied", "it returns other paths than its targets")
    for move in made.moves:
        wanted = initial[move.target] if move.source is None else _reference(move, arrays)
        same = out[move.target].dtype == wanted.dtype and np.array_equal(out[move.target], wanted)
        _law(same, "applied", f"'{move.target}' differs from its numpy operations")
    back = leaves(assemble(target, out))
    _law(all(back[path] is out[path] for path in out), "assembled", "an array is at another path")


def _check_inverse(made: Plan) -> None:
    try:
        back = made.inverse()
    except PlanError:
        return
    rng = np.random.default_rng(1)
    arrays = {name: _random(rng, spec) for name, spec in made.sources.items()}
    initial = {m.target: _random(rng, made.shapes[m.target]) for m in made.moves if m.source is None}
    again = back.apply(made.apply(arrays.__getitem__, initial.__getitem__))
    for name in sorted({name for move in made.moves for name in move.sources}):
        same = again[name].dtype == arrays[name].dtype and np.array_equal(again[name], arrays[name])
        _law(same, "undone by its inverse", f"'{name}' comes back as another")


def _reference(move: Move, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    several = [arrays[name] for name in move.sources]
    value = several[0]
    for name, *arguments in move.ops:
        if name == "concat":
            value = np.concatenate(several, arguments[0])
        elif name == "stack":
            value = np.stack(several, arguments[0])
        elif name == "slice":
            value = np.take(value, np.arange(*arguments[1:]), arguments[0])
        elif name == "take":
            value = np.take(value, arguments[1], arguments[0])
        elif name == "permute":
            value = np.transpose(value, arguments[0])
        elif name == "reshape":
            value = np.reshape(value, arguments[0])
        elif name == "cast":
            value = np.asarray(value, jnp.dtype(arguments[0]))
        elif name in RESIZERS:
            value = RESIZERS[name].run(value, *arguments)
        else:
            raise LawError(f"no reference for operation '{name}'.")
    return value


def _random(rng: np.random.Generator, spec: Spec) -> np.ndarray:
    """Distinct small whole numbers as far as the dtype holds them, so that every cast keeps them."""
    dtype = jnp.dtype(spec.dtype)
    most = 2 if dtype == np.bool_ else 8 if dtype.itemsize == 1 else 100
    return rng.integers(0, most, size=math.prod(spec.shape)).reshape(spec.shape).astype(dtype)


def _plan_or_none(source: Any, target: Any, rules: tuple[Rule, ...]) -> Plan | None:
    try:
        return plan(source, target, *rules)
    except PlanError:
        return None


def _reversed(tree: Any) -> Any:
    if isinstance(tree, Model):
        return tree._replace(params=_reversed(tree.params), extra=_reversed(tree.extra))
    if type(tree) is dict:
        return {key: _reversed(value) for key, value in reversed(tree.items())}
    return tree
