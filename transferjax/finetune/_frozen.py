"""The proof that frozen weights are free: read from the program of a step, not from a run of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transferjax._errors import LawError, listing
from transferjax._report import Report
from transferjax._types import Params
from transferjax.finetune._state import FinetuneState
from transferjax.finetune._step import Step, loss_of, training_mode
from transferjax.program import Cost, cost, dependencies, is_lifted, materialised
from transferjax.tree import flatten, natural

PRODUCTS = "FLOPs of matrix products and convolutions"
_MARK = "frozen_cotangent:"


def frozen_is_frozen(step: Step, state: FinetuneState, frozen: Params, batch: Any) -> Report:
    """Proves from the jaxpr of a step that frozen weights cost nothing backwards.

    Two checks. First, every frozen leaf gets an identity whose backward pass leaves a mark, once where the tuning
    merges it and once where the objective sees it; no output of the step (state or metrics) may depend on a mark.
    Second, the step may need no more matrix products and convolutions than a step that differentiates the trainable
    leaves alone, and at most 1 % more FLOPs in all (and a few per trainable and optimizer element).

    A leaf that is made of frozen and trainable weights together before it is used has no frozen cotangent, but the
    whole kernel's gradient is computed on the way to the adapter. Such leaves are listed as exceptions: adapters
    without a lifted form, and those whose lifted leaf meets an operation that it cannot pass. What an objective
    differentiates on its own account is the objective's cost, not the freezing's.

    Args:
      step: from ``make_step``.
      state: a ``FinetuneState``; only its shapes are used.
      frozen: the frozen tree; only its shapes are used.
      batch: a batch; only its shapes are used.

    Returns:
      A ``Report``: one row per check, with ``step``, ``reference`` and ``holds``; the exceptions in its metadata.

    Raises:
      LawError: an output depends on a frozen leaf's cotangent (both are named), or the FLOPs exceed the reference.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda p, extra, x, *, key=None, train=False: (x * p["stem"] * p["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(()), "stem": jnp.ones(())}, {})
    >>> tuning, tx = tj.train("head"), optax.sgd(0.25)
    >>> step = tj.make_step(tj.objectives.mean_squared_error(apply), tuning, tx)
    >>> state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    >>> batch = {"inputs": jnp.ones(4), "labels": jnp.zeros(4)}
    >>> frozen_is_frozen(step, state, frozen, batch).column("holds")
    [True, True, True]
    """
    state, frozen, batch = abstract((state, frozen, batch))
    leaks, outputs = _leaks(step, state, frozen, batch)
    if leaks:
        raise LawError(_leak_message(leaks))
    rows, notes = _flops(step, state, frozen, batch)
    exceptions = merged(step, state, frozen, batch)
    facts = {
        "outputs": outputs,
        "frozen leaves": len(jax.tree.leaves(frozen)),
        "platform": jax.default_backend(),
        "bookkeeping allowed (FLOPs)": _bookkeeping(step, state),
        "merge-form adapters (exceptions)": ", ".join(exceptions) or "none",
        **({"notes": "; ".join(notes)} if notes else {}),
    }
    first = ("outputs that depend on a frozen cotangent", 0, 0, True)
    return Report("Frozen is frozen", ("check", "step", "reference", "holds"), (first, *rows), facts)


def merge_form(tuning: Any, trainable: Any, frozen: Any) -> list[str]:
    """The parameters that a tuning computes from trainable and frozen weights together, in natural order.

    Those that it can leave apart, in a lifted form, are none of them.

    >>> import jax, jax.numpy as jnp, transferjax as tj
    >>> scaled = tj.tuning.adapter("fc/kernel", lambda *_: {"scale": jnp.ones(())}, lambda w, leaf: leaf * w["scale"])
    >>> params = {"fc": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}}
    >>> merge_form(scaled, *scaled.init(jax.random.key(0), params))
    ['fc/kernel']
    >>> lora = tj.lora("fc/kernel", rank=1)
    >>> merge_form(lora, *lora.init(jax.random.key(0), params))
    []
    """
    mixed, _ = _origins(tuning, trainable, frozen)
    if tuning.lifted is None:
        return mixed
    whole, treedef = flatten(jax.eval_shape(tuning.merge, trainable, frozen))
    parts = treedef.flatten_up_to(jax.eval_shape(tuning.lifted, trainable, frozen))
    apart = {path for (path, _), leaf in zip(whole, parts, strict=True) if is_lifted(leaf)}
    return [path for path in mixed if path not in apart]


def merged(step: Step, state: Any, frozen: Any, batch: Any) -> list[str]:
    """The parameters that a step computes whole from trainable and frozen weights, in natural order.

    Those of :func:`merge_form`, and those whose lifted leaf meets an operation in this objective that it cannot pass.
    """
    tuning, found = step.tuning, set(merge_form(step.tuning, state.trainable, frozen))
    if tuning.lifted is not None:
        mode = training_mode(tuning, state.trainable, frozen) if step.train is None else step.train
        call = lambda params, objective, *rest: objective(params, *rest, mode)
        params = jax.eval_shape(tuning.lifted, state.trainable, frozen)
        facts = materialised(call, params, step.objective, state.extra, batch, state.key)
        found |= {fact.path for fact in facts}
    return sorted(found, key=natural)


def _origins(tuning: Any, trainable: Any, frozen: Any) -> tuple[list[str], frozenset[str]]:
    """Paths of parameters made of both sides, and of those made of no trainable leaf."""
    jaxpr, shapes = jax.make_jaxpr(tuning.merge, return_shape=True)(trainable, frozen)
    learnt = len(jax.tree.leaves(trainable))
    mixed, untouched = [], []
    for (path, _), found in zip(flatten(shapes)[0], dependencies(jaxpr), strict=True):
        if not any(number < learnt for number in found):
            untouched.append(path)
        elif any(number >= learnt for number in found):
            mixed.append(path)
    return sorted(mixed, key=natural), frozenset(untouched)


def abstract(tree: Any) -> Any:
    """Shapes and types in place of arrays, so that nothing is held, copied or run."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jax.dtypes.result_type(leaf)), tree)


def trace(step: Step, state: Any, frozen: Any, batch: Any) -> Any:
    """The traced program of one call of a step; it has ``.jaxpr`` and ``.lower()``."""
    return step.jitted.trace(step.objective, state, frozen, batch, True)


def _leaks(step: Step, state: Any, frozen: Any, batch: Any) -> tuple[dict[str, list[str]], int]:
    """``{output path: frozen paths whose cotangent reaches it}``, and how many outputs there are."""
    _, untouched = _origins(step.tuning, state.trainable, frozen)
    marked = lambda form: form and (lambda trainable, rest: form(trainable, _mark(rest, None)))
    mode = training_mode(step.tuning, state.trainable, frozen) if step.train is None else step.train
    probed = dataclasses.replace(
        step,
        objective=jax.tree_util.Partial(_Probed(untouched), step.objective),
        tuning=step.tuning._replace(merge=marked(step.tuning.merge), lifted=marked(step.tuning.lifted)),
        train=mode,
    )
    traced = trace(probed, state, frozen, batch)
    new, metrics = traced.out_info
    names = [path for name, tree in (("state", new), ("metrics", metrics)) for path, _ in flatten({name: tree})[0]]
    leaks = {}
    for name, found in zip(names, dependencies(traced.jaxpr, marks=_mark_of), strict=True):
        marks = sorted({mark for mark in found if isinstance(mark, str)})
        if marks:
            leaks[name] = marks
    return leaks, len(names)


@dataclasses.dataclass(frozen=True)
class _Probed:
    """An objective that marks the parameters made of no trainable leaf."""

    untouched: frozenset[str]

    def __call__(self, objective, params, extra, batch, key, train):
        return objective(_mark(params, self.untouched), extra, batch, key, train)


def _mark(tree: Any, chosen: frozenset[str] | None) -> Any:
    flat, treedef = flatten(tree)
    leaves = [_marked(leaf, path) if chosen is None or path in chosen else leaf for path, leaf in flat]
    return jax.tree.unflatten(treedef, leaves)


def _marked(leaf: Any, path: str) -> Any:
    """The same value; whoever asks for its cotangent gets it through a call that carries the leaf's path."""
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return leaf

    def mark(cotangent):
        return -cotangent  # never run; a call without an equation could be forwarded and lose its name

    mark.__name__ = _MARK + path
    identity = jax.custom_vjp(lambda x: x)
    identity.defvjp(lambda x: (x, None), lambda _, cotangent: (jax.jit(mark)(cotangent),))
    return identity(leaf)


def _mark_of(eqn: Any) -> str | None:
    name = eqn.params.get("name")
    return name[len(_MARK) :] if isinstance(name, str) and name.startswith(_MARK) else None


def _leak_message(leaks: dict[str, list[str]]) -> str:
    leaves = sorted({path for found in leaks.values() for path in found})
    return (
        f"{len(leaks)} outputs of the step depend on the cotangent of frozen leaves: {listing(list(leaks))} "
        f"on {listing(leaves)}. Expected none: differentiate with respect to state.trainable only, and let clipping, "
        "accumulation and metrics see no other gradient."
    )


def _flops(step: Step, state: Any, frozen: Any, batch: Any) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """One row per count of FLOPs beside its reference, and what was assumed in counting."""
    platform = jax.default_backend()
    traced = trace(step, state, frozen, batch)
    own, best = cost(traced, platform=platform), _reference_cost(step, state, frozen, batch, platform)
    averages = 2 * step.accumulate * len(jax.tree.leaves(traced.out_info[1]))
    bounds = {
        PRODUCTS: (own.contractions, best.contractions, best.contractions + averages),
        "FLOPs": (own.flops, best.flops, 1.01 * best.flops + _bookkeeping(step, state)),
    }
    for name, (mine, reference, bound) in bounds.items():
        if mine > bound:
            raise LawError(
                f"the step needs {mine:,} {name}, a step that differentiates the trainable leaves alone {reference:,}. "
                "Expected no more: differentiate with respect to state.trainable only, inside one jit."
            )
    rows = tuple((name, mine, reference, True) for name, (mine, reference, _) in bounds.items())
    return rows, tuple(dict.fromkeys((*own.notes, *best.notes)))


def _reference_cost(step: Step, state: Any, frozen: Any, batch: Any, platform: str) -> Cost:
    """Gradients of the trainable leaves alone (once per part of the batch) and the optimizer, written by hand."""
    mode = training_mode(step.tuning, state.trainable, frozen) if step.train is None else step.train

    def gradients(objective, trainable, frozen, extra, batch, key):
        def loss(trainable):
            result = loss_of(step.tuning, objective, trainable, frozen, extra, batch, key, mode)
            return result.value, (result.metrics, result.extra)

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    def update(gradients, opt_state, trainable, value):
        tx = optax.with_extra_args_support(step.tx)
        updates, opt_state = tx.update(gradients, opt_state, trainable, value=value)
        return optax.apply_updates(trainable, updates), opt_state

    def shorter(leaf):
        return jax.ShapeDtypeStruct((leaf.shape[0] // step.accumulate, *leaf.shape[1:]), leaf.dtype)

    part = jax.tree.map(shorter, batch) if step.accumulate > 1 else batch
    value = jax.ShapeDtypeStruct((), jnp.float32)
    jaxpr = jax.make_jaxpr(gradients)(step.objective, state.trainable, frozen, state.extra, part, state.key)
    once = cost(jaxpr, platform=platform)
    last = cost(update, state.trainable, state.opt_state, state.trainable, value, platform=platform)
    return once * step.accumulate + last


def _bookkeeping(step: Step, state: Any) -> int:
    """FLOPs that a step may spend on accumulating, on the check for finite values and on keeping the old state."""
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    learnt, rest = size(state.trainable), size((state.extra, state.opt_state))
    return (3 * step.accumulate + 8) * learnt + 2 * rest + 2000 * step.accumulate
