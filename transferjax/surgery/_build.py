"""plan: rules, source shapes and a target become a Plan, or one error that lists everything that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from transferjax._errors import PlanError
from transferjax.surgery import _problems as say
from transferjax.surgery._checks import led, op_of
from transferjax.surgery._ops import Op, Spec, spec_of
from transferjax.surgery._ops import infer as infer_ops
from transferjax.surgery._plan import Move, Plan
from transferjax.surgery._rules import Fresh, Lead, Naming, Rule, Transform, Waive
from transferjax.surgery._structure import Tie
from transferjax.surgery._trees import leaves

APPLIED = (Naming, Transform, Fresh, Waive, Tie)
"""The kinds of rules that a plan knows how to apply."""


def plan(source_shapes: Any, target: Any, *rules: Rule) -> Plan:
    """A plan that accounts for every leaf of a source and of a target, from shapes only.

    Every target leaf has exactly one origin: the source leaf of its name (after ``rename``), or its own initial
    value (``fresh``). Every source leaf is used, waived, or led to a fresh leaf. Rules only do what is written:
    no leaf is transposed, cast or skipped because its shape suggests it. ``permute``, ``reshape``, ``adapt`` and
    ``cast`` run on a leaf in the order in which they are given; the order of all other rules does not matter.

    Args:
      source_shapes: ``{name: leaf}`` as ``Checkpoint.shapes``, or any tree or Model; leaves need shape and dtype.
      target: the tree or ``Model`` to fill, concrete or abstract; of a Model, params and extra.
      rules: from ``rename, select, repeat, split, unstack, fuse, stack, tie, permute, reshape, adapt, cast, fresh,
        waive``.

    Returns:
      A :class:`Plan`.

    Raises:
      PlanError: a leaf has no origin or two, is left over, or has another shape or dtype than expected; a rule does
        nothing or is of an unknown kind; two rules claim one name. All problems are listed at once, with the nearest
        candidates.

    >>> import numpy as np
    >>> source = {"fc.weight": np.zeros((3, 2), np.float32), "fc.steps": np.zeros((), np.int64)}
    >>> target = {"fc": {"kernel": np.zeros((2, 3), np.float32), "bias": np.zeros(3, np.float32)}}
    >>> from transferjax.surgery import fresh, permute, rename, waive
    >>> plan(source, target, rename(r"(\\w+)\\.weight", r"\\1/kernel"), permute("**/kernel", (1, 0)),
    ...      fresh("fc/bias"), waive("*.steps"))
    Plan(2 sources -> 2 targets: 0 copied, 1 transformed, 1 fresh, 1 waived)
    """
    for number, rule in enumerate(rules):
        if not isinstance(rule, Rule):
            raise PlanError(
                f"rule {number} of the plan is {type(rule).__name__}; expected a rule such as fresh(...). "
                "Write a list of rules with a star: plan(shapes, target, *rules)."
            )
        if not isinstance(rule, APPLIED):
            raise PlanError(
                f"rule {number} of the plan is of an unknown kind, {type(rule).__name__}, so nothing would apply it. "
                "Derive its class from surgery.Naming (where leaves go) or surgery.Transform (how they change)."
            )
    sides = _Sides(leaves(source_shapes), leaves(target), tuple(rules))
    names = _rename(sides)
    routes, replaced = _route(sides, names)
    moves = [_move(sides, path, routes.get(path)) for path in sides.targets]
    _account(sides, names, routes)
    sides.problems.raise_all()
    used = {name for route in routes.values() for name in route.sources}
    waived = tuple(name for name in sides.sources if name not in used)
    would = (_replaced(sides, path, replaced[path]) for path in sides.targets if path in replaced)
    return Plan(tuple(moves), waived, sides.targets, sides.sources, replaced=tuple(move for move in would if move))


class _Sides:
    """Both sides as specs, what each rule selects, and the problems found so far."""

    def __init__(self, source: Mapping[str, Any], target: Mapping[str, Any], rules: tuple[Rule, ...]):
        self.sources = {name: spec_of(leaf, name, "source") for name, leaf in source.items()}
        self.targets = {path: spec_of(leaf, path, "target") for path, leaf in target.items()}
        self.rules = rules
        self.problems = say.Problems()
        self.transforms: dict[str, list[tuple[int, Transform]]] = {}
        self.fresh = self._claimed(Fresh, target)
        self.waived = self._claimed(Waive, source)
        self.changed: set[int] = set()  # numbers of the transforms that made an operation
        for number, rule in enumerate(rules):
            if isinstance(rule, Transform):
                chosen = [path for path, leaf in target.items() if rule.selector(path, leaf)]
                if not chosen:
                    self.problems.add("idle", partial(say.idle, rule, rule.selector, self.targets, "target"))
                for path in chosen:
                    self.transforms.setdefault(path, []).append((number, rule))

    def _claimed(self, kind: type[Fresh] | type[Waive], side: Mapping[str, Any]) -> dict[str, list[Rule]]:
        """The leaves that rules of one kind claim, each with these rules; a rule that claims nothing new is idle."""
        noun = "target" if kind is Fresh else "source"
        rules = [rule for rule in self.rules if isinstance(rule, kind)]
        claims = [[name for name, leaf in side.items() if rule.selector(name, leaf)] for rule in rules]
        out: dict[str, list[Rule]] = {}
        for rule, names in zip(rules, claims, strict=True):
            for name in names:
                out.setdefault(name, []).append(rule)
        for rule, names in zip(rules, claims, strict=True):
            if not names and not getattr(rule, "optional", False):
                self.problems.add("idle", partial(say.idle, rule, rule.selector, side, noun))
            elif names and all(len(out[name]) > 1 for name in names):
                other = next((one for one in out[names[0]] if one is not rule), rule)
                self.problems.add("idle", f"{rule!r} adds nothing: {other!r} selects the same leaves. Remove one.")
        return out


class _Route(NamedTuple):
    """Where a target leaf comes from, before its transforms: one source or several, and what cuts or joins them."""

    source: str | tuple[str, ...]
    ops: tuple[Op, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source


class _Names(NamedTuple):
    """Where each source name leads, and the rule that says so."""

    leads: dict[str, tuple[Lead, ...]]
    why: dict[str, Naming | None]
    surplus: dict[str, str]  # target paths that do not exist, by source name; filled by _route


def _rename(sides: _Sides) -> _Names:
    rules = [rule for rule in sides.rules if isinstance(rule, Naming)]
    first = [rule for rule in rules if not rule.otherwise]
    last = [rule for rule in rules if rule.otherwise]
    acted: set[int] = set()
    out = _Names({}, {}, {})
    for name in sides.sources:
        found = _found(first, name, sides) or _found(last, name, sides)
        acted |= {id(rule) for rule, leads in found if leads != (Lead(name),)}
        if len(found) > 1 and name not in sides.waived:
            sides.problems.add("overlap", say.overlap(name, [repr(rule) for rule, _ in found]))
        out.why[name], out.leads[name] = found[0] if found else (None, (Lead(name),))
    if len(rules) > 1 and not acted:
        sides.problems.begin(say.foreign(len(rules), list(sides.sources)))
    for rule in rules:
        if id(rule) not in acted:
            sides.problems.add("idle", partial(say.idle_naming, rule, sides.sources))
    return out


def _found(rules: Sequence[Naming], name: str, sides: _Sides) -> list[tuple[Naming, tuple[Lead, ...]]]:
    out = []
    for rule in rules:
        try:
            leads = led(rule, name, sides.sources[name])
        except PlanError as error:
            leads = ()
            if name not in sides.waived:
                sides.problems.add("operation", f"source '{name}': {error}")
        if leads is not None:
            out.append((rule, leads))
    return out


def _route(sides: _Sides, names: _Names) -> tuple[dict[str, _Route], dict[str, _Route]]:
    """``{target path: route}``, and those of fresh leaves apart; what leads nowhere goes to ``names.surplus``."""
    arrivals: dict[str, list[tuple[Lead, str]]] = {}
    for name, leads in names.leads.items():
        for lead in leads if name not in sides.waived else ():
            if lead.target in sides.targets:
                arrivals.setdefault(lead.target, []).append((lead, name))
            else:
                names.surplus.setdefault(name, lead.target)
    routes = {path: _joined(sides, names, path, found) for path, found in arrivals.items()}
    _tie(sides, routes)
    replaced = {path: route for path, route in routes.items() if path in sides.fresh}
    return {path: route for path, route in routes.items() if path not in replaced}, replaced


def _joined(sides: _Sides, names: _Names, path: str, found: list[tuple[Lead, str]]) -> _Route:
    lead, name = found[0]
    rule = names.why[name]
    if lead.join and rule and all(one.join == lead.join and names.why[other] is rule for one, other in found):
        found = sorted(found, key=lambda item: item[0].order)
        parts = tuple(other for _, other in found)
        try:
            rule.check_parts(path, parts, [one.order for one, _ in found])
        except PlanError as error:
            sides.problems.add("operation", f"target '{path}': {error}")
        return _Route(parts, (lead.join,))
    if len(found) > 1:
        both = [(other, names.why[other]) for _, other in found]
        sides.problems.add("two sources", partial(say.two_sources, path, both))
    return _Route(name, (lead.cut,) if lead.cut else ())


def _tie(sides: _Sides, routes: dict[str, _Route]) -> None:
    """Adds the routes of tied leaves, each that of the leaf it is tied to."""
    own = dict(routes)
    for rule in (rule for rule in sides.rules if isinstance(rule, Tie)):
        tied = {path: to for path in sides.targets if (to := rule(path)) is not None}
        if not tied:
            sides.problems.add("idle", partial(say.idle_naming, rule, sides.targets, "target"))
        for path, to in tied.items():
            wrong = None
            if path in routes or path in sides.fresh:
                wrong = "has an origin of its own; expected none"
            elif to not in sides.targets:
                wrong = f"is tied to '{to}', which the target does not have"
            elif to not in own or to in sides.fresh:
                wrong = f"is tied to '{to}', which no source leads to"
            if wrong:
                sides.problems.add("tie", f"target '{path}' {wrong}. Correct {rule!r} or remove it.")
            routes.setdefault(path, own.get(to, _Route(())))


def _move(sides: _Sides, path: str, route: _Route | None) -> Move:
    if route is None or not route.sources:
        return Move(path, None)
    source, ops = route.source, list(route.ops)
    specs = [sides.sources[name] for name in route.sources]
    by: Rule | None = None
    try:
        came = infer_ops(ops, specs)
        for number, rule in sides.transforms.get(path, ()):
            op = op_of(rule, came, sides.targets[path])
            if op is None:
                continue
            sides.changed.add(number)
            if by is not None and ops[-1][0] == op[0]:
                raise PlanError(f"{by!r} and {rule!r} follow each other on one leaf. Write one rule for both.")
            came, by = infer_ops([op], [came]), rule
            ops.append(op)
    except PlanError as error:
        sides.changed |= {number for number, _ in sides.transforms.get(path, ())}
        sides.problems.add("operation", f"target '{path}' from {say.quoted(route.sources)}: {error}")
        return Move(path, source)
    _compare(sides, path, route.sources, came, ops)
    return Move(path, source, tuple(ops))


def _replaced(sides: _Sides, path: str, route: _Route) -> Move | None:
    """The move that a fresh leaf would have had, whatever its size; ``None`` where the rules do not fit its source."""
    ops = list(route.ops)
    try:
        came = infer_ops(ops, [sides.sources[name] for name in route.sources])
        for _, rule in sides.transforms.get(path, ()):
            op = None if rule.conditional else op_of(rule, came, sides.targets[path])
            if op is not None:
                came = infer_ops([op], [came])
                ops.append(op)
    except PlanError:
        return None
    return Move(path, route.source, tuple(ops))


def _compare(sides: _Sides, path: str, sources: tuple[str, ...], came: Spec, ops: Sequence[Op]) -> None:
    expected = sides.targets[path]
    if came.shape != expected.shape:
        told = {name: sides.sources[name] for name in sources}
        sides.problems.add("shape", partial(say.wrong_shape, path, expected, told, came, ops), path)
    elif came.dtype != expected.dtype:
        sides.problems.add("dtype", partial(say.wrong_dtype, path, expected, sources, came), path)


def _account(sides: _Sides, names: _Names, routes: Mapping[str, _Route]) -> None:
    """Transforms that never changed a leaf, target leaves without an origin, source leaves left over."""
    for number, rule in enumerate(sides.rules):
        if not isinstance(rule, Transform) or number in sides.changed or rule.conditional:
            continue
        chosen = [path for path, found in sides.transforms.items() if (number, rule) in found]
        # A rule whose leaves are all fresh is kept: a model's ready rules are combined with fresh(...) of its head.
        if any(path in routes for path in chosen):
            sides.problems.add("idle", say.idle_transform(rule, chosen))
    missing = {p: spec for p, spec in sides.targets.items() if p not in routes and p not in sides.fresh}
    unused = say.Finder({name: sides.sources[name] for name in names.surplus})
    waived = {lead.target: (name, rules[0]) for name, rules in sides.waived.items() for lead in names.leads[name]}
    unfilled = say.Finder(missing)
    for path, spec in missing.items():
        sides.problems.add("missing", partial(say.missing, path, spec, unused, unfilled, waived.get(path)), path)
    for name, path in names.surplus.items():
        sides.problems.add("surplus", partial(say.surplus, name, sides.sources[name], path, unused, unfilled), name)
