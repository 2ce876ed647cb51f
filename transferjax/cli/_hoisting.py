"""Computing once per example what training cannot change, where that pays."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

import transferjax as tj

MEMORY = 1 << 30
"""Bytes of residuals that are kept in memory; more of them go to disk."""
DISK = 1 << 32
"""Bytes of residuals beyond which hoisting is not chosen without being asked for."""
SHARE = 0.1
"""Of a run's FLOPs: hoisting that saves less does not pay for a second compilation."""


def unchanged(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches themselves."""
    return batches


@dataclasses.dataclass(frozen=True)
class Running:
    """What a loop runs: the step itself, or its second part on what the first one left.

    Attributes:
      step: for ``tj.fit``.
      frozen: the frozen leaves that it reads.
      through: from batches to what the step takes.
      facts: what was hoisted and what that saves, or would save; empty where nobody looked.
      flops: of a step, with its share of what is computed once.
      hoisted: from ``tj.hoist``, where something was.
    """

    step: Any
    frozen: Any
    through: Callable[[Iterable[Any]], Iterable[Any]] = unchanged
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flops: float | None = None
    hoisted: Any = None


def running(
    step: Any,
    state: Any,
    frozen: Any,
    batches: Any,
    *,
    wanted: bool | None = None,
    folder: pathlib.Path | None = None,
) -> Running:
    """The step hoisted, if that is wanted, or if it pays and nobody said.

    It pays when there are several epochs, a tenth of all FLOPs is saved, and what is kept fits into 4 GiB.

    Args:
      step: from ``make_step``.
      state: its state; only read.
      frozen: the frozen weights.
      batches: ``tj.data.Batches`` of the whole run.
      wanted: ``None``: when it pays.
      folder: for what does not fit into memory; ``None``: memory only.

    Raises:
      TransferError: it is wanted, and nothing can be hoisted.
    """
    plain = Running(step, frozen)
    if wanted is False or not (wanted or _may_pay(frozen, batches)):
        once = wanted is None and batches.epochs == 1
        return dataclasses.replace(plain, facts={"computed once": "nothing: there is one epoch"}) if once else plain
    here = batches.get_state()
    batch = next(iter(batches))
    batches.set_state(here)
    hoisted = tj.hoist(step, state, frozen, batch)
    if not hoisted.saves:
        if wanted:
            raise tj.TransferError(
                f"--hoist: nothing of this run can be computed once: {' '.join(hoisted.reasons)} Leave --hoist out."
            )
        return Running(step, frozen, facts={"computed once": "nothing: all of it can change"})
    once, later, before = hoisted.report().column("value")[1:4]
    later += once / batches.epochs
    total = hoisted.bytes_per_example * len(batches.source)
    pays = later <= (1 - SHARE) * before and total <= (DISK if folder else MEMORY)
    if not wanted and not pays:
        saved = f"it would save {max(0.0, 1 - later / before):.0%} of all FLOPs for {total:,} bytes"
        return Running(step, frozen, facts={"computed once": f"nothing: {saved}"})
    return _hoisted(hoisted, state, frozen, batches, folder if total > MEMORY else None, later, before)


def _may_pay(frozen: Any, batches: Any) -> bool:
    return batches.epochs > 1 and jax.process_count() == 1 and bool(jax.tree.leaves(frozen))


def _hoisted(hoisted: Any, state: Any, frozen: Any, batches: Any, folder: Any, flops: float, before: float) -> Running:
    def through(given: Iterable[Any]) -> Iterable[Any]:
        cache = tj.io.residual_cache(hoisted, state, frozen, path=folder, memory_bytes=2 * MEMORY)
        return tj.finetune.residuals(hoisted, state, frozen, given, cache)

    place = "in memory" if folder is None else f"in {folder}"
    kept = f"{hoisted.bytes_per_example:,} bytes kept of each of {len(batches.source):,} examples, {place}"
    saved = 1 - flops / before
    share = f"{saved:.0%} of all FLOPs" if saved >= 0.005 else f"none in {batches.epochs} epoch(s)"
    facts = {"computed once": kept, "FLOPs saved": share}
    return Running(hoisted.step, hoisted.keep(frozen), through, facts, flops, hoisted)
