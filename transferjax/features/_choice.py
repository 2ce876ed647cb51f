"""Which layers, and which features of them, a read-out should see."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, SelectionError, describe, listing
from transferjax._report import Report
from transferjax.features._readout import Readout
from transferjax.features._ridge import ridge
from transferjax.features._table import FeatureTable
from transferjax.features._targets import Targets, as_targets, fold_numbers, quality, quality_name, standardisation
from transferjax.numerics._group_lasso import group_lasso

FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)
Fit = Callable[[Any, Any], Readout]


def head2toe(
    table: FeatureTable,
    labels: Any = None,
    *,
    layers: Sequence[str] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    strength: float = 0.05,
    readout: Fit = ridge,
    folds: int = 5,
    seed: int = 0,
) -> Readout:
    """A read-out of the most relevant features of all layers.

    All layers stand side by side; group lasso says how relevant each feature is; the best fraction is kept and read
    out. Which fraction, is decided on left-out folds, the relevance being that of each fold's training part; the last
    layer alone is a candidate too, so that nothing is lost where depth does not matter.

    Args:
      table: of :func:`extract`; what is larger than ``[N, d]`` is flattened.
      labels: as ``readout`` takes them; ``None``: those of the table.
      layers: names, in the order of the network; ``None``: all of the table, whose ``outputs`` come last.
      fractions: of all features, candidates.
      strength: of the group lasso, as a share of the one that keeps nothing.
      readout: ``(features, labels) -> Readout``: ``ridge``, ``logistic``, or with ``functools.partial`` more of it.
      folds: how many.
      seed: which.

    Returns:
      A :class:`Readout` on the layers side by side, ``table.concatenated(layers)``. Its report has one row per layer:
      how many of its features are kept, and its share of the relevance; the left-out quality of every candidate is in
      the metadata.

    Raises:
      SelectionError: a layer is not in the table.
      DataError: there are no labels, or they, a fraction or ``strength`` cannot be used.

    Source: Evci et al., "Head2Toe: Utilizing Intermediate Representations for Better Transfer Learning",
    arXiv:2201.03529.

    >>> x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    >>> table = FeatureTable({"early": x, "outputs": x[:, :1] * 0 + np.arange(40)[:, None] % 7}, np.arange(40))
    >>> found = head2toe(table, (x[:, 0] > 0).astype(int), fractions=(0.25,), folds=2)
    >>> found.params["keep"].tolist()
    [0]
    """
    names, widths, x, given, targets = side_by_side(table, labels, layers)
    _check(fractions, strength)
    counts = sorted({max(1, round(fraction * x.shape[1])) for fraction in fractions})
    last = np.arange(x.shape[1] - widths[-1], x.shape[1])
    numbers = fold_numbers(targets, folds, seed)

    def candidates(rows: np.ndarray) -> list[np.ndarray]:
        order = np.argsort(-_relevance(x[rows], targets.signs[rows], strength), kind="stable")
        return [*(np.sort(order[:count]) for count in counts), last]

    left_out = _left_out(x, given, targets, numbers, candidates, readout)
    best = int(np.argmax(left_out))
    relevance = _relevance(x, targets.signs, strength)
    keep = candidates(np.arange(len(x)))[best]
    labelled = [f"{count:,} features" for count in counts] + [f"all of '{names[-1]}'"]
    facts = {
        "kept": labelled[best],
        f"left-out {quality_name(targets)}": left_out[best],
        "candidates": ", ".join(f"{name} {value:.3f}" for name, value in zip(labelled, left_out)),
        "chosen by": f"{folds} stratified folds, seed {seed}",
    }
    report = _by_layer("Head2Toe", names, widths, keep, relevance, facts)
    return _kept(readout(x[:, keep], given), keep, report)


def best_layer(
    table: FeatureTable,
    labels: Any = None,
    *,
    layers: Sequence[str] | None = None,
    readout: Fit = ridge,
    folds: int = 5,
    seed: int = 0,
) -> Readout:
    """A read-out of the one layer that reads out best on left-out folds.

    Args:
      table: as for :func:`head2toe`.
      labels: as for :func:`head2toe`.
      layers: as for :func:`head2toe`.
      readout: as for :func:`head2toe`.
      folds: how many.
      seed: which.

    Returns:
      A :class:`Readout` on the layers side by side, ``table.concatenated(layers)``; its report has one row per layer.

    Raises:
      SelectionError: a layer is not in the table.
      DataError: there are no labels, or they cannot be used.

    >>> x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    >>> table = FeatureTable({"early": x, "outputs": x[:, 1:] * x[:, :1]}, np.arange(40))
    >>> best_layer(table, (x[:, 0] > 0).astype(int), folds=2).report.metadata["layer"]
    'early'
    """
    names, widths, x, given, targets = side_by_side(table, labels, layers)
    starts = np.cumsum([0, *widths])
    columns = [np.arange(first, first + width) for first, width in zip(starts, widths)]
    numbers = fold_numbers(targets, folds, seed)
    left_out = _left_out(x, given, targets, numbers, lambda rows: columns, readout)
    best = int(np.argmax(left_out))
    name = f"left-out {quality_name(targets)}"
    rows = [(layer, width, value, number == best) for number, (layer, width, value) in
            enumerate(zip(names, widths, left_out))]  # fmt: skip
    facts = {"layer": names[best], "chosen by": f"{folds} stratified folds, seed {seed}"}
    report = Report("Best layer", ("layer", "features", name, "chosen"), tuple(rows), facts)
    return _kept(readout(x[:, columns[best]], given), columns[best], report)


def side_by_side(
    table: FeatureTable, labels: Any, layers: Sequence[str] | None
) -> tuple[list[str], list[int], np.ndarray, np.ndarray, Targets]:
    """Names and widths of the layers, all features ``[N, D]``, the labels, and what they are."""
    if not isinstance(table, FeatureTable):
        raise DataError(f"expected a FeatureTable first, got {describe(table)}: write tj.features.extract(...).")
    names = [*(n for n in table.arrays if n != "outputs"), *(n for n in table.arrays if n == "outputs")]
    names = names if layers is None else list(layers)
    if not names:
        raise SelectionError("there is no layer to choose from. Expected at least one name of the table's features.")
    given = table.labels if labels is None else labels
    if given is None:
        raise DataError("the table has no labels. Expected batches with labels, or labels as the second argument.")
    x = table.concatenated(names)
    widths = [int(np.prod(table[name].shape[1:])) for name in names]
    given = np.asarray(given)
    if len(given) != len(x):
        raise DataError(f"labels have {len(given)} examples and the table {len(x)}. Expected one label per example.")
    return names, widths, x, given, as_targets(given, None)


def _check(fractions: Sequence[float], strength: float) -> None:
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise DataError(f"fractions are {listing([str(f) for f in fractions])}; expected numbers above 0, at most 1.")
    if not 0 < strength < 1:
        raise DataError(f"strength is {strength}; expected a number between 0 and 1, where nothing would be kept.")


def _relevance(x: np.ndarray, wanted: np.ndarray, strength: float) -> np.ndarray:
    ones = np.ones(len(x))
    shift, scale = standardisation(x, ones, True)
    return group_lasso((x - shift) * scale, wanted - wanted.mean(axis=0), strength)


def _left_out(
    x: np.ndarray, labels: np.ndarray, targets: Targets, numbers: np.ndarray, candidates: Any, readout: Fit
) -> list[float]:
    """The quality of each candidate's outputs for examples that its fit did not see."""
    outputs: list[np.ndarray] = []
    for fold in np.unique(numbers):
        here = numbers == fold
        for place, columns in enumerate(candidates(np.flatnonzero(~here))):
            found = readout(x[~here][:, columns], labels[~here])
            values = np.asarray(found.predict(found.params, x[here][:, columns]))
            if len(outputs) <= place:
                outputs.append(np.full((len(x), *values.shape[1:]), -np.inf))
            outputs[place][here] = values
    ones = np.ones(len(x))
    reduced = [values[:, targets.columns] if targets.codes is not None else values for values in outputs]
    return [quality(targets, values.reshape(len(x), -1), ones) for values in reduced]


def _by_layer(
    title: str, names: Sequence[str], widths: Sequence[int], keep: np.ndarray, relevance: np.ndarray, facts: Any
) -> Report:
    total, first, rows = max(float(relevance.sum()), 1e-300), 0, []
    for name, width in zip(names, widths):
        inside = (keep >= first) & (keep < first + width)
        share = float(relevance[first : first + width].sum()) / total
        rows.append((name, width, int(inside.sum()), share))
        first += width
    return Report(title, ("layer", "features", "kept", "relevance"), tuple(rows), facts)


def _kept(found: Readout, keep: np.ndarray, report: Report) -> Readout:
    params = {"keep": jnp.asarray(keep, jnp.int32), "readout": found.params}
    return Readout(functools.partial(_predict, found.predict), params, report)


@functools.partial(jax.jit, static_argnums=0)
def _predict(predict: Any, params: Any, features: Any) -> Any:
    return predict(params["readout"], jnp.asarray(features)[:, params["keep"]])
