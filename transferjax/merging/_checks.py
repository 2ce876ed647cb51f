"""Coefficients of merges: what they must be before anything is computed."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, describe
from transferjax.merging._leaf import is_traced

TOLERANCE = 1e-6
TRACED_TOLERANCE = 1e-4
"""Of float32 sums."""


def as_weights(method: str, weights: Any, count: int, *, mean: bool = False, signed: bool = True) -> Any:
    """One weight per model; ones (for a mean: equal shares) where there are none.

    Args:
      mean: whether they must sum to one.
      signed: whether they may be negative.

    Returns:
      ``[count]`` floats, or what is traced as it is; NaN where its sum must be one and is not.

    Raises:
      DataError: there are more or fewer than models, or they are not finite, negative, or of another sum.
    """
    if weights is None:
        return np.full(count, 1 / count if mean else 1.0)
    if is_traced(weights):
        length = len(weights) if isinstance(weights, list | tuple) or np.ndim(weights) == 1 else None
        if length != count:
            raise DataError(f"{method}() got {length} traced weights for {count} models. Expected one per model.")
        if not mean:
            return weights
        # What is traced cannot raise: a mean of another sum is NaN, which wins no search.
        found = jnp.asarray(weights)
        return jnp.where(jnp.abs(jnp.sum(found) - 1) <= TRACED_TOLERANCE, found, jnp.nan)
    try:
        found = np.asarray(weights, np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{method}() got {describe(weights)} as weights. Expected one number per model.") from None
    if found.shape != (count,):
        by_name = " Density and scale go by name: density=0.2." if not found.shape else ""
        raise DataError(
            f"{method}() got weights of shape {found.shape} for {count} models. Expected one per model.{by_name}"
        )
    if not np.isfinite(found).all():
        raise DataError(f"{method}() got weights {found.tolist()}. Expected finite numbers.")
    if not signed and ((found < 0).any() or not found.any()):
        raise DataError(f"{method}() got weights {found.tolist()}. Expected none below zero, and one above.")
    if mean and abs(found.sum() - 1) > TOLERANCE:
        raise DataError(
            f"{method}() got weights that sum to {found.sum():.8g}. Expected a sum of one, as those of a mean: divide "
            "them by their sum."
        )
    return found


def as_number(method: str, name: str, value: Any) -> Any:
    """A real number as a float, or what is traced as it is.

    Raises:
      DataError: it is no single finite number.
    """
    if is_traced(value):
        return value
    if not _is_number(value) or not math.isfinite(value):
        raise DataError(f"{method}() got {name}={value!r}. Expected a finite number.")
    return float(value)


def as_fraction(method: str, name: str, value: Any, *, zero: bool = True) -> float:
    """A share between nought and one.

    Raises:
      DataError: it is traced (how many elements are kept must be known), no number, or outside.
    """
    if is_traced(value):
        raise DataError(f"{method}() got a traced {name}. Expected a number: it says how many elements are kept.")
    if not _is_number(value) or not 0 <= value <= 1 or (value == 0 and not zero):
        raise DataError(
            f"{method}() got {name}={value!r}. Expected a share of the elements in {'[' if zero else '('}0, 1]."
        )
    return float(value)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool | str | bytes) and np.ndim(value) == 0 and hasattr(value, "__float__")
