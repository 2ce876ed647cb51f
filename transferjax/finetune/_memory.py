"""Whether a step fits a device, and what makes it fit, told without compiling and without arrays."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import SelectionError, TransferError, describe
from transferjax._report import Report
from transferjax._types import Batch, Params
from transferjax.finetune._frozen import abstract, trace
from transferjax.finetune._hoist import hoist
from transferjax.finetune._match import check_call
from transferjax.finetune._remat import has_scan, remat_scans
from transferjax.finetune._state import FinetuneState
from transferjax.finetune._step import Step
from transferjax.program import is_lifted, predict_memory
from transferjax.tuning import frozen_matrices, quantise


def fit_memory(
    step: Step, state: FinetuneState, frozen: Params, batch: Batch, device_bytes: int, *, platform: str | None = None
) -> Report:
    """Whether a step fits into a device's memory, and which change of it would.

    All bytes are predicted from the life of the arrays in the step's program (``program.predict_memory``): nothing is
    compiled, and only shapes are used. So a network that is too large for this machine is judged like any other: make
    its parameters with ``jax.eval_shape``.

    The changes, each alone:

    - ``remat_scans``: ``make_step(finetune.remat_scans(objective), ...)``; only where the loss has scans;
    - ``accumulate``: ``make_step(..., accumulate=k)``, doubled until it fits;
    - ``bfloat16 base``: frozen float32 leaves as bfloat16;
    - ``int8 base``: ``tuning.quantise`` on every frozen matrix;
    - ``hoisting``: ``tj.hoist``, the larger of the pass that is done once and the step on what it leaves.

    Args:
      step: from ``make_step``.
      state: a ``FinetuneState``, arrays or ``jax.ShapeDtypeStruct``; it is not donated.
      frozen: the frozen tree, arrays or shapes.
      batch: a batch ``[B, ...]``, arrays or shapes.
      device_bytes: bytes of the device that arrays may take.
      platform: whose branch of ``jax.lax.platform_dependent`` runs; default: the default backend's.

    Returns:
      A ``Report`` with the columns ``option``, ``predicted bytes``, ``temporary bytes`` and ``fits``, the step as it
      is first. The metadata says which options fit, why one is left out, and, where nothing fits, the largest batch
      with which the step as it is does (0: none).

    Raises:
      TransferError: ``step`` is no ``Step``, ``state`` no ``FinetuneState``, or ``device_bytes`` no positive integer.
      DataError: the batch is no dict.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda p, extra, x, *, key=None, train=False: (jnp.tanh(x @ p["stem"]) @ p["head"], extra)
    >>> shapes = {"head": jax.ShapeDtypeStruct((512, 2), "float32"), "stem": jax.ShapeDtypeStruct((64, 512), "float32")}
    >>> model, tuning, tx = tj.Model(apply, None, shapes, {}), tj.train("head"), optax.sgd(0.1)
    >>> first = lambda params: tj.init(jax.random.key(0), model._replace(params=params), tuning, tx)
    >>> state, frozen = jax.eval_shape(first, shapes)
    >>> step = tj.make_step(tj.objectives.cross_entropy(apply), tuning, tx)
    >>> images, labels = jax.ShapeDtypeStruct((256, 64), "float32"), jax.ShapeDtypeStruct((256,), "int32")
    >>> report = fit_memory(step, state, frozen, {"inputs": images, "labels": labels}, 700_000)
    >>> [(row["option"], row["fits"]) for row in report.to_dicts()][:2]
    [('as it is', False), ('accumulate=2', True)]
    """
    if not isinstance(step, Step):
        raise TransferError(f"fit_memory() expects a Step first, got {describe(step)}: write tj.make_step(...).")
    check_call(state, frozen, batch)
    if isinstance(device_bytes, bool) or not isinstance(device_bytes, int) or device_bytes <= 0:
        raise TransferError(
            f"fit_memory() expects device_bytes as a positive integer, got {device_bytes!r}: write 16 * 2**30 for "
            "16 GiB."
        )
    shapes = abstract((state, frozen, dict(batch)))
    case = _Case(step, shapes[0], shapes[1], shapes[2], platform or jax.default_backend())
    rows, notes = _judged(case, device_bytes)
    fitting = [name for name, *_, fits in rows if fits]
    facts: dict[str, Any] = {
        "device bytes": device_bytes,
        "platform": case.platform,
        "examples": case.count,
        "fits": ", ".join(fitting) or "nothing",
    }
    if not fitting:
        facts["largest batch that fits as it is"] = _largest(case, device_bytes)
    if notes:
        facts["notes"] = " ".join(notes)
    return Report("Memory of one step", ("option", "predicted bytes", "temporary bytes", "fits"), tuple(rows), facts)


@dataclasses.dataclass(frozen=True)
class _Case:
    """A step and the shapes that it is called with."""

    step: Step
    state: Any
    frozen: Any
    batch: Any
    platform: str

    @property
    def count(self) -> int:
        """Examples in the batch: the most frequent length of first axes."""
        sizes = Counter(leaf.shape[0] for leaf in jax.tree.leaves(self.batch) if leaf.shape)
        return sizes.most_common(1)[0][0] if sizes else 1

    def traced(self) -> Any:
        return trace(self.step, self.state, self.frozen, self.batch)

    def bytes(self) -> tuple[int, int]:
        """Predicted bytes in all, and of the temporaries among them."""
        return _peak(self.traced(), self.platform)

    def of(self, count: int) -> _Case:
        """The same with another number of examples."""
        resize = lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype) if x.shape[:1] == (self.count,) else x
        return dataclasses.replace(self, batch=jax.tree.map(resize, self.batch))


def _peak(traced: Any, platform: str) -> tuple[int, int]:
    memory = predict_memory(traced, platform=platform)
    return memory.peak_bytes, memory.temporary_bytes


def _judged(case: _Case, device_bytes: int) -> tuple[list[tuple[str, int, int, bool]], list[str]]:
    """The rows, and why options are not among them or do not help."""
    rows: list[tuple[str, int, int, bool]] = []
    notes: list[str] = []

    def judge(name: str, found: tuple[int, int] | str) -> None:
        if isinstance(found, str):
            notes.append(f"{name} is left out: {found}.")
            return
        rows.append((name, *found, found[0] <= device_bytes))
        if found[0] >= rows[0][1] and len(rows) > 1:
            notes.append(f"{name} saves nothing on this platform.")

    judge("as it is", case.bytes())
    judge("remat_scans", _remat(case))
    if case.count // case.step.accumulate < 2:
        judge("accumulate", "a part would have no example")
    for parts in _parts(case):
        more = dataclasses.replace(case, step=dataclasses.replace(case.step, accumulate=parts))
        judge(f"accumulate={parts}", more.bytes())
        if rows[-1][-1]:
            break
    judge("bfloat16 base", _bfloat16(case))
    judge("int8 base", _int8(case))
    parts = _hoisting(case)
    judge("hoisting", parts if isinstance(parts, str) else max(parts))
    if not isinstance(parts, str):
        (once, _), (each, _) = parts
        notes.append(f"hoisting: the pass that is done once takes {once:,} bytes, a step afterwards {each:,}.")
    return rows, notes


def _parts(case: _Case) -> Iterator[int]:
    """The step's own number of parts, doubled as often as the examples can be divided."""
    parts = 2 * case.step.accumulate
    while case.count % parts == 0:
        yield parts
        parts *= 2


def _remat(case: _Case) -> tuple[int, int] | str:
    state, step = case.state, case.step
    params = jax.eval_shape(step.tuning.merge, state.trainable, case.frozen)
    loss = lambda params, extra, batch, key: step.objective(params, extra, batch, key, False)
    if not has_scan(jax.make_jaxpr(loss)(params, state.extra, case.batch, state.key)):
        return "the loss has no scan, and XLA undoes it in layers that are written one after another"
    again = dataclasses.replace(step, objective=remat_scans(step.objective))
    return dataclasses.replace(case, step=again).bytes()


def _bfloat16(case: _Case) -> tuple[int, int] | str:
    wide = lambda leaf: not is_lifted(leaf) and leaf.dtype == jnp.float32
    flat, treedef = jax.tree.flatten(case.frozen, is_leaf=is_lifted)
    if not any(map(wide, flat)):
        return "no frozen leaf is float32"
    cast = [jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) if wide(leaf) else leaf for leaf in flat]
    return dataclasses.replace(case, frozen=jax.tree.unflatten(treedef, cast)).bytes()


def _int8(case: _Case) -> tuple[int, int] | str:
    state, step = case.state, case.step
    params = jax.eval_shape(step.tuning.merge, state.trainable, case.frozen)
    try:
        chosen = frozen_matrices(step.tuning, params)
    except SelectionError:
        return "no frozen leaf is a floating-point matrix"
    tuning = quantise(chosen, "int8", step.tuning)
    _, frozen = jax.eval_shape(tuning.init, jax.random.key(0), params)
    return dataclasses.replace(case, step=dataclasses.replace(step, tuning=tuning), frozen=frozen).bytes()


def _hoisting(case: _Case) -> tuple[tuple[int, int], tuple[int, int]] | str:
    """Bytes of the pass that is done once, and of a step on what it leaves."""
    state, objective = case.state, case.step.objective
    hoisted = hoist(case.step, state, case.frozen, case.batch)
    if not hoisted.saves:
        return hoisted.reasons[0].rstrip(".")
    once = hoisted.prefix.jitted.trace(case.frozen, state.extra, objective, case.batch)
    later = hoisted.step.jitted.trace(objective, state, hoisted.keep(case.frozen), dict(hoisted.cut), True)
    return _peak(once, case.platform), _peak(later, case.platform)


def _largest(case: _Case, device_bytes: int) -> int:
    """The largest number of examples, below that of the batch, with which the step as it is fits."""
    unit = case.step.accumulate
    low, high = 0, case.count // unit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if case.of(middle * unit).bytes()[0] <= device_bytes else (low, middle)
    return low * unit
