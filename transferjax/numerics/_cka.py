"""Centred kernel alignment: Gram matrices, their centring, and HSIC by columns where there are fewer."""

from __future__ import annotations

import numpy as np

from transferjax.numerics._covariance import ELEMENTS, column_mean, gram, row_chunks


def squared_distances(x: np.ndarray, y: np.ndarray | None = None, mean: np.ndarray | None = None) -> np.ndarray:
    """Squared distances of all pairs of rows, float64 ``[N, M]``, not below 0; 0 on the diagonal without ``y``.

    Args:
      x: ``[N, d]``.
      y: ``[M, d]``; default ``x``.
      mean: a point ``[d]`` near which the rows lie, taken off for accuracy; default the mean of ``x``.

    >>> squared_distances(np.array([[0.0], [2.0]])).tolist()
    [[0.0, 4.0], [4.0, 0.0]]
    """
    mean = column_mean(x) if mean is None else mean
    found = gram(x, mean, y)
    square = lambda table: np.concatenate([np.square(part).sum(axis=1) for _, part in row_chunks(table, mean)])
    first = np.diagonal(found).copy() if y is None else square(x)
    second = first if y is None else square(y)
    found *= -2
    found += first[:, None]
    found += second
    np.maximum(found, 0, out=found)
    if y is None:
        np.fill_diagonal(found, 0.0)
    return found


def rbf_gram(x: np.ndarray, threshold: float = 1.0) -> np.ndarray:
    """``exp(-d^2 / (2 bandwidth^2))``, ``bandwidth^2 = threshold^2 * median d^2`` over all N^2 pairs, ``[N, N]``.

    Where more than half of the pairs coincide, the mean stands in for the median.

    >>> rbf_gram(np.array([[0.0], [1.0], [2.0]])).round(4)[0].tolist()
    [1.0, 0.6065, 0.1353]
    """
    distances = squared_distances(x)
    median = float(np.median(distances))
    if not median:
        median = float(distances.mean())
    distances /= -2 * threshold**2 * median
    return np.exp(distances, out=distances)


def centred(kernel: np.ndarray, unbiased: bool = False) -> np.ndarray:
    """A symmetric Gram matrix with rows and columns that sum to zero; overwritten.

    ``unbiased``: the diagonal is left out; the sum of the products of two such matrices, over ``n (n - 3)``, is HSIC_1.

    Source: Song, Smola, Gretton, Bedo & Borgwardt, Feature selection via dependence maximization, 2012; Székely &
    Rizzo, Partial distance correlation with methods for dissimilarities, 2014.

    >>> centred(np.array([[2.0, 0.0], [0.0, 2.0]])).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    count = len(kernel)
    if unbiased:
        np.fill_diagonal(kernel, 0.0)
    rows = kernel.sum(axis=1) / (count - 2 if unbiased else count)
    kernel -= rows[:, None]
    kernel -= rows
    kernel += rows.sum() / (count - 1 if unbiased else count)
    if unbiased:
        np.fill_diagonal(kernel, 0.0)
    return kernel


def linear_hsic(x: np.ndarray, y: np.ndarray, unbiased: bool = False) -> np.ndarray:
    """``(HSIC(x, y), HSIC(x, x), HSIC(y, y))`` of linear kernels, up to one common factor.

    By columns, ``||Yc'Xc||^2``, some rows at a time; by Gram matrices where there are fewer rows than columns.

    >>> linear_hsic(np.array([[1.0], [3.0]]), np.array([[0.0], [1.0]])).tolist()
    [1.0, 4.0, 0.25]
    """
    count = len(x)
    mean_x, mean_y = column_mean(x), column_mean(y)
    if max(x.shape[1], y.shape[1]) > count:
        first, second = (centred(gram(z, m), unbiased) for z, m in ((x, mean_x), (y, mean_y)))
        return np.array([np.vdot(first, second), np.vdot(first, first), np.vdot(second, second)])
    cross, own, other = (np.zeros((a.shape[1], b.shape[1])) for a, b in ((x, y), (x, x), (y, y)))
    norms = np.empty((2, count))
    step = max(256, ELEMENTS // (x.shape[1] + y.shape[1]))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        first, second = x[rows] - mean_x, y[rows] - mean_y
        cross += first.T @ second
        own += first.T @ first
        other += second.T @ second
        norms[:, rows] = np.square(first).sum(axis=1), np.square(second).sum(axis=1)
    found = np.array([np.square(matrix).sum() for matrix in (cross, own, other)])
    if not unbiased:
        return found
    # Of centred rows, the Gram matrix without its diagonal has the row sums -|x_i|^2.
    pairs = np.array([norms[0] @ norms[1], norms[0] @ norms[0], norms[1] @ norms[1]])
    totals = norms.sum(axis=1)
    products = np.array([totals[0] * totals[1], totals[0] ** 2, totals[1] ** 2])
    return found - pairs + products / ((count - 1) * (count - 2)) - 2 * pairs / (count - 2)
