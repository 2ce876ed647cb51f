"""Drift: how far the representations of a fine-tuned network lie from those of its source, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from transferjax._errors import DataError, SelectionError, TransferError, describe, listing
from transferjax._report import Report
from transferjax._types import Batch, Model
from transferjax.numerics._cka import linear_hsic
from transferjax.numerics._tables import as_features
from transferjax.surgery import compare
from transferjax.tree import Selector, as_selector, flatten

LEAST = 4
OUTPUTS = "(outputs)"


def drift(base: Model, tuned: Model, batches: Iterable[Batch], at: Selector | str | None = None) -> Report:
    """Linear CKA between what two networks make of the same examples, layer by layer: 1 where nothing has changed.

    Without bias, from batches: HSIC_1 is averaged over the batches before the ratio is taken, so that the result does
    not depend on their size but for noise. Outputs ``[B, ...]`` of a module are taken as ``[B, d]``; both networks run
    in inference mode, and what is captured of one batch is held in memory.

    Args:
      base: the network before.
      tuned: the network after; layers may have another width, as a new head has.
      batches: dicts with ``inputs``, at least 4 examples in each; two or more that differ.
      at: module paths that are in both; ``None``: all modules. The outputs, ``(outputs)``, always come along.

    Returns:
      A ``Report`` with one row per layer in the order in which ``base`` runs them: layer, state (``both``, ``only in
      base`` or ``only in tuned``), ``CKA`` and ``drift``, which is ``1 - CKA``. Both are ``None`` where a network makes
      the same of all examples, or too few examples tell them apart, and of outputs that have no row per example; the
      metadata name these, and the layer that drifted most.

    Raises:
      SelectionError: ``at`` matches nothing, no layer is in both, or a Model cannot say what its modules make.
      DataError: there is no batch, one has no ``inputs`` or fewer than 4 examples, or a layer is not finite.
      TransferError: the weights of a Model are abstract.

    Source: Kornblith, Norouzi, Lee & Hinton, Similarity of neural network representations revisited, ICML 2019; Nguyen,
    Raghu & Kornblith, Do wide and deep networks learn the same things?, ICLR 2021.

    >>> import jax.numpy as jnp, transferjax as tj
    >>> network = lambda params, x: tj.interop.mark("stem", x * params["stem"]) @ params["head"]
    >>> base = tj.interop.pure(network, {"head": jnp.eye(2), "stem": jnp.ones(2)})
    >>> tuned = base._replace(params={"head": jnp.eye(2), "stem": jnp.array([1.0, 0.0])})
    >>> x = np.random.default_rng(0).normal(size=(32, 2))
    >>> [round(cka, 12) for cka in drift(base, base, [{"inputs": x}]).column("CKA")]
    [1.0, 1.0]
    >>> drift(base, tuned, [{"inputs": x}]).column("CKA")[0] < 0.9
    True
    """
    selector = as_selector("**" if at is None else at)
    found: dict[str, str] = {}
    sums: dict[str, Any] = {}
    ragged: dict[str, None] = {}
    examples = count = 0
    for batch, size in _checked(batches):
        found = found or _layers(base, tuned, batch["inputs"], selector)
        shared = tuple(name for name, state in found.items() if state == "both")
        sides = [_activations(m.capture, selector, shared, m.params, m.extra, batch["inputs"]) for m in (base, tuned)]
        for name in shared:
            if any(np.shape(side[name])[:1] != (size,) for side in sides):
                ragged[name] = None
                continue
            tables = [_table(side[name], f"'{name}' of {who}") for side, who in zip(sides, ("base", "tuned"))]
            sums[name] = sums.get(name, 0.0) + _hsic(*tables)
        examples, count = examples + size, count + 1
    if not count:
        raise DataError("drift() got no batch. Expected dicts with inputs; was an iterator read before?")
    rows = [(name, state, *_cells(None if name in ragged else sums.get(name))) for name, state in found.items()]
    return _report(rows, ragged, {"examples": examples, "batches": count})


def _checked(batches: Iterable[Batch]) -> Iterator[tuple[Batch, int]]:
    """The batches, each with its number of examples."""
    for batch in batches:
        if not isinstance(batch, Mapping) or not jax.tree.leaves(batch.get("inputs")):
            has = listing(sorted(batch)) if isinstance(batch, Mapping) else describe(batch)
            raise DataError(f"drift() got a batch with {has}; expected a dict with 'inputs'.")
        size = len(jax.tree.leaves(batch["inputs"])[0])
        if size < LEAST:
            raise DataError(
                f"drift() got a batch of {size} examples. Expected at least {LEAST}, as HSIC_1 divides by n (n - 3): "
                "make the batches larger, or leave the last one out with drop_remainder=True."
            )
        yield batch, size


def _layers(base: Model, tuned: Model, inputs: Any, at: Any) -> dict[str, str]:
    """``{layer: where it is}``, in the order in which the first network runs them."""
    for model, name in ((base, "base"), (tuned, "tuned")):
        if not isinstance(model, Model) or model.capture is None:
            raise SelectionError(
                f"drift(): {name} is {describe(model)} that cannot say what its modules make. Expected a Model from "
                "tj.interop.nnx, linen or pure."
            )
    try:
        report = compare(base, tuned, jax.tree.map(lambda x: x[:1], inputs), at=at)
    except (SelectionError, TransferError) as error:
        text = str(error).replace("compare()", "drift()").replace("model_a", "base").replace("model_b", "tuned")
        raise type(error)(text) from None
    where = {"only in a": "only in base", "only in b": "only in tuned"}
    return {row["layer"]: where.get(row["result"], "both") for row in report.to_dicts()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # one program for both, where they are one network
def _activations(capture: Any, at: Any, names: tuple[str, ...], params: Any, extra: Any, inputs: Any) -> Any:
    outputs, _, found = capture(params, extra, inputs, at)
    found = {**found, **{f"{OUTPUTS}/{path}" if path else OUTPUTS: leaf for path, leaf in flatten(outputs)[0]}}
    return {name: found[name] for name in names}


def _table(array: Any, name: str) -> np.ndarray:
    return as_features(np.asarray(array).reshape(len(array), -1), name)


def _hsic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """HSIC_1 of a batch: between both, and of each with itself; 0 of what is the same for all examples."""
    moving = [float((table != table[0]).any()) for table in (x, y)]
    scale = len(x) * (len(x) - 3)
    return linear_hsic(x, y, unbiased=True) * [moving[0] * moving[1], *moving] / scale


def _cells(sums: Any) -> tuple[float | None, float | None]:
    if sums is None or sums[1] <= 0 or sums[2] <= 0:
        return None, None
    cka = float(sums[0] / np.sqrt(sums[1] * sums[2]))
    return cka, 1 - cka


def _report(rows: list[tuple[Any, ...]], ragged: Mapping[str, None], facts: dict[str, Any]) -> Report:
    known = [row for row in rows if row[2] is not None]
    most = max(known, key=lambda row: row[3], default=None)
    facts |= {"kernel": "linear, HSIC_1 averaged over batches", "drifted most": None if most is None else most[0]}
    alike = [row[0] for row in rows if row[1] == "both" and row[2] is None and row[0] not in ragged]
    if alike:
        facts["alike for all examples"] = listing(alike)
    if ragged:
        facts["no row per example"] = listing(list(ragged))
    told = "no layer compared" if most is None else f"up to {most[3]:.3g} at '{most[0]}'"
    return Report(f"Drift: {told}", ("layer", "state", "CKA", "drift"), tuple(rows), facts)
