"""Ridge regression for many strengths from one eigendecomposition, with exact leave-one-out predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ROWS = 4096


class Ridge(NamedTuple):
    """A ridge regression whose strength is still open.

    Attributes:
      features: float64 ``[N, d]``, centred by their weighted mean.
      targets: float64 ``[N, K]``, centred likewise.
      weights: float64 ``[N]``.
      means: the weighted means of features ``[d]`` and targets ``[K]``.
      vectors: eigenvectors of the weighted Gram matrix: ``[d, d]`` (primal), or ``[N, N]`` (dual).
      values: its eigenvalues.
      moments: the weighted targets in that basis, ``[d or N, K]``.
      dual: whether it is the matrix of the examples.
    """

    features: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    means: tuple[np.ndarray, np.ndarray]
    vectors: np.ndarray
    values: np.ndarray
    moments: np.ndarray
    dual: bool


def decompose_ridge(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> Ridge:
    """All of a ridge regression that does not depend on its strength.

    The objective is ``sum(weights * (targets - features @ kernel - bias)**2) + strength * sum(kernel**2)``, the bias
    free. The matrix that is decomposed is the smaller one: of the columns for ``d <= N``, else of the examples.

    Args:
      features: ``[N, d]``.
      targets: float64 ``[N, K]``.
      weights: float64 ``[N]``, all positive.

    >>> ridge = decompose_ridge(np.array([[0.0], [2.0]]), np.array([[1.0], [3.0]]), np.ones(2))
    >>> [part.tolist() for part in solve_ridge(ridge, 2.0)]
    [[[0.5]], [1.5]]
    """
    means = np.average(features, axis=0, weights=weights), np.average(targets, axis=0, weights=weights)
    centred, wanted = features.astype(np.float64) - means[0], targets - means[1]
    root = np.sqrt(weights)[:, None]
    scaled = root * centred
    if centred.shape[1] <= len(centred):
        values, vectors = np.linalg.eigh(scaled.T @ scaled)
        moments = vectors.T @ (scaled.T @ (root * wanted))
        return Ridge(centred, wanted, weights, means, vectors, np.maximum(values, 0), moments, False)
    gram = scaled @ scaled.T
    # The centred examples miss one direction, that of the bias. Its eigenvalue, which would be zero, is put at the top:
    # nothing else depends on it, and the leverages below need no difference of nearly equal numbers.
    bias = root / np.linalg.norm(root)
    values, vectors = np.linalg.eigh(gram + np.trace(gram) * (bias @ bias.T))
    return Ridge(centred, wanted, weights, means, vectors, np.maximum(values, 0), vectors.T @ (root * wanted), True)


def solve_ridge(ridge: Ridge, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Kernel ``[d, K]`` and bias ``[K]`` for one strength.

    >>> ridge = decompose_ridge(np.array([[0.0], [2.0]]), np.array([[1.0], [3.0]]), np.ones(2))
    >>> solve_ridge(ridge, 2.0)[0].tolist()
    [[0.5]]
    """
    kernel = ridge.vectors @ (ridge.moments / (ridge.values + strength)[:, None])
    if ridge.dual:
        kernel = ridge.features.T @ (np.sqrt(ridge.weights)[:, None] * kernel)
    return kernel, ridge.means[1] - ridge.means[0] @ kernel


def left_out_ridge(ridge: Ridge, strengths: np.ndarray) -> Iterator[np.ndarray]:
    """For each strength, what the fit to all other examples predicts for each, ``[N, K]``.

    Exact: ``y - residual / (1 - leverage)`` (Allen, Technometrics 16, 1974).

    >>> ridge = decompose_ridge(np.array([[0.0], [1.0], [2.0]]), np.array([[0.0], [0.0], [3.0]]), np.ones(3))
    >>> next(left_out_ridge(ridge, np.array([1e-9]))).round(3).ravel().tolist()
    [-3.0, 1.5, 0.0]
    """
    free = _free(ridge, strengths)
    root = np.sqrt(ridge.weights)[:, None]
    for number, strength in enumerate(strengths):
        if ridge.dual:
            gains = strength / (ridge.values + strength)
            residuals = ridge.vectors @ (ridge.moments * gains[:, None]) / root
        else:
            residuals = ridge.targets - ridge.features @ solve_ridge(ridge, strength)[0]
        left = np.maximum(free[:, number], np.finfo(np.float64).eps)[:, None]
        yield ridge.targets + ridge.means[1] - residuals / left


def _free(ridge: Ridge, strengths: np.ndarray) -> np.ndarray:
    """One minus the leverage of every example at every strength, ``[N, S]``."""
    root = np.sqrt(ridge.weights)
    share = ridge.weights / ridge.weights.sum()
    if ridge.dual:
        gains = strengths / (ridge.values[:, None] + strengths)
        top = strengths / (_total(ridge) + strengths)
        return ridge.vectors**2 @ gains - share[:, None] * top
    gains = 1 / (ridge.values[:, None] + strengths)
    found = np.empty((len(root), len(strengths)))
    for start in range(0, len(root), ROWS):
        rows = slice(start, start + ROWS)
        rotated = (root[rows, None] * ridge.features[rows]) @ ridge.vectors
        found[rows] = 1 - share[rows, None] - (rotated * rotated) @ gains
    return found


def _total(ridge: Ridge) -> float:
    """The eigenvalue that the direction of the bias was given."""
    return float(ridge.weights @ (ridge.features**2).sum(axis=1))
