"""Batches whose frozen part comes out of a cache: computed in the first epoch, read in the later ones."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from transferjax._errors import DataError, TransferError, describe, listing
from transferjax._types import Batch, Params
from transferjax.finetune._hoist import Hoisted, hoist
from transferjax.finetune._state import FinetuneState
from transferjax.finetune._step import Step
from transferjax.program._hoist import KEY
from transferjax.tree import copy

_OF_THE_BATCH = ("id", "weight")


def residuals(
    hoisted: Hoisted, state: FinetuneState, frozen: Params, batches: Iterable[Batch], cache: Any
) -> Residuals:
    """What the first part of a hoisted loss leaves of each batch: computed once per example id, then read.

    ``fit(hoisted.step, state, hoisted.keep(frozen), residuals(...))`` trains on them, and so does ``sweep`` with a
    ``hoisted_recipe``; ``fit(..., cache=cache)`` does all of it by itself.

    Args:
      hoisted: from ``hoist``.
      state: what it was hoisted with; only read, and only now, so that it may be donated afterwards.
      frozen: the frozen weights, complete.
      batches: any iterable of batches with ``id``, integers ``[B]``; the same arrays for the same id in every epoch.
        Those of ``transferjax.data.batches`` (also through ``to_device``) read and decode nothing that the cache has.
        With copies, the copy of an example is its ``epoch`` in the batch modulo their number, or, where batches have
        none, how often it has come.
      cache: from ``transferjax.io.residual_cache``.

    Returns:
      An iterable of residuals: dicts of arrays ``[B, ...]``, with ``id`` and ``weight`` as the batches have them. Each
      ``iter`` goes over the batches anew, as far as they can be gone over again.

    Raises:
      TransferError: ``hoisted`` is not from ``hoist``, or ``cache`` is no cache.
      CheckpointError: the cache belongs to other weights or another program.
      DataError: (while iterating) a batch has no ``id``, or one that is no integer.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda p, extra, x, *, key=None, train=False: (jnp.tanh(x @ p["stem"]) @ p["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones((3, 2)), "stem": jnp.ones((8, 3))}, {})
    >>> tuning, tx = tj.train("head"), optax.sgd(0.1)
    >>> step = tj.make_step(tj.objectives.cross_entropy(apply), tuning, tx)
    >>> state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    >>> batch = {"inputs": jnp.ones((4, 8)), "labels": jnp.zeros(4, int), "id": jnp.arange(4)}
    >>> hoisted = tj.hoist(step, state, frozen, batch)
    >>> cache = tj.io.residual_cache(hoisted, state, frozen)
    >>> for residual in residuals(hoisted, state, frozen, [batch, batch], cache):
    ...     state, metrics = hoisted.step(state, hoisted.keep(frozen), residual)
    >>> len(cache), int(state.step)
    (4, 2)
    """
    if not isinstance(hoisted, Hoisted):
        raise TransferError(f"residuals() expects a Hoisted first, got {describe(hoisted)}: write tj.hoist(...).")
    _check_cache(cache, "residuals")
    cache.check(hoisted.reads(state, frozen), str(hoisted.prefix_jaxpr()))
    extra, key = copy((state.extra, state.key))  # the state's own are donated
    objective, copies = hoisted.step.objective, hoisted.copies
    drop = lambda residual: {name: value for name, value in residual.items() if name not in _OF_THE_BATCH}
    if copies == 1 and KEY not in hoisted.reads(state, frozen):
        unread = getattr(batches, "unread", None)  # tj.data.batches: what the cache has is not read again
        given = (lambda: batches) if unread is None else (lambda: unread(cache.holds))
        return Residuals(
            lambda: cache.cached(given(), lambda batch: drop(hoisted.prefix(frozen, extra, objective, batch)))
        )

    def compute_copies(batch: Batch) -> dict[str, Any]:
        own = {**batch, "id": batch["id"] // copies}
        return drop(hoisted.prefix(frozen, extra, objective, own, key, batch["id"] % copies))

    rows = lambda: cache.cached(_numbered(batches, copies), compute_copies)
    return Residuals(lambda: ({**row, "id": row["id"] // copies} for row in rows()))


@dataclasses.dataclass(frozen=True)
class Residuals:
    """What :func:`residuals` returns: each ``iter`` is a pass over the batches."""

    begin: Callable[[], Iterator[Batch]] = dataclasses.field(repr=False)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.begin())


def cached(
    step: Step, state: FinetuneState, frozen: Params, batches: Iterable[Batch], cache: Any
) -> tuple[Any, Params, Residuals]:
    """A hoisted step, the frozen leaves that it reads, and its batches through a cache.

    Args:
      step: from ``make_step``.
      state: as for ``fit``; only read.
      frozen: the frozen weights.
      batches: as for ``fit``, with ``id``.
      cache: a ``transferjax.io.FeatureCache``; its ``options`` are those of ``hoist``.

    Returns:
      ``(hoisted step, frozen, residuals)``.

    Raises:
      TransferError: ``cache`` is none, or nothing of the step can be hoisted; the reasons are in the message.
      CheckpointError: the cache belongs to other weights or another program.
      DataError: there is no batch, or it has no ``id``.
    """
    _check_cache(cache, "fit")
    options, begun = getattr(cache, "options", {}), []
    unread = None if options.get("copies") else getattr(batches, "unread", None)
    # The first batch is read whole, as the loss is split for it.
    held = lambda ids: bool(begun) and cache.holds(ids)
    running: Iterator[Batch] = iter(batches) if unread is None else unread(held)
    first = next(running, None)
    begun.append(True)
    if first is None:
        raise DataError("fit() got no batch. Expected at least one: check the data set and the number of epochs.")
    if "id" not in first:
        raise DataError(
            f"fit() with a cache needs batches with 'id', one integer per example; got {listing(sorted(first))}. "
            "tj.data.batches gives it."
        )
    counted = {name: value for name, value in first.items() if name != "epoch" or not options.get("copies")}
    hoisted = hoist(step, state, frozen, counted, **options)
    if not hoisted.saves:
        raise TransferError(
            f"fit() was given a cache, and nothing of this step can be computed once: {' '.join(hoisted.reasons)} "
            "Call it without a cache."
        )
    whole = itertools.chain([first], running)
    return hoisted.step, hoisted.keep(frozen), residuals(hoisted, state, frozen, whole, cache)


def _check_cache(cache: Any, name: str) -> None:
    if not all(hasattr(cache, name) for name in ("cached", "check", "holds")):
        raise TransferError(
            f"{name}() expects cache to be a FeatureCache, got {describe(cache)}: write "
            "tj.io.residual_cache(hoisted, state, frozen)."
        )


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
