"""What features and labels must be before anything is computed of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from transferjax._errors import DataError, describe, listing


class Classes(NamedTuple):
    """Class labels as the numbers ``0 .. K-1`` of the classes that occur.

    Attributes:
      codes: int64 ``[N]``, the place of each label among ``values``.
      values: int64 ``[K]``, the labels that occur, ascending.
      counts: int64 ``[K]``, how many examples each has.
    """

    codes: np.ndarray
    values: np.ndarray
    counts: np.ndarray


def as_features(features: Any, name: str = "features", *, least: int = 1) -> np.ndarray:
    """Features as a numpy array ``[N, d]`` of floats, in their own width; nothing is copied that need not be.

    Args:
      features: ``[N, d]`` numbers, from numpy or jax.
      name: what errors call them.
      least: how many examples there must be.

    Raises:
      DataError: they are no matrix of numbers, too few, or not finite; the first bad example is named.

    >>> as_features([[1, 2], [3, 4]]).dtype
    dtype('float64')
    """
    table = np.asarray(features)
    if table.ndim != 2 or (table.dtype.kind not in "fiub" and table.dtype.name != "bfloat16"):
        raise DataError(
            f"{name} are {describe(table)}; expected numbers [N, d], one row per example. Maps [N, h, w, c] are pooled "
            "first: x.mean((1, 2))."
        )
    if len(table) < least or not table.shape[1]:
        raise DataError(f"{name} are {describe(table)}; expected at least {least} examples and one column.")
    if table.dtype.kind not in "f" or table.dtype.itemsize < 4:
        table = table.astype(np.float64 if table.dtype.kind in "iub" else np.float32)
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(table.sum(axis=1, dtype=np.float64))  # one number per row where all are finite
    if bad.any():
        bad &= ~np.isfinite(table).all(axis=1)
    if bad.any():
        raise DataError(
            f"{name} are not finite in {bad.sum()} of {len(table)} examples, first in row {np.flatnonzero(bad)[0]}. "
            "Expected finite numbers: look at the inputs, or at a network that overflows."
        )
    return table


def as_classes(labels: Any, count: int, name: str = "labels", *, least: int = 2) -> Classes:
    """Class labels as codes of the classes that occur; numbers that no example has are skipped.

    Args:
      labels: integers ``[N]``.
      count: ``N``.
      name: what errors call them.
      least: how many classes there must be.

    Raises:
      DataError: they are no integers ``[N]``, or there are too few classes.

    >>> as_classes([7, 3, 7], 3).codes.tolist()
    [1, 0, 1]
    """
    codes = np.asarray(labels)
    if codes.ndim != 1 or codes.dtype.kind not in "iub":
        raise DataError(
            f"{name} are {describe(codes)}; expected integers [N], one class per example. For one-hot rows write "
            "labels.argmax(-1)."
        )
    check_equal(name, len(codes), "features", count)
    values, found, counts = np.unique(codes.astype(np.int64), return_inverse=True, return_counts=True)
    if len(values) < least:
        raise DataError(
            f"{name} hold {len(values)} class(es) ({listing([str(v) for v in values])}); expected at least {least}. A "
            "slice of a data set sorted by class looks like this."
        )
    return Classes(found.reshape(-1), values, counts)


def as_weights(weights: Any, count: int) -> np.ndarray:
    """One weight per example, float64 ``[N]``; ``None``: ones.

    Raises:
      DataError: they are not finite, negative, all zero, or of another number than the examples.

    >>> as_weights(None, 2).tolist()
    [1.0, 1.0]
    """
    if weights is None:
        return np.ones(count)
    found = np.asarray(weights, np.float64)
    if found.ndim != 1:
        raise DataError(f"weights are {describe(found)}; expected numbers [N], one per example.")
    check_equal("weights", len(found), "features", count)
    if not np.isfinite(found).all() or (found < 0).any() or not found.any():
        raise DataError("weights are negative, not finite or all zero; expected numbers of at least 0, some above it.")
    return found


def check_equal(name: str, count: int, other: str, expected: int) -> None:
    """Raises unless two things have one row per example.

    Raises:
      DataError: the numbers differ.

    >>> check_equal("labels", 3, "features", 3)
    """
    if count != expected:
        raise DataError(
            f"{name} have {count:,} examples and {other} {expected:,}. Expected one row of each per example, in one "
            "order."
        )
