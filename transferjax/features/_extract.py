"""Features of a data set from one pass of a network."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, SelectionError, describe, listing
from transferjax._types import Batch, Cache, Model
from transferjax.features._table import FeatureTable, Pool, flatten, mean_pool
from transferjax.tree import Selector, natural

OUTPUTS, LABELS = "outputs", "labels"


def extract(
    model: Model,
    batches: Iterable[Batch],
    *,
    at: Selector | str | None = None,
    pool: Pool | None = mean_pool,
    cache: Cache | None = None,
) -> FeatureTable:
    """What a network makes of every example, at its outputs and at as many layers as wanted, in one pass.

    The pass is in inference mode, pooling is part of the compiled program, and a smaller last batch is filled up, so
    that one program serves all. In a run of several processes each one takes its part of every batch and returns that
    part; with a cache in a folder that all of them see, every process can go over all batches again and read.

    Args:
      model: any Model; its ``preprocess`` has been applied to the batches, or is part of it (``data.on_images``).
      batches: dicts with ``inputs`` and ``id`` (integers ``[B]``), each example once; ``labels`` come along.
      at: module paths whose outputs are taken (``"blocks/*"``); ``None``: the outputs of the network only.
      pool: ``[B, ..., d] -> [B, d]`` for every array: ``mean_pool``, ``max_pool``, ``class_token``,
        ``attention_pool``, ``flatten``, or a function of your own; ``None`` keeps maps as they are.
      cache: a ``transferjax.io.FeatureCache`` whose fingerprint names the network, the layers and the pooling:
        examples it holds are read and not computed, so that a pass that was interrupted goes on.

    Returns:
      A :class:`FeatureTable`: one array per selected module, in the order of their paths, then ``outputs``.

    Raises:
      DataError: there is no batch, one lacks ``inputs`` or ``id``, or an example comes twice.
      SelectionError: ``at`` matches no module, or the network cannot say what its modules make.

    >>> import jax.numpy as jnp, transferjax as tj
    >>> model = tj.interop.pure(lambda params, x: x @ params["kernel"], {"kernel": jnp.ones((3, 2))})
    >>> batches = [{"inputs": np.ones((4, 3), np.float32), "labels": np.arange(4), "id": np.arange(4)}]
    >>> extract(model, batches)
    FeatureTable(4 examples: outputs (4, 2) float32)
    """
    if at is not None and model.capture is None:
        raise SelectionError(
            "this Model cannot say what its modules make: capture is None. Expected one from interop.nnx or "
            "interop.linen, or at=None for its outputs."
        )
    run = lambda *arguments: _forward(model.apply, model.capture, at, pool, *arguments)
    size: list[int] = []

    def compute(batch: Batch) -> dict[str, Any]:
        count = len(np.asarray(batch["id"]))
        size.append(count)
        whole = max(size)
        fill = lambda x: x if len(x) == whole else jnp.concatenate([x, jnp.repeat(x[-1:], whole - len(x), axis=0)])
        found = run(model.params, model.extra, jax.tree.map(fill, batch["inputs"]))
        rows = {name: array[:count] for name, array in found.items()}
        return {**rows, **({LABELS: batch[LABELS]} if LABELS in batch else {})}

    checked = _checked(batches)
    parts = list(_ahead(checked, compute) if cache is None else cache.cached(_unread(batches, checked, cache), compute))
    if not parts:
        raise DataError("extract() got no batch. Expected at least one: check the data set.")
    joined = {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0] if name != "weight"}
    ids, labels, last = joined.pop("id"), joined.pop(LABELS, None), joined.pop(OUTPUTS)
    layers = {name: joined[name] for name in sorted(joined, key=natural)}
    return FeatureTable({**layers, OUTPUTS: last}, ids, labels)


def raw_inputs(batches: Iterable[Batch]) -> FeatureTable:
    """The inputs themselves as features, ``[N, d]`` float32: what any transfer has to beat.

    Raises:
      DataError: as :func:`extract`, or the inputs are a dict.

    >>> raw_inputs([{"inputs": np.ones((2, 4, 4, 1), np.uint8), "id": np.arange(2)}])
    FeatureTable(2 examples: inputs (2, 16) float32)
    """
    parts: list[dict[str, Any]] = []
    for batch in _checked(batches):
        if isinstance(batch["inputs"], Mapping):
            raise DataError(
                f"the inputs are a dict of {listing(sorted(batch['inputs']))}; expected one array. Tokens are no "
                "features: take those of a network."
            )
        inputs = flatten(np.asarray(batch["inputs"])).astype(np.float32)
        parts.append({"inputs": inputs, **{name: np.asarray(batch[name]) for name in ("id", LABELS) if name in batch}})
    if not parts:
        raise DataError("raw_inputs() got no batch. Expected at least one: check the data set.")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    ids, labels = joined.pop("id"), joined.pop(LABELS, None)
    return FeatureTable(joined, ids, labels)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # so that a second pass compiles nothing
def _forward(apply: Any, capture: Any, at: Any, pool: Pool | None, params: Any, extra: Any, inputs: Any) -> Any:
    if at is None:
        outputs, captured = apply(params, extra, inputs)[0], {}
    else:
        outputs, _, captured = capture(params, extra, inputs, at)
    found = {**captured, OUTPUTS: outputs}
    for name, array in found.items():
        if not hasattr(array, "ndim") or array.ndim < 2:
            raise SelectionError(
                f"'{name}' is {describe(array)}; expected an array [B, ..., d]. Narrow at to modules with one output."
            )
    return found if pool is None else {name: pool(array) for name, array in found.items()}


def _checked(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if not isinstance(batch, Mapping) or not {"inputs", "id"} <= set(batch):
            has = listing(sorted(batch)) if isinstance(batch, Mapping) else describe(batch)
            raise DataError(f"a batch has {has}; expected a dict with 'inputs' and 'id'. tj.data.batches gives both.")
        yield batch


def _unread(batches: Any, checked: Iterator[Batch], cache: Any) -> Iterator[Batch]:
    """The batches, of which those that the cache holds are not read where they can be left out."""
    unread = getattr(batches, "unread", None)
    return checked if unread is None else unread(cache.holds)


def _ahead(batches: Iterator[Batch], compute: Any) -> Iterator[dict[str, Any]]:
    """The rows of each batch, the next one under way while the last is fetched."""
    waiting: dict[str, Any] | None = None
    for batch in batches:
        found = {**compute(batch), "id": np.asarray(batch["id"])}
        if waiting is not None:
            yield jax.tree.map(np.asarray, waiting)
        waiting = found
    if waiting is not None:
        yield jax.tree.map(np.asarray, waiting)
