"""How far apart the classes of a target lie in the features of a source."""

from __future__ import annotations

from typing import Any

import numpy as np

from transferjax._errors import DataError
from transferjax.numerics._covariance import (
    block_rows,
    check_varies,
    column_mean,
    fourth_moment,
    gram,
    group_coordinates,
    group_sums,
    row_chunks,
    scatter,
    shrinkage,
    spectrum,
)
from transferjax.numerics._mixture import principal_scores
from transferjax.numerics._tables import Classes, as_classes, as_features


def _inputs(features: Any, labels: Any) -> tuple[np.ndarray, Classes]:
    table = as_features(features)
    classes = as_classes(labels, len(table))
    check_varies(table)
    return table, classes


def h_score(features: Any, labels: Any) -> float:
    """H-score: ``tr(pinv(cov(f)) cov(E[f | y]))``, the share of the features' variance that the classes explain.

    Between 0 and the number of classes less 1; it is at that bound wherever there are more columns than examples (use
    :func:`h_score_regularized` there).

    Args:
      features: numbers ``[N, d]``.
      labels: integers ``[N]``.

    Raises:
      DataError: features are not finite or constant, labels are of another number, or one class only.

    Source: Bao, Li, Huang, Zhang, Zheng, Zamir & Guibas, An information-theoretic approach to transferability in task
    transfer learning, ICIP 2019.

    >>> round(h_score([[0.0, 1.0], [0.0, -1.0], [2.0, 1.0], [2.0, -1.0]], [0, 0, 1, 1]), 12)
    1.0
    """
    table, classes = _inputs(features, labels)
    found = spectrum(table, centre=True)
    parts = group_coordinates(found, table, classes.codes, len(classes.values))
    return float((np.square(parts) / classes.counts).sum())


def h_score_regularized(features: Any, labels: Any) -> float:
    """The H-score with the Ledoit-Wolf covariance: ``tr(inv(cov_a(f)) (1 - a) cov(E[f | y]))``.

    As in the authors' code, ``cov_a`` divides by ``N`` and ``cov(E[f | y])`` by ``N - 1``.

    Args:
      features: numbers ``[N, d]``.
      labels: integers ``[N]``.

    Raises:
      DataError: features are not finite or constant, labels are of another number, or one class only.

    Source: Ibrahim, Ponomareva & Mazumder, Newer is not always better: rethinking transferability metrics, their
    peculiarities, stability and performance, 2021.

    >>> features = [[0.0, 1.0], [0.5, -1.0], [0.2, 0.0], [3.0, 1.0], [3.5, -1.0], [3.1, 0.0]]
    >>> round(h_score_regularized(features, [0, 0, 0, 1, 1, 1]), 4)
    0.7516
    """
    table, classes = _inputs(features, labels)
    count, width = table.shape
    found = spectrum(table, centre=True)
    assert found.mean is not None
    values = found.values / count
    share = shrinkage(values, fourth_moment(table, found.mean), count, width)
    parts = group_coordinates(found, table, classes.codes, len(classes.values))
    explained = (np.square(parts) / classes.counts).sum(axis=1)
    between = (1 - share) * explained * found.values / (count - 1)
    return float((between / ((1 - share) * values + share * values.sum() / width)).sum())


def transrate(features: Any, labels: Any, *, eps: float = 1e-4) -> float:
    """TransRate: the coding rate of the features, less the mean of their classes' coding rates.

    ``R(Z) = 1/2 log det(I + Z'Z / (n eps))`` of features whose mean over all examples is taken off; the classes' rates
    are averaged over classes, whatever their sizes.

    Args:
      features: numbers ``[N, d]``.
      labels: integers ``[N]``.
      eps: the distortion.

    Raises:
      DataError: features are not finite or constant, labels are of another number, or one class only.

    Source: Huang, Huang, Rong, Yang & Wei, Frustratingly easy transferability estimation, ICML 2022.

    >>> round(transrate([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0, 0, 1, 1]), 3)
    3.912
    """
    table, classes = _inputs(features, labels)
    mean = column_mean(table)
    order = np.argsort(classes.codes, kind="stable")
    groups = np.split(order, np.cumsum(classes.counts)[:-1])
    rates = [_coding_rate(table[rows], mean, eps) for rows in groups]
    return float(_coding_rate(table, mean, eps) - np.mean(rates))


def _coding_rate(features: np.ndarray, mean: np.ndarray, eps: float) -> float:
    count, width = features.shape
    moments = gram(features, mean) if count < width else scatter(features, mean)
    moments /= count * eps
    moments.flat[:: len(moments) + 1] += 1.0
    return 0.5 * np.linalg.slogdet(moments)[1]


def gbc(features: Any, labels: Any, *, components: int = 64, floor: float = 1e-4) -> float:
    """GBC: minus the summed overlap of the classes, ``-sum over i != j of exp(-Bhattacharyya distance)``.

    The classes are Gaussians with diagonal covariance on the first principal components; every pair counts twice.

    Args:
      features: numbers ``[N, d]``.
      labels: integers ``[N]``.
      components: principal components to keep.
      floor: the least variance of a class.

    Raises:
      DataError: features are not finite or constant, labels are of another number, one class only, or a class of one
        example.

    Source: Pándy, Agostinelli, Uijlings, Ferrari & Mensink, Transferability estimation using Bhattacharyya class
    separability, CVPR 2022.

    >>> gbc([[0.0, 1.0], [0.1, -1.0], [9.0, 1.0], [9.1, -1.0]], [0, 0, 1, 1]) > -1e-9
    True
    """
    table, classes = _inputs(features, labels)
    if classes.counts.min() < 2:
        raise DataError(
            f"class {classes.values[classes.counts.argmin()]} has one example. gbc needs two of every class, for a "
            "variance: leave the class out."
        )
    scores = principal_scores(table, count=components)[0]
    sums = group_sums(scores, classes.codes, len(classes.values))
    means = sums / classes.counts[:, None]
    squares = np.zeros_like(means)
    for rows, part in row_chunks(scores):
        squares += group_sums(np.square(part - means[classes.codes[rows]]), classes.codes[rows], len(means))
    variances = np.maximum(squares / classes.counts[:, None], floor)
    total = 0.0
    for mean, variance in zip(means, variances):
        between = (variance + variances) / 2
        distance = (np.square(mean - means) / between).sum(axis=1) / 8
        distance += 0.5 * (np.log(between) - 0.5 * np.log(variance) - 0.5 * np.log(variances)).sum(axis=1)
        total += np.exp(-distance).sum() - 1.0
    return float(-total)


def parc(features: Any, labels: Any) -> float:
    """PARC: whether examples of different classes are farther apart: the rank correlation of two distance matrices.

    Spearman's correlation of the upper triangles of ``1 - Pearson`` between the examples' features and between their
    one-hot labels. All pairs are sorted, ``N (N - 1) / 2`` numbers: give it a sample of at most some thousand examples.

    Args:
      features: numbers ``[N, d]``.
      labels: integers ``[N]``.

    Raises:
      DataError: features are not finite, or constant over the examples or within one, labels are of another number,
        one class only, or no class has two examples.

    Source: Bolya, Mittapalli & Hoffman, Scalable diverse model selection for accessible transfer learning, NeurIPS
    2021.

    >>> round(parc([[0.0, 1.0, 2.0], [0.1, 1.0, 2.0], [2.0, 1.0, 0.1], [2.0, 1.0, 0.0]], [0, 0, 1, 1]), 4)
    0.8528
    """
    table, classes = _inputs(features, labels)
    if classes.counts.max() < 2:
        raise DataError("every class has one example. parc needs two of some class, to compare pairs with pairs.")
    low, high = table.min(axis=1), table.max(axis=1)
    if (low == high).any():
        raise DataError(
            f"the features of example {np.flatnonzero(low == high)[0]} are all the same number, which has no "
            "correlation. parc needs two columns, and rows that vary."
        )
    centred = table.mean(axis=1, dtype=np.float64)
    norms = np.empty(len(table))
    step = block_rows(table.shape[1])
    block = lambda start: table[start : start + step].astype(np.float64) - centred[start : start + step, None]
    for start in range(0, len(table), step):
        norms[start : start + step] = np.sqrt(np.square(block(start)).sum(axis=1))
    pairs, differ = [], []
    for start in range(0, len(table), step):
        first = block(start) / norms[start : start + step, None]
        for other in range(start, len(table), step):
            found = 1 - first @ (block(other) / norms[other : other + step, None]).T
            rows, columns = np.indices(found.shape, sparse=True)
            upper = rows + start < columns + other
            pairs.append(found[upper])
            codes = classes.codes
            differ.append((codes[start : start + step, None] != codes[other : other + step])[upper])
    return _rank_correlation(np.concatenate(pairs), np.concatenate(differ))


def _rank_correlation(values: np.ndarray, marks: np.ndarray) -> float:
    """Spearman's correlation with booleans: two distances are all that one-hot labels have."""
    order = np.argsort(values)
    ordered = values[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    lengths = np.diff(np.append(starts, len(values)))
    middle = starts + (lengths - 1) / 2 - (len(values) - 1) / 2  # ties share the mean of their ranks
    ranks = np.repeat(middle, lengths)
    share = marks.mean()
    spread = np.sqrt((lengths * np.square(middle)).sum() * len(values) * share * (1 - share))
    return float(ranks[marks[order]].sum() / spread) if spread else 0.0


def sfda(features: Any, labels: Any) -> float:
    """SFDA: the mean probability of the true class by a regularised Fisher discriminant, after its classes are mixed.

    A discriminant with the within-class scatter shrunk by ``exp(-5 a)`` (``a`` its largest eigenvalue, by at least
    1e-10) gives every example a probability of its class; ConfMix moves each towards the mean of the other classes by
    what it lacks; the score is the mean probability of a second discriminant on those. Between 0 and 1. The authors'
    code bounds ``a`` by three power iterations; here it is exact.

    Args:
      features: numbers ``[N, d]``.
      labels: integers ``[N]``.

    Raises:
      DataError: features are not finite or constant (also within every class), labels are of another number, or one
        class only.

    Source: Shao, Zhao, Ge, Zhang, Yang, Wang, Shan & Luo, Not all models are equal: predicting model transferability in
    a self-challenging Fisher space, ECCV 2022.

    >>> features = [[0.0, 1.0], [0.5, -1.0], [0.2, 0.0], [3.0, 1.0], [3.5, -1.0], [3.1, 0.0]]
    >>> round(sfda(features, [0, 1, 0, 1, 0, 1]), 4)
    0.5185
    """
    table, classes = _inputs(features, labels)
    codes, counts = classes.codes, classes.counts
    sums = group_sums(table, codes, len(counts))
    means = sums / counts[:, None]
    others = (means.sum(axis=0) - means) / (len(counts) - 1)
    priors = counts / len(table)
    within = np.zeros((table.shape[1],) * 2)
    for rows, part in row_chunks(table):
        part = part - means[codes[rows]]
        within += part.T @ part
    within /= len(table)
    share = max(float(np.exp(-5 * np.linalg.eigvalsh(within)[-1])), 1e-10)
    slopes, offsets = _discriminant(means, within, priors, share)

    def mixed(rows: slice, part: np.ndarray) -> np.ndarray:
        sure = _softmax(_softmax(part @ slopes + offsets))[np.arange(len(part)), codes[rows], None]
        return sure * part + (1 - sure) * others[codes[rows]]

    sums = np.zeros_like(means)
    for rows, part in row_chunks(table):
        sums += group_sums(mixed(rows, part), codes[rows], len(means))
    means = sums / counts[:, None]
    within = np.zeros_like(within)
    for rows, part in row_chunks(table):
        part = mixed(rows, part) - means[codes[rows]]
        within += part.T @ part
    second = _discriminant(means, within / len(table), priors, share)
    total = 0.0
    for rows, part in row_chunks(table):
        found = _softmax(mixed(rows, part) @ second[0] + second[1])
        total += found[np.arange(len(part)), codes[rows]].sum()
    return float(total / len(table))


def _discriminant(means: np.ndarray, within: np.ndarray, priors: np.ndarray, share: float) -> Any:
    """``(slopes [d, C], offsets [C])`` of a linear discriminant whose scatter is shrunk."""
    width = len(within)
    scale = np.trace(within) / width
    if not scale > 1e-30 * np.square(means).mean():
        raise DataError(
            "every class has the same features in all of its examples. sfda needs features that vary within a class; "
            "leave copies of examples out."
        )
    shrunk = (1 - share) * within
    shrunk.flat[:: width + 1] += share * scale
    slopes = np.linalg.solve(shrunk, means.T)
    return slopes, np.log(priors) - 0.5 * (means * slopes.T).sum(axis=1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    found = np.exp(logits - logits.max(axis=1, keepdims=True))
    return found / found.sum(axis=1, keepdims=True)
