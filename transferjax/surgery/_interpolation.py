"""Interpolation along one axis, as a matrix; and a matrix applied along an axis of a numpy or JAX array."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def interpolation(old: int, new: int, method: str) -> np.ndarray:
    """The matrix that interpolates ``old`` samples at ``new`` places.

    ``"bicubic"`` (Keys' kernel, a = -1/2) and ``"bilinear"`` (a triangle) see samples as the centres of pixels, and
    are widened by ``old / new`` when that is above 1 (antialiasing); weights beyond the border are left out and the
    others sum to 1. ``"align_corners"`` is linear between samples, the first and last of which stay in place.

    Args:
      old: number of samples.
      new: number of samples to make.
      method: ``"bicubic"``, ``"bilinear"`` or ``"align_corners"``.

    Returns:
      float64 [new, old]; rows sum to 1.

    >>> interpolation(2, 3, "align_corners").tolist()
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    if method == "align_corners":
        places, width = np.linspace(0.0, old - 1.0, new), 1.0
    else:
        places, width = (np.arange(new) + 0.5) * (old / new) - 0.5, max(old / new, 1.0)
    distance = np.abs(places[:, None] - np.arange(old)) / width
    weights = _cubic(distance) if method == "bicubic" else np.maximum(1.0 - distance, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _cubic(x: np.ndarray) -> np.ndarray:
    """R. Keys, "Cubic convolution interpolation for digital image processing", 1981, with a = -1/2."""
    near = (1.5 * x - 2.5) * x**2 + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))


def module_of(array: Any) -> Any:
    """``jax.numpy`` for a JAX array, ``numpy`` for any other."""
    return jnp if isinstance(array, jax.Array) else np


def widened(array: Any) -> Any:
    """The array in float32, or in its own dtype when that is wider."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def along(matrix: np.ndarray, array: Any, axis: int) -> Any:
    """The matrix [new, old] applied along an axis of size ``old``; computed in the dtype of the array.

    >>> along(np.array([[1.0, 1.0]]), np.array([[1.0, 2.0], [3.0, 4.0]]), 0).tolist()
    [[4.0, 6.0]]
    """
    used = matrix.astype(array.dtype)
    if isinstance(array, jax.Array):
        # The default precision of matrix products on GPU and TPU keeps 10 or fewer bits of each factor.
        product = jnp.tensordot(used, array, axes=(1, axis), precision=jax.lax.Precision.HIGHEST)
    else:
        product = np.tensordot(used, array, axes=(1, axis))
    return module_of(array).moveaxis(product, 0, axis)
