"""Batches whose frozen part comes out of a cache: computed in the first epoch, read in the later ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from transferjax._errors import DataError, TransferError, describe, listing
from transferjax._types import Batch, Params
from transferjax.finetune._hoist import hoist
from transferjax.finetune._state import FinetuneState
from transferjax.finetune._step import Step
from transferjax.program._hoist import KEY
from transferjax.tree import copy

_OF_THE_BATCH = ("id", "weight")


def cached(
    step: Step, state: FinetuneState, frozen: Params, batches: Iterable[Batch], cache: Any
) -> tuple[Any, Params, Iterator[Batch]]:
    """A hoisted step, the frozen leaves that it reads, and its batches through a cache.

    Args:
      step: from ``make_step``.
      state: as for ``fit``; only read.
      frozen: the frozen weights.
      batches: as for ``fit``, with ``id``.
      cache: a ``transferjax.io.FeatureCache``; its ``options`` are those of ``hoist``. With copies, the copy of an
        example is its ``epoch`` in the batch modulo their number, or, where batches have none, how often it has come.

    Returns:
      ``(hoisted step, frozen, residuals)``.

    Raises:
      TransferError: ``cache`` is none, or nothing of the step can be hoisted; the reasons are in the message.
      CheckpointError: the cache belongs to other weights or another program.
      DataError: there is no batch, or it has no ``id``.
    """
    if not hasattr(cache, "cached"):
        raise TransferError(
            f"fit() expects cache to be a FeatureCache, got {describe(cache)}: write "
            "tj.io.residual_cache(hoisted, state, frozen)."
        )
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise DataError("fit() got no batch. Expected at least one: check the data set and the number of epochs.")
    if "id" not in first:
        raise DataError(
            f"fit() with a cache needs batches with 'id', one integer per example; got {listing(sorted(first))}. "
            "tj.data.batches gives it."
        )
    options = getattr(cache, "options", {})
    counted = {name: value for name, value in first.items() if name != "epoch" or not options.get("copies")}
    hoisted = hoist(step, state, frozen, counted, **options)
    if not any(name.startswith("hoisted_") for name in hoisted.cut):
        raise TransferError(
            f"fit() was given a cache, and nothing of this step can be computed once: {' '.join(hoisted.reasons)} "
            "Call it without a cache."
        )
    cache.check(hoisted.reads(state, frozen), str(hoisted.prefix_jaxpr()))
    extra, key = copy((state.extra, state.key))  # the state's own are donated
    batches = itertools.chain([first], batches)
    drop = lambda residual: {name: value for name, value in residual.items() if name not in _OF_THE_BATCH}
    if hoisted.copies == 1 and KEY not in hoisted.reads(state, frozen):
        compute = lambda batch: drop(hoisted.prefix(frozen, extra, step.objective, batch))
        return hoisted.step, hoisted.keep(frozen), cache.cached(batches, compute)
    copies = hoisted.copies

    def compute_copies(batch: Batch) -> dict[str, Any]:
        own = {**batch, "id": batch["id"] // copies}
        return drop(hoisted.prefix(frozen, extra, step.objective, own, key, batch["id"] % copies))

    rows = cache.cached(_numbered(batches, copies), compute_copies)
    return hoisted.step, hoisted.keep(frozen), ({**row, "id": row["id"] // copies} for row in rows)


def _numbered(batches: Iterable[Batch], copies: int) -> Iterator[Batch]:
    """The batches with the row of each example's copy for its id: that of the epoch, or of how often it has come."""
    seen: dict[int, int] = {}
    for batch in batches:
        ids = np.asarray(batch["id"])
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"ids are {describe(ids)}; expected integers of shape [B], one per example.")
        if ids.size and max(abs(int(ids.min())), abs(int(ids.max()))) >= 2**62 // copies:
            raise DataError(f"ids and {copies} copies do not fit into 64 bits. Expected ids below {2**62 // copies:,}.")
        come = np.array([seen.get(one, 0) for one in ids.tolist()], np.int64)
        seen.update((one, 1 + seen.get(one, 0)) for one in set(ids.tolist()))
        epoch = np.asarray(batch["epoch"], np.int64) if "epoch" in batch else come
        rest = {name: value for name, value in batch.items() if name != "epoch"}
        yield {**rest, "id": ids.astype(np.int64) * copies + epoch % copies}
