"""Features of a data set from one pass of a network."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, SelectionError, describe, is_whole, listing
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
      A :class:`FeatureTable`: one array per selected module, in the order of their paths, then ``outputs``, or of a
      network whose outputs have names ``outputs/NAME`` for each.

    Raises:
      DataError: there is no batch, one lacks ``inputs`` or ``id`` or has not as many of both, only some have labels, or
        an example comes twice.
      SelectionError: ``at`` matches no module, or one whose name the table needs for something else; an output is no
        array ``[B, ..., d]``; or the network cannot say what its modules make.

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
        count = np.size(batch["id"])
        size.append(count)
        whole = max(size)
        fill = lambda x: x if len(x) == whole else jnp.concatenate([x, jnp.repeat(x[-1:], whole - len(x), axis=0)])
        found = run(model.params, model.extra, jax.tree.map(fill, batch["inputs"]))
        rows = {name: array[:count] for name, array in found.items()}
        return {**rows, **({LABELS: batch[LABELS]} if LABELS in batch else {})}

    checked = _checked(batches)
    parts = list(_ahead(checked, compute) if cache is None else cache.cached(_unread(batches, checked, cache), compute))
    return _table(parts, "extract")


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
                "features: take those of a network, or bag_of_tokens."
            )
        parts.append({**_kept(batch), "inputs": flatten(np.asarray(batch["inputs"])).astype(np.float32)})
    return _table(parts, "raw_inputs")


def bag_of_tokens(batches: Iterable[Batch], *, width: int = 2048, inputs: str = "input_ids") -> FeatureTable:
    """Which tokens a text has, as features ``[N, width]`` float32: what a network of texts has to beat.

    A token's column is its number modulo ``width``; each value is the logarithm of one more than how often the text
    has it. Padding, where ``attention_mask`` is 0, is left out. What a rare token is worth, is the read-out's to find.

    Args:
      batches: dicts with ``inputs``, with tokens ``[B, T]`` by name and maybe ``attention_mask``, and ``id``.
      width: columns.
      inputs: the name of the tokens.

    Raises:
      DataError: as :func:`extract`, or there are no such tokens, ``attention_mask`` has another shape than they, or
        ``width`` is no whole number above 0.

    >>> tokens = {"input_ids": np.array([[5, 5, 0]]), "attention_mask": np.array([[1, 1, 0]])}
    >>> np.expm1(bag_of_tokens([{"inputs": tokens, "id": np.arange(1)}], width=8)["inputs"]).round().tolist()
    [[0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0]]
    """
    if not is_whole(width):
        raise DataError(f"width is {width!r}; expected a whole number of columns above 0.")
    parts = []
    for batch in _checked(batches):
        tokens, mask = _tokens(batch["inputs"], inputs)
        rows, _ = np.nonzero(mask)
        counts = np.zeros((len(tokens), int(width)), np.float32)
        np.add.at(counts, (rows, tokens[mask].astype(np.int64) % int(width)), 1)
        parts.append({**_kept(batch), "inputs": np.log1p(counts)})
    return _table(parts, "bag_of_tokens")


def _tokens(inputs: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a batch, and which of them are no padding."""
    given = inputs if isinstance(inputs, Mapping) else {}
    tokens, mask = np.asarray(given.get(name)), given.get("attention_mask")
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        has = [f"{key} {describe(given[key])}" for key in sorted(given)]
        raise DataError(
            f"the inputs are {f'a dict of {listing(has)}' if has else describe(inputs)}; expected a dict with '{name}' "
            "[B, T] integers, as data.tokenizer gives. Of images, take raw_inputs."
        )
    mask = np.ones(tokens.shape) if mask is None else np.asarray(mask)
    if mask.shape != tokens.shape:
        raise DataError(f"attention_mask is {describe(mask)}; expected the shape of '{name}', {tokens.shape}.")
    return tokens, mask != 0


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # so that a second pass compiles nothing
def _forward(apply: Any, capture: Any, at: Any, pool: Pool | None, params: Any, extra: Any, inputs: Any) -> Any:
    if at is None:
        outputs, captured = apply(params, extra, inputs)[0], {}
    else:
        outputs, _, captured = capture(params, extra, inputs, at)
    own = _named(outputs)
    taken = sorted(set(captured) & {*own, LABELS, "id", "weight"})
    if taken:
        raise SelectionError(
            f"a module is called '{taken[0]}', which the table needs for something else. Narrow at to others."
        )
    found = {**captured, **own}
    for name, array in found.items():
        if not hasattr(array, "ndim") or array.ndim < 2:
            hint = "Give a Model with such outputs" if name in own else "Narrow at to modules with one output"
            raise SelectionError(f"'{name}' is {describe(array)}; expected an array [B, ..., d]. {hint}.")
    return found if pool is None else {name: pool(array) for name, array in found.items()}


def _named(outputs: Any) -> dict[str, Any]:
    """Outputs with names keep them, as ``outputs/embedding``."""
    if isinstance(outputs, Mapping):
        return {f"{OUTPUTS}/{name}": array for name, array in outputs.items()}
    return {OUTPUTS: outputs}


def _checked(batches: Iterable[Batch]) -> Iterator[Batch]:
    labelled = None
    for batch in batches:
        if not isinstance(batch, Mapping) or not {"inputs", "id"} <= set(batch):
            has = listing(sorted(batch)) if isinstance(batch, Mapping) else describe(batch)
            raise DataError(f"a batch has {has}; expected a dict with 'inputs' and 'id'. tj.data.batches gives both.")
        count = np.size(batch["id"])
        for leaf in jax.tree.leaves(batch["inputs"], is_leaf=lambda leaf: isinstance(leaf, list)):
            if np.shape(leaf)[:1] != (count,):
                raise DataError(f"a batch has {count} ids and inputs {describe(leaf)}; expected one row per id.")
        if labelled not in (None, LABELS in batch):
            raise DataError("some batches have labels and some have none; expected labels in all, or in none.")
        labelled = LABELS in batch
        yield batch


def _kept(batch: Batch) -> dict[str, np.ndarray]:
    return {name: np.asarray(batch[name]) for name in ("id", LABELS) if name in batch}


def _table(parts: list[dict[str, Any]], function: str) -> FeatureTable:
    if not parts:
        raise DataError(f"{function}() got no batch. Expected at least one: check the data set.")
    joined = {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0] if name != "weight"}
    ids, labels = joined.pop("id"), joined.pop(LABELS, None)
    order = sorted(joined, key=lambda name: (name.split("/")[0] == OUTPUTS, natural(name)))
    return FeatureTable({name: joined[name] for name in order}, ids, labels)


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
