"""How alike two sets of features are, and how well neighbours predict a class."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from transferjax._errors import DataError, describe, is_whole, listing
from transferjax.numerics._cka import centred, linear_hsic, rbf_gram, squared_distances
from transferjax.numerics._covariance import block_rows, check_varies, column_mean, gram, row_chunks
from transferjax.numerics._tables import as_classes, as_features, check_equal


def _paired(x: Any, y: Any, unbiased: bool) -> tuple[np.ndarray, np.ndarray]:
    first, second = as_features(x, "x", least=2), as_features(y, "y", least=2)
    check_equal("y", len(second), "x", len(first))
    _check_unbiased(len(first), unbiased)
    check_varies(first, "x")
    check_varies(second, "y")
    return first, second


def _check_unbiased(count: int, unbiased: bool) -> None:
    if unbiased and count < 4:
        raise DataError(f"the unbiased CKA got {count} examples. Expected at least 4: HSIC_1 divides by n (n - 3).")


def _ratio(values: Any) -> float:
    cross, own, other = values
    if own <= 0 or other <= 0:
        raise DataError(
            "the unbiased HSIC of one side with itself is not above 0: too few examples tell it from noise. Expected "
            "more of them, or write unbiased=False."
        )
    return float(cross / np.sqrt(own * other))


def linear_cka(x: Any, y: Any, *, unbiased: bool = False) -> float:
    """Linear CKA: ``||Yc'Xc||_F^2 / (||Xc'Xc||_F ||Yc'Yc||_F)``; 1 for features equal up to rotation and scale.

    Args:
      x: numbers ``[N, d]``.
      y: numbers ``[N, e]``, of the same examples.
      unbiased: with HSIC_1 in place of HSIC; its mean does not depend on ``N``, and it may fall below 0.

    Raises:
      DataError: features are not finite or constant, or of different numbers of examples; unbiased of fewer than 4.

    Source: Kornblith, Norouzi, Lee & Hinton, Similarity of neural network representations revisited, ICML 2019; Nguyen,
    Raghu & Kornblith, Do wide and deep networks learn the same things?, ICLR 2021.

    >>> x = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 5.0]])
    >>> round(linear_cka(x, 3 * x[:, ::-1]), 12)
    1.0
    """
    return _ratio(linear_hsic(*_paired(x, y, unbiased), unbiased))


def rbf_cka(x: Any, y: Any, threshold: float = 1.0, *, unbiased: bool = False) -> float:
    """CKA with Gaussian kernels, ``exp(-d^2 / (2 bandwidth^2))``, ``bandwidth^2 = threshold^2 * median d^2``.

    The median is over all ``N^2`` pairs, as in the authors' code. Two ``[N, N]`` matrices are made.

    Args:
      x: numbers ``[N, d]``.
      y: numbers ``[N, e]``, of the same examples.
      threshold: the bandwidth, as a multiple of the square root of the median squared distance.
      unbiased: with HSIC_1 in place of HSIC.

    Raises:
      DataError: features are not finite or constant, or of different numbers of examples; unbiased of fewer than 4.

    Source: Kornblith, Norouzi, Lee & Hinton, Similarity of neural network representations revisited, ICML 2019.

    >>> x = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 5.0]])
    >>> round(rbf_cka(x, 3 * x[:, ::-1]), 12)
    1.0
    """
    if not threshold > 0:
        raise DataError(f"threshold is {threshold}; expected a number above 0.")
    first, second = _paired(x, y, unbiased)
    kernels = [centred(rbf_gram(table, threshold), unbiased) for table in (first, second)]
    return _ratio([np.vdot(kernels[a], kernels[b]) for a, b in ((0, 1), (0, 0), (1, 1))])


def cka_matrix(xs: Any, ys: Any = None, *, batch: int = 1024) -> np.ndarray:
    """Linear CKA of every layer of one network with every layer of another, from batches, without bias.

    HSIC_1 of every pair of layers is averaged over batches before the ratio is taken, so that the result does not
    depend on the size of the batches but for noise, and examples may come one batch at a time.

    Args:
      xs: ``{layer: [N, d]}``; or, without ``ys``, an iterable of batches ``(xs, ys)`` of two such mappings.
      ys: ``{layer: [N, e]}``, of the same examples; the widths may differ.
      batch: mappings are cut into equal parts of at most this many examples.

    Returns:
      float64 ``[layers of xs, layers of ys]``, in the order of the mappings.

    Raises:
      DataError: there is no layer or batch, layers differ in their examples or between batches, or a batch has fewer
        than 4 examples.

    Source: Nguyen, Raghu & Kornblith, Do wide and deep networks learn the same things?, ICLR 2021.

    >>> x = np.random.default_rng(0).normal(size=(8, 3))
    >>> cka_matrix({"a": x}, {"b": 2 * x, "c": -x}).round(12).tolist()
    [[1.0, 1.0]]
    """
    cross = own = other = None
    names: Any = None
    for number, (first, second) in enumerate(_batches(xs, ys, batch)):
        found = (list(first), list(second))
        if names is not None and found != names:
            raise DataError(
                f"batch {number} has the layers {listing(found[0] + found[1])}; the first had "
                f"{listing(names[0] + names[1])}. Expected the same layers in every batch, in one order."
            )
        names = found
        left, right = _kernels(first), _kernels(second, len(next(iter(first.values()))))
        parts = left @ right.T, np.square(left).sum(axis=1), np.square(right).sum(axis=1)
        cross, own, other = parts if cross is None else (cross + parts[0], own + parts[1], other + parts[2])
    if cross is None or own is None or other is None:
        raise DataError("cka_matrix got no batch. Expected an iterable of pairs (xs, ys); was an iterator read before?")
    return cross / np.sqrt(own[:, None] * other)


def _batches(xs: Any, ys: Any, batch: int) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    if ys is None and isinstance(xs, Iterable) and not isinstance(xs, Mapping):
        yield from xs
        return
    if not isinstance(xs, Mapping) or not isinstance(ys, Mapping) or not xs or not ys:
        raise DataError(
            f"cka_matrix got {describe(xs)} and {describe(ys)}; expected two mappings {{layer: [N, d]}} with at least "
            "one layer each, or one iterable of pairs of them."
        )
    if not is_whole(batch, 4):
        raise DataError(f"batch is {batch}; expected a whole number of at least 4 examples.")
    count = len(next(iter(xs.values())))
    for name, array in [*xs.items(), *ys.items()]:
        check_equal(f"'{name}'", len(array), "the first layer", count)
    edges = np.linspace(0, count, -(-count // batch) + 1).astype(int)
    for begin, end in itertools.pairwise(edges):
        yield tuple({name: array[begin:end] for name, array in side.items()} for side in (xs, ys))  # type: ignore


def _kernels(layers: Mapping[str, Any], count: int | None = None) -> np.ndarray:
    """The U-centred Gram matrices of one batch, ``[layers, n * n]``, such that their products are HSIC_1."""
    found = []
    for name, array in layers.items():
        table = as_features(array, f"'{name}'")
        count = len(table) if count is None else count
        check_equal(f"'{name}'", len(table), "the first layer", count)
        _check_unbiased(len(table), True)
        check_varies(table, f"'{name}'")
        kernel = centred(gram(table, column_mean(table)), True)
        found.append(kernel.ravel() / np.sqrt(count * (count - 3)))
    return np.stack(found)


def _two_sets(x: Any, y: Any, least: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = as_features(x, "x", least=least), as_features(y, "y", least=least)
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"x are {describe(first)} and y {describe(second)}; expected the same columns of both, from one network."
        )
    return first, second


def mmd(x: Any, y: Any) -> float:
    """Minus the squared maximum mean discrepancy of two sets of examples: 0 for one distribution, lower the farther.

    The kernel is the sum of five Gaussians, ``exp(-d^2 / (2 sigma^2))``, ``sigma^2 = 2^k * mean d^2`` over all pairs of
    both sets, ``k = -3 .. 1``; pairs of an example with itself are left out, so that it may come out above 0.

    Args:
      x: numbers ``[N, d]``.
      y: numbers ``[M, d]``.

    Raises:
      DataError: features are not finite, have different columns, or all examples are alike; fewer than two of one set.

    Source: Gretton, Borgwardt, Rasch, Schölkopf & Smola, A kernel two-sample test, 2012; Long, Cao, Wang & Jordan,
    Learning transferable features with deep adaptation networks, ICML 2015.

    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> mmd(x, x + 1) > mmd(x, x + 5)
    True
    """
    first, second = _two_sets(x, y, 2)
    count, other = len(first), len(second)
    total = count + other
    mean = (first.sum(axis=0, dtype=np.float64) + second.sum(axis=0, dtype=np.float64)) / total
    norm = sum(np.square(part).sum() for table in (first, second) for _, part in row_chunks(table, mean))
    if not norm > 1e-24 * total * np.square(mean).sum():
        raise DataError("x and y are constant: all their examples are alike. mmd needs features that vary.")
    scale = 2 * norm / total  # the mean squared distance over all pairs of both sets

    def kernels(a: np.ndarray, b: np.ndarray) -> float:
        step, found = block_rows(a.shape[1]), 0.0
        for start, begin in itertools.product(range(0, len(a), step), range(0, len(b), step)):
            distances = squared_distances(a[start : start + step], b[begin : begin + step], mean) / scale
            found += sum(float(np.exp(distances * -(2.0 ** -(k + 1))).sum()) for k in range(-3, 2))
        return found

    within = (kernels(first, first) - 5 * count) / (count * (count - 1))
    within += (kernels(second, second) - 5 * other) / (other * (other - 1))
    return float(2 * kernels(first, second) / (count * other) - within)


def a_distance(x: Any, y: Any, *, penalty: float = 1e-3) -> float:
    """Minus the proxy A-distance of two sets of examples: 0 where no line tells them apart, -2 where one always does.

    ``2 (1 - 2 error)`` with the leave-one-out error of a linear ridge classifier of the set an example is from, in
    which both sets weigh the same; in closed form, so that nothing is drawn.

    Args:
      x: numbers ``[N, d]``.
      y: numbers ``[M, d]``.
      penalty: of the classifier, as a share of the mean variance of a column.

    Raises:
      DataError: features are not finite, have different columns, or all examples are alike; fewer than two of one set.

    Source: Ben-David, Blitzer, Crammer & Pereira, Analysis of representations for domain adaptation, NeurIPS 2006.

    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> a_distance(x, x + 9), a_distance(x, x) == 0.0
    (-2.0, True)
    """
    tables = _two_sets(x, y, 2)
    width = tables[0].shape[1]
    means = [column_mean(table) for table in tables]
    centre = (means[0] + means[1]) / 2
    moments, target = np.zeros((width, width)), (means[0] - means[1]) / 2
    for table in tables:
        for _, part in row_chunks(table, centre):
            moments += part.T @ part / (2 * len(table))
    scale = np.trace(moments) / width
    if not scale > 1e-24 * np.square(centre).mean():
        raise DataError("x and y are constant: all their examples are alike. a_distance needs features that vary.")
    moments.flat[:: width + 1] += penalty * scale
    factor = np.linalg.inv(np.linalg.cholesky(moments))
    slope = factor.T @ (factor @ target)
    errors = []
    for table, sign in zip(tables, (1.0, -1.0)):
        wrong = 0.0
        for _, part in row_chunks(table, centre):
            leverage = (1 + np.square(part @ factor.T).sum(axis=1)) / (2 * len(table))
            left_out = sign - (sign - part @ slope) / np.maximum(1 - leverage, 1e-12)
            wrong += np.where(sign * left_out > 0, 0.0, 1.0).sum()
        errors.append(wrong / len(table))
    return float(min(0.0, -2 * (1 - sum(errors))))


def knn_accuracy(features: Any, labels: Any, *, k: int = 20, temperature: float = 0.07) -> float:
    """The leave-one-out accuracy of the ``k`` nearest neighbours by cosine, votes weighted by ``exp(cos / 0.07)``.

    Classes with equal votes share the credit. All pairs are compared, some at a time.

    Args:
      features: numbers ``[N, d]``.
      labels: integers ``[N]``.
      k: neighbours; all others where there are fewer.
      temperature: of the votes' weights.

    Raises:
      DataError: features are not finite, constant, or all zero in an example; labels are of another number; ``k`` or
        the temperature is not above 0.

    Source: Wu, Xiong, Yu & Lin, Unsupervised feature learning via non-parametric instance discrimination, CVPR 2018.

    >>> knn_accuracy([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]], [0, 0, 1, 1], k=1)
    1.0
    """
    table = as_features(features)
    classes = as_classes(labels, len(table))
    check_varies(table)
    if not is_whole(k) or not temperature > 0:
        raise DataError(
            f"k is {k} and temperature {temperature}; expected a whole number of at least 1 and a number above 0."
        )
    norms = np.concatenate([np.sqrt(np.square(part).sum(axis=1)) for _, part in row_chunks(table)])
    if not norms.all():
        raise DataError(f"the features of example {np.flatnonzero(norms == 0)[0]} are all zero, which has no cosine.")
    kept, found = min(k, len(table) - 1), 0.0
    step = block_rows(table.shape[1])
    unit = lambda rows: table[rows].astype(np.float64) / norms[rows, None]
    for start in range(0, len(table), step):
        own = slice(start, min(start + step, len(table)))
        first = unit(own)
        best, names = np.full((len(first), kept), -np.inf), np.zeros((len(first), kept), np.int64)
        for other in range(0, len(table), step):
            cosines = first @ unit(slice(other, other + step)).T
            if other == start:
                np.fill_diagonal(cosines, -np.inf)
            best = np.concatenate([best, cosines], axis=1)
            names = np.concatenate([names, np.tile(classes.codes[other : other + step], (len(first), 1))], axis=1)
            top = np.argpartition(-best, kept - 1, axis=1)[:, :kept]
            best, names = np.take_along_axis(best, top, axis=1), np.take_along_axis(names, top, axis=1)
        found += _credit(best, names, classes.codes[own], len(classes.values), temperature)
    return float(found / len(table))


def _credit(cosines: np.ndarray, names: np.ndarray, own: np.ndarray, count: int, temperature: float) -> float:
    rows = np.arange(len(own))
    votes = np.zeros((len(own), count))
    np.add.at(votes, (rows[:, None], names), np.exp((cosines - cosines.max(axis=1, keepdims=True)) / temperature))
    first = votes >= votes.max(axis=1, keepdims=True) * (1 - 1e-9)
    return float((first[rows, own] / first.sum(axis=1)).sum())
