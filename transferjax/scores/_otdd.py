"""How far two labelled data sets are apart, by optimal transport."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, TransferError
from transferjax.numerics._tables import Classes, as_classes, as_features


def otdd(
    features: Any, labels: Any, other_features: Any, other_labels: Any, *, epsilon: float = 0.05, iterations: int = 5000
) -> float:
    """Optimal transport data set distance, negated: 0 for one data set twice, lower for data sets further apart.

    An example costs ``|x - y|**2 + W(class of x, class of y)**2`` to be moved, ``W`` being the Wasserstein distance
    of the classes' Gaussians; the plan is entropic (Sinkhorn, ``ott-jax``), and the score is minus the square root of
    its mean cost. The data sets need no class in common.

    Args:
      features: ``[N, d]``.
      labels: integers ``[N]``, at least two examples of each class.
      other_features: ``[M, d]``.
      other_labels: integers ``[M]``, likewise.
      epsilon: the entropy's weight, as a share of the mean cost.
      iterations: at most so many of Sinkhorn's.

    Raises:
      DataError: the widths differ, a class has one example, or features and labels cannot be used.
      TransferError: ott-jax is missing, or Sinkhorn does not converge.

    Source: Alvarez-Melis and Fusi, "Geometric Dataset Distances via Optimal Transport", arXiv:2002.02923.

    >>> import importlib.util
    >>> x, y = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20) % 2
    >>> if importlib.util.find_spec("ott"):
    ...     assert otdd(x, y, x + 5.0, y) < otdd(x, y, x + 1.0, y) < 0
    """
    try:
        from ott.geometry.geometry import Geometry  # pyright: ignore[reportMissingImports]
        from ott.problems.linear.linear_problem import LinearProblem  # pyright: ignore[reportMissingImports]
        from ott.solvers.linear.sinkhorn import Sinkhorn  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TransferError(
            "otdd() needs ott-jax, which is not installed: pip install 'transferjax[transport]'."
        ) from None
    x, y = as_features(features, "features"), as_features(other_features, "other features")
    if x.shape[1] != y.shape[1]:
        raise DataError(
            f"features are {x.shape[1]} wide and other features {y.shape[1]}. Expected equal widths: take both from "
            "one network."
        )
    mine, theirs = _classes(labels, len(x), "labels"), _classes(other_labels, len(y), "other labels")
    x, y = x.astype(np.float64), y.astype(np.float64)
    between = _between(_gaussians(x, mine), _gaussians(y, theirs))
    cost = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    cost = np.maximum(cost, 0) + between[mine.codes][:, theirs.codes]
    with jax.enable_x64(True):
        geometry = Geometry(cost_matrix=jnp.asarray(cost), epsilon=epsilon * max(float(cost.mean()), 1e-300))
        solved = Sinkhorn(threshold=1e-3, max_iterations=int(iterations))(LinearProblem(geometry))
        found, converged = float(solved.primal_cost), bool(solved.converged)
    if not converged or not np.isfinite(found):
        raise TransferError(
            f"otdd() did not converge in {iterations} iterations. Expected more iterations, or an epsilon above "
            f"{epsilon}."
        )
    return -float(np.sqrt(max(found, 0.0)))


def _classes(labels: Any, count: int, name: str) -> Classes:
    found = as_classes(labels, count, name, least=1)
    if found.counts.min() < 2:
        raise DataError(
            f"{name}: class {found.values[found.counts.argmin()]} has one example, which has no covariance. Expected "
            "at least 2 of each: leave such classes out."
        )
    return found


def _gaussians(x: np.ndarray, classes: Classes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and covariance of each class."""
    parts = [x[classes.codes == code] for code in range(len(classes.values))]
    return [(part.mean(axis=0), np.atleast_2d(np.cov(part, rowvar=False))) for part in parts]


def _between(first: list[tuple[np.ndarray, np.ndarray]], second: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Squared Wasserstein distances of Gaussians, ``[K, L]``."""
    found = np.zeros((len(first), len(second)))
    for row, (mean, covariance) in enumerate(first):
        root = _root(covariance)
        for column, (other, spread) in enumerate(second):
            shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ spread @ root), 0)).sum()
            apart = ((mean - other) ** 2).sum() + np.trace(covariance) + np.trace(spread) - 2 * shared
            found[row, column] = max(float(apart), 0.0)
    return found


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
