"""Which inputs of a linear model matter: group lasso, one group per input."""

from __future__ import annotations

import numpy as np


def group_lasso(features: np.ndarray, wanted: np.ndarray, strength: float, *, iterations: int = 30) -> np.ndarray:
    """The norm of each row of the kernel that minimises a group-lasso problem, ``[d]``.

    It minimises ``.5 * sum((wanted - features @ kernel)**2) + penalty * sum_i norm(kernel[i])`` with ``penalty =
    strength * largest``, the least penalty at which all rows are zero, by reweighted ridge regressions, each in the
    smaller of ``[d, d]`` and ``[N, N]``. Rows that should be zero come close to it.

    Args:
      features: float64 ``[N, d]``, centred.
      wanted: float64 ``[N, K]``, centred.
      strength: above 0; at 1 nothing is left.
      iterations: of the reweighting.

    Source: Yuan and Lin, J. R. Stat. Soc. B 68 (2006); reweighting: Bach et al., "Optimization with Sparsity-Inducing
    Penalties" (2012), section 5.

    >>> x = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> group_lasso(x, x[:, :1], 0.5).round(3).tolist()
    [0.5, 0.0]
    """
    pulls = features.T @ wanted
    penalty = strength * float(np.sqrt((pulls**2).sum(axis=1)).max())
    if not penalty:
        return np.zeros(features.shape[1])
    norms = np.ones(features.shape[1])
    gram = features.T @ features if features.shape[1] <= len(features) else None
    for _ in range(iterations):
        root = np.sqrt(norms)
        if gram is not None:
            matrix = root[:, None] * gram * root
            matrix[np.diag_indices_from(matrix)] += penalty
            kernel = np.linalg.solve(matrix, root[:, None] * pulls)
        else:
            scaled = features * root
            kernel = scaled.T @ np.linalg.solve(scaled @ scaled.T + penalty * np.eye(len(scaled)), wanted)
        norms = np.sqrt(((root[:, None] * kernel) ** 2).sum(axis=1))
    return norms
