"""Read-outs that compare with the training examples: their nearest ones, or the mean of each class."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, is_whole
from transferjax._report import Report
from transferjax.features._readout import Readout
from transferjax.features._targets import (
    CLASSES,
    LABELS,
    TARGETS,
    Targets,
    as_training,
    by_classes,
    linear,
    linear_params,
    path_report,
    quality,
    quality_name,
    standardisation,
    standardised,
    to_float32,
    widen,
)

ENTRIES = 2**24


def knn(
    features: Any,
    labels: Any,
    *,
    k: Any = 20,
    temperature: float | None = 0.07,
    weights: Any = None,
    num_classes: int | None = None,
    standardise: bool = False,
) -> Readout:
    """The nearest neighbours by cosine, their votes weighted by ``exp(cos / temperature)``.

    The outputs are the shares of the votes of each class; for targets their weighted mean; for labels the share of
    yes minus that of no. Similarities are computed for blocks of examples, so memory stays bounded.

    Args:
      features: ``[N, d]``.
      labels: classes, integers ``[N]``; several labels, booleans or zeros and ones ``[N, K]``; targets, floats
        ``[N]`` or ``[N, K]``.
      k: how many neighbours, or a sequence: the first of those with the best accuracy (R2 for targets) by exact
        leave-one-out is taken.
      temperature: of the weights; ``None``: every vote counts the same.
      weights: ``[N]``, a factor of each example's vote.
      num_classes: columns of the outputs for classes; ``None``: the largest label plus one.
      standardise: give every column mean 0 and variance 1 first.

    Returns:
      A :class:`Readout`.

    Raises:
      DataError: an argument cannot be used, or there are fewer examples than neighbours.

    Source: Wu et al., Unsupervised feature learning via non-parametric instance discrimination, CVPR 2018.

    >>> x = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    >>> readout = knn(x, np.array([0, 0, 1]), k=2, temperature=None)
    >>> readout.predict(readout.params, x).tolist()
    [[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]
    """
    table, targets, counts = as_training(features, labels, weights, num_classes, name="knn")
    tried = list(np.atleast_1d(np.asarray(k, dtype=object)))
    most = len(table) - (len(tried) > 1)
    if not tried or not all(is_whole(number) and number <= most for number in tried):
        raise DataError(f"k is {k!r}; expected whole numbers from 1 to {most}, there being {len(table)} examples.")
    if temperature is not None and not temperature > 0:
        raise DataError(f"temperature is {temperature!r}; expected a number above 0, or None for plain votes.")
    shift, scale = standardisation(table, counts, standardise, centre=False)
    answers = targets.matrix if targets.kind == CLASSES else targets.signs
    params = to_float32({"shift": shift, "scale": scale, "answers": widen(targets, answers, 0.0), "weights": counts})
    params["index"] = _unit(standardised(params, table))
    columns, rows, chosen, how = ("k",), [(int(number),) for number in tried], 0, "the only one"
    if len(tried) > 1:
        rows = _left_out(params, targets, answers, counts, [row[0] for row in rows], temperature)
        columns, how = ("k", f"left-out {quality_name(targets)}"), "exact leave-one-out"
        chosen = int(np.argmax([row[1] for row in rows]))
    report = path_report("Nearest neighbours", columns, rows, chosen, how, examples=len(table))
    return Readout(functools.partial(_predict, k=rows[chosen][0], temperature=temperature), params, report)


def _unit(x: Any) -> Any:
    """Rows of length one; rows of zeros stay."""
    squares = (x * x).sum(-1, keepdims=True)
    return x * jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _rows_at_once(params: Any) -> int:
    return max(1, min(1024, ENTRIES // len(params["index"])))


@functools.partial(jax.jit, static_argnames=("k", "temperature"))
def _predict(params: Any, features: Any, *, k: int, temperature: float | None) -> Any:
    def one(query):
        similar, places = jax.lax.top_k(jnp.matmul(params["index"], query, precision="highest"), k)
        votes = params["weights"][places]
        if temperature is not None:
            votes = votes * jnp.exp((similar - similar[0]) / temperature)
        return jnp.matmul(votes, params["answers"][places], precision="highest") / votes.sum()

    return jax.lax.map(one, _unit(standardised(params, features)), batch_size=_rows_at_once(params))


@functools.partial(jax.jit, static_argnames="k")
def _others(params: Any, *, k: int) -> Any:
    """The similarities and places of the nearest other examples of each example, ``[N, k]`` both."""

    def one(query_and_row):
        query, row = query_and_row
        similar = jnp.matmul(params["index"], query, precision="highest")
        return jax.lax.top_k(similar.at[row].set(-jnp.inf), k)

    index = params["index"]
    return jax.lax.map(one, (index, jnp.arange(len(index))), batch_size=_rows_at_once(params))


def _left_out(
    params: Any, targets: Targets, answers: np.ndarray, counts: np.ndarray, tried: list[int], temperature: float | None
) -> list[tuple[int, float]]:
    """How well each number of neighbours does on examples that are no neighbours of themselves."""
    similar, places = (np.asarray(part) for part in _others(params, k=max(tried)))
    votes = counts[places]
    if temperature is not None:
        votes = votes * np.exp((similar - similar[:, :1]).astype(np.float64) / temperature)
    sums, total, rows = np.zeros((len(places), answers.shape[1])), np.zeros(len(places)), {}
    for number in range(max(tried)):
        sums += votes[:, number, None] * answers[places[:, number]]
        total += votes[:, number]
        if number + 1 in tried:
            rows[number + 1] = quality(targets, sums / total[:, None], counts)
    return [(number, rows[number]) for number in tried]


def nearest_mean(
    features: Any, labels: Any, *, weights: Any = None, num_classes: int | None = None, standardise: bool = False
) -> Readout:
    """The class whose mean is nearest.

    The outputs are ``x @ mean - .5 * |mean|**2``, which differ from half the negative squared distance by the same
    for all classes; for several labels, that of yes minus that of no.

    Args:
      features: ``[N, d]``.
      labels: classes, integers ``[N]``, or several labels, booleans or zeros and ones ``[N, K]``.
      weights: ``[N]``, how often each example counts; ``None``: once.
      num_classes: columns of the outputs for classes; ``None``: the largest label plus one.
      standardise: give every column mean 0 and variance 1 first.

    Returns:
      A :class:`Readout`.

    Raises:
      DataError: an argument cannot be used, or the labels are targets.

    Source: Mensink et al., Distance-based image classification, TPAMI 35 (2013).

    >>> x = np.array([[0.0], [1.0], [4.0]])
    >>> readout = nearest_mean(x, np.array([0, 0, 1]))
    >>> readout.predict(readout.params, np.array([[2.0], [3.0]])).argmax(-1).tolist()
    [0, 1]
    """
    takes, instead = (CLASSES, LABELS), f"For {TARGETS} write knn() or ridge()."
    training = as_training(features, labels, weights, num_classes, name="nearest_mean", takes=takes, instead=instead)
    table, targets, counts = training
    shift, scale = standardisation(table, counts, standardise)
    x = (table - shift) * scale

    def fit(codes: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        means = class_means(x, codes, counts, number)
        return means.T, -0.5 * (means**2).sum(axis=1)

    params = linear_params(targets, shift, scale, *by_classes(targets, fit))
    rows = [(int(column), int(total)) for column, total in zip(targets.columns, targets.matrix.sum(axis=0))]
    report = Report("Nearest mean", ("column", "examples"), tuple(rows), {"examples": len(table)})
    return Readout(linear, params, report)


def class_means(x: np.ndarray, codes: np.ndarray, weights: np.ndarray, number: int) -> np.ndarray:
    """The weighted mean of each class, ``[K, d]``.

    >>> class_means(np.array([[0.0], [1.0], [4.0]]), np.array([0, 0, 1]), np.ones(3), 2).tolist()
    [[0.5], [4.0]]
    """
    shares = np.zeros((number, len(x)))
    shares[codes, np.arange(len(x))] = weights
    return (shares / shares.sum(axis=1, keepdims=True)) @ x
