"""What a step costs, beside the same step with everything trainable."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import TransferError, describe
from transferjax._report import Report
from transferjax._types import Hole, Params, Tuning
from transferjax.finetune._frozen import abstract, merged, trace
from transferjax.finetune._match import check_call
from transferjax.finetune._state import FinetuneState
from transferjax.finetune._step import Step
from transferjax.program import Measurement, cost, measure
from transferjax.tree import where
from transferjax.tuning import train


def explain(step: Step, state: FinetuneState, frozen: Params, batch: Any, *, compile: bool = True) -> Report:
    """FLOPs, bytes, memory and parameters of a step, each beside the same step with everything trainable.

    The reference has the same objective, optimizer, accumulation and training mode rule, and trains every
    floating-point leaf of the merged parameters. Nothing is run and no array is made; both steps are compiled.

    Args:
      step: from ``make_step``.
      state: a ``FinetuneState``; only its shapes are used, it is not donated.
      frozen: the frozen tree; only its shapes are used.
      batch: a batch; only its shapes are used.
      compile: whether to compile both steps; ``False`` leaves out what only XLA can say.

    Returns:
      A ``Report`` with the columns ``quantity``, ``this step``, ``everything trainable`` and ``ratio``; what nobody
      says has no row. FLOPs are counted on the jaxpr times trip counts; XLA's own figure stands beside them and
      counts a loop's body once. Notes, platform and merge-form adapters are in its metadata.

    Raises:
      TransferError: ``step`` is no ``Step``, or ``state`` no ``FinetuneState``.
      DataError: the batch is no dict.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda p, extra, x, *, key=None, train=False: (x * p["stem"] * p["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(()), "stem": jnp.ones(())}, {})
    >>> tuning, tx = tj.train("head"), optax.sgd(0.25)
    >>> step = tj.make_step(tj.objectives.mean_squared_error(apply), tuning, tx)
    >>> state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    >>> report = explain(step, state, frozen, {"inputs": jnp.ones(4), "labels": jnp.zeros(4)}, compile=False)
    >>> report.to_dicts()[-3]
    {'quantity': 'trainable parameters', 'this step': 1, 'everything trainable': 2, 'ratio': 0.5}
    """
    if not isinstance(step, Step):
        raise TransferError(f"explain() expects a Step first, got {describe(step)}: write tj.make_step(...).")
    check_call(state, frozen, batch)
    state, frozen, batch = abstract((state, frozen, batch))
    reference, group = everything_trainable(step, state, frozen)
    ours = _figures(step, state, frozen, batch, compile)
    theirs = _figures(*reference, batch, compile)
    known = [name for name in ours if name != "notes" and (ours[name] is not None or theirs[name] is not None)]
    rows = tuple((name, ours[name], theirs[name], _ratio(ours[name], theirs[name])) for name in known)
    facts = {
        "platform": jax.default_backend(),
        "accumulate": step.accumulate,
        "merge-form adapters": ", ".join(merged(step, state, frozen, batch)) or "none",
    }
    if group is not None:
        facts["optimizer of the reference"] = f"that of group '{group}', for every parameter"
    notes = tuple(dict.fromkeys((*ours["notes"], *theirs["notes"])))
    if compile and getattr(jax.config, "jax_compilation_cache_dir", None):
        notes = (*notes, "the compilation cache is on: compile seconds may be those of reading it")
    if notes:
        facts["notes"] = "; ".join(notes)
    return Report("Cost of one step", ("quantity", "this step", "everything trainable", "ratio"), rows, facts)


def everything_trainable(
    step: Step, state: FinetuneState, frozen: Params
) -> tuple[tuple[Step, FinetuneState, Params], str | None]:
    """The same step with every floating-point parameter trainable, and its abstract state and frozen tree.

    An optimizer with one transform per group cannot take a tree without groups: then all parameters are put into the
    group that trains most values, whose name comes back too.

    Args:
      step: the step to compare with.
      state: its state, arrays or shapes.
      frozen: its frozen tree, arrays or shapes.

    Returns:
      ``((step, state, frozen), group)``; ``group`` is ``None`` where the optimizer needs none.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> model = tj.Model(None, None, {"head": jnp.ones(3), "stem": jnp.ones(4)}, {})
    >>> tuning, tx = tj.train("head"), optax.sgd(0.25)
    >>> state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    >>> step = tj.make_step(lambda params, extra, batch, key, train: None, tuning, tx)
    >>> (_, reference, _), group = everything_trainable(step, state, frozen)
    >>> sorted(reference.trainable), group
    (['head', 'stem'], None)
    """
    params = jax.eval_shape(step.tuning.merge, state.trainable, frozen)
    tuning, group = train(where(_floating, "floating point")), None
    try:
        jax.eval_shape(step.tx.init, _learns(tuning, params))
    except (ValueError, TypeError, KeyError):
        if not isinstance(state.trainable, dict):
            raise
        sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in state.trainable.items()}
        group = max(sizes, key=lambda name: sizes[name])
        tuning = _in_group(tuning, group, tuple(sizes))
    learns, stays = jax.eval_shape(tuning.init, jax.random.key(0), params)
    opt_state = jax.eval_shape(step.tx.init, learns)
    reference = dataclasses.replace(state, trainable=learns, opt_state=opt_state)
    return (dataclasses.replace(step, tuning=tuning), reference, stays), group


def _floating(path: str, leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def _learns(tuning: Tuning, params: Any) -> Any:
    return jax.eval_shape(tuning.init, jax.random.key(0), params)[0]


def _in_group(tuning: Tuning, group: str, names: tuple[str, ...]) -> Tuning:
    """The tuning with all that learns in one group; the other groups hold nothing."""

    def init(key, params):
        learns, stays = tuning.init(key, params)
        return {name: learns if name == group else jax.tree.map(lambda _: Hole(), learns) for name in names}, stays

    return Tuning(init, lambda trainable, frozen: tuning.merge(trainable[group], frozen))


def _figures(step: Step, state: Any, frozen: Any, batch: Any, compile: bool) -> dict[str, Any]:
    traced = trace(step, state, frozen, batch)
    counted = cost(traced.jaxpr, platform=jax.default_backend())
    measured, seconds = _compiled(traced) if compile else (None, None)
    xla = lambda name: getattr(measured, name, None)
    return {
        "FLOPs": counted.flops,
        "FLOPs (XLA, a loop's body once)": _whole(xla("flops")),
        "transcendental functions": counted.transcendentals,
        "bytes accessed (unfused)": counted.bytes_read + counted.bytes_written,
        "bytes accessed (XLA, a loop's body once)": _whole(xla("bytes_accessed")),
        "temporary memory": xla("temporary_bytes"),
        "argument memory": xla("argument_bytes"),
        "output memory": xla("output_bytes"),
        "output memory that reuses arguments": xla("alias_bytes"),
        "code bytes": xla("code_bytes"),
        "compile seconds": seconds,
        "optimizer bytes": _sizes(state.opt_state)[1],
        "trainable parameters": _sizes(state.trainable)[0],
        "frozen parameters": _sizes(frozen)[0],
        "frozen bytes": _sizes(frozen)[1],
        "notes": counted.notes,
    }


def _compiled(traced: Any) -> tuple[Measurement, float]:
    lowered = traced.lower()
    begin = time.perf_counter()
    compiled = lowered.compile()
    return measure(compiled), time.perf_counter() - begin


def _sizes(tree: Any) -> tuple[int, int]:
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size for leaf in leaves), sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _ratio(a: Any, b: Any) -> float | None:
    return None if a is None or not b else a / b
