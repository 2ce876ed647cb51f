"""Batches whose frozen part comes out of a cache: computed in the first epoch, read in the later ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from transferjax._errors import DataError, TransferError
from transferjax._types import Batch, Params
from transferjax.finetune._hoist import hoist
from transferjax.finetune._state import FinetuneState
from transferjax.finetune._step import Step
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
      cache: a ``transferjax.io.FeatureCache``.

    Returns:
      ``(hoisted step, frozen, residuals)``.

    Raises:
      TransferError: nothing of the step can be hoisted; the reasons are in the message.
      CheckpointError: the cache belongs to other weights or another program.
      DataError: there is no batch.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise DataError("fit() got no batch. Expected at least one: check the data set and the number of epochs.")
    hoisted = hoist(step, state, frozen, first)
    if not any(name.startswith("hoisted_") for name in hoisted.cut):
        raise TransferError(
            f"fit() was given a cache, and nothing of this step can be computed once: {' '.join(hoisted.reasons)} "
            "Call it without a cache."
        )
    cache.check(hoisted.reads(state, frozen), str(hoisted.prefix_jaxpr()))
    extra = copy(state.extra)  # the state's own are donated

    def compute(batch: Batch) -> dict[str, Any]:
        residual = hoisted.prefix(frozen, extra, step.objective, batch)
        return {name: value for name, value in residual.items() if name not in _OF_THE_BATCH}

    return hoisted.step, hoisted.keep(frozen), cache.cached(itertools.chain([first], batches), compute)
