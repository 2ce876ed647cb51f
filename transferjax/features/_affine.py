"""What maps of features in closed form share: one affine function, moments, roots of covariances, and checks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, TransferError, is_whole
from transferjax.numerics._covariance import check_varies, column_mean, scatter
from transferjax.numerics._tables import as_features, check_equal


def affine(params: Any, x: Any) -> Any:
    """``(x - mean) kernel + bias``, for ``x [..., d]``.

    >>> affine({"mean": jnp.ones(1), "kernel": jnp.ones((1, 2)), "bias": jnp.zeros(2)}, jnp.ones((3, 1))).shape
    (3, 2)
    """
    centred = jnp.asarray(x) - params["mean"]
    return jnp.matmul(centred, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params["bias"]


def affine_params(mean: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None = None) -> dict[str, jax.Array]:
    """Float32 params of :func:`affine`.

    >>> sorted(affine_params(np.zeros(2), np.eye(2)))
    ['bias', 'kernel', 'mean']
    """
    bias = np.zeros(kernel.shape[1]) if bias is None else bias
    return {name: jnp.asarray(x, jnp.float32) for name, x in {"mean": mean, "kernel": kernel, "bias": bias}.items()}


def moments(features: Any, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features as an array, their mean and their covariance (divided by ``N - 1``), in float64.

    Raises:
      DataError: there are fewer than two examples, they are all alike, or not finite.

    >>> moments([[1.0], [3.0]], "features")[2].tolist()
    [[2.0]]
    """
    table = as_features(features, name, least=2)
    check_varies(table, name)
    mean = column_mean(table)
    return table, mean, scatter(table, mean) / (len(table) - 1)


def paired(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features of the same examples.

    Raises:
      DataError: their numbers differ, there are fewer than two, they are all alike, or not finite.

    >>> [part.shape for part in paired(np.eye(2), np.eye(2, 3))]
    [(2, 2), (2, 3)]
    """
    x, y = as_features(x, "x", least=2), as_features(y, "y", least=2)
    check_equal("y", len(y), "x", len(x))
    check_varies(x, "x")
    check_varies(y, "y")
    return x, y


def check_width(name: str, one: np.ndarray, other: np.ndarray) -> None:
    """Raises unless both have as many columns.

    Raises:
      DataError: they have not.

    >>> check_width("coral", np.ones((2, 3)), np.ones((5, 3)))
    """
    if one.shape[1] != other.shape[1]:
        raise DataError(
            f"{name}() got features of width {one.shape[1]} and {other.shape[1]}. Expected one width for both; "
            "ridge_map() and cca() take unlike ones."
        )


def check_dims(name: str, dims: Any, most: int) -> None:
    """Raises unless ``dims`` is a whole number from 1 to ``most``.

    Raises:
      TransferError: it is not.

    >>> check_dims("cca", 2, 3)
    """
    if not is_whole(dims) or dims > most:
        raise TransferError(
            f"{name}() expects dims, a whole number from 1 to {most} (no more than columns, fewer than examples), got "
            f"{dims!r}."
        )


def check_ridge(name: str, ridge: Any, *, above: bool = False) -> None:
    """Raises unless a ridge is a number of at least 0, or above it.

    Raises:
      TransferError: it is not.

    >>> check_ridge("coral", 0.1)
    """
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not (ridge > 0 if above else ridge >= 0):
        raise TransferError(f"{name}() expects ridge, a number {'above' if above else 'of at least'} 0, got {ridge!r}.")


def power(covariance: np.ndarray, exponent: float, ridge: float = 0.0) -> np.ndarray:
    """A power of a covariance plus ``ridge`` times its mean variance; directions of rounding only stay 0.

    >>> power(np.diag([4.0, 0.0]), -0.5).tolist()
    [[0.5, 0.0], [0.0, 0.0]]
    """
    values, vectors = np.linalg.eigh(covariance)
    values = values + ridge * np.trace(covariance) / len(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T


def leading(covariance: np.ndarray, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues, falling, and their vectors ``[d, dims]``, whose largest entry is positive.

    >>> leading(np.diag([1.0, 4.0]), 1)[1].tolist()
    [[0.0], [1.0]]
    """
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = np.maximum(values[::-1][:dims], 0.0), vectors[:, ::-1][:, :dims]
    return values, vectors * signs(vectors) + 0.0


def signs(vectors: np.ndarray) -> np.ndarray:
    """The sign of every column's largest entry, so that results do not depend on the solver.

    >>> signs(np.array([[1.0, -3.0], [-0.5, 2.0]])).tolist()
    [1.0, -1.0]
    """
    return np.where(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)[0] < 0, -1.0, 1.0)


def cross(x: np.ndarray, y: np.ndarray, mean: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``(x - mean)' (y - other)`` in float64.

    >>> cross(np.array([[1.0], [3.0]]), np.array([[0.0], [1.0]]), np.array([2.0]), np.zeros(1)).tolist()
    [[1.0]]
    """
    return (np.asarray(x, np.float64) - mean).T @ (np.asarray(y, np.float64) - other)
