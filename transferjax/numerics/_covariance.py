"""Second moments of many examples, some rows at a time in float64: scatter, its spectrum, Ledoit-Wolf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from transferjax._errors import DataError

ELEMENTS = 1 << 20  # of a chunk: 8 MB in float64


def row_chunks(features: np.ndarray, mean: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """The rows in float64, some at a time; less their mean where it is given.

    Args:
      features: ``[N, d]``, float32 or float64.
      mean: float64 ``[d]``.

    Returns:
      ``(slice of rows, float64 [n, d])``, in order.

    >>> [(rows.stop, part.shape) for rows, part in row_chunks(np.ones((5, 2), np.float32))]
    [(5, (5, 2))]
    """
    step = max(256, ELEMENTS // features.shape[1])
    for start in range(0, len(features), step):
        rows = slice(start, min(start + step, len(features)))
        yield rows, (np.asarray(features[rows], np.float64) if mean is None else features[rows] - mean)


def block_rows(width: int) -> int:
    """How many rows to compare with how many at a time: at most 1,024, and at most 8 MB in float64.

    >>> block_rows(64), block_rows(4096)
    (1024, 256)
    """
    return min(1024, max(64, ELEMENTS // width))


def check_varies(features: np.ndarray, name: str = "features") -> None:
    """Raises where all rows are the same.

    Raises:
      DataError: every column is constant.

    >>> check_varies(np.eye(2))
    """
    step = max(256, ELEMENTS // features.shape[1])
    for start in range(0, len(features), step):
        if (features[start : start + step] != features[0]).any():
            return
    raise DataError(
        f"{name} are constant: all {len(features):,} examples have the same values. Expected columns that vary: look "
        "at a dead layer, or at inputs that are all alike."
    )


def column_mean(features: np.ndarray) -> np.ndarray:
    """The mean of every column, float64 ``[d]``.

    >>> column_mean(np.array([[1, 2], [3, 4]])).tolist()
    [2.0, 3.0]
    """
    return features.sum(axis=0, dtype=np.float64) / len(features)


def scatter(features: np.ndarray, mean: np.ndarray | None = None) -> np.ndarray:
    """``F'F`` of the (centred) features, float64 ``[d, d]``.

    >>> scatter(np.array([[1.0], [3.0]]), np.array([2.0])).tolist()
    [[2.0]]
    """
    total = np.zeros((features.shape[1],) * 2)
    for _, part in row_chunks(features, mean):
        total += part.T @ part
    return total


def gram(features: np.ndarray, mean: np.ndarray | None = None, other: np.ndarray | None = None) -> np.ndarray:
    """``F F'`` of the (centred) features, float64 ``[N, N]``, some columns at a time.

    Args:
      features: ``[N, d]``.
      mean: float64 ``[d]``, taken off first.
      other: ``[M, d]``, for ``F G'``.

    >>> gram(np.array([[1.0], [3.0]])).tolist()
    [[1.0, 3.0], [3.0, 9.0]]
    """
    second = features if other is None else other
    total = np.zeros((len(features), len(second)))
    step = max(64, ELEMENTS // len(features))
    for start in range(0, features.shape[1], step):
        shift = 0.0 if mean is None else mean[start : start + step]
        part = np.asarray(features[:, start : start + step], np.float64) - shift
        total += part @ (part if other is None else np.asarray(other[:, start : start + step], np.float64) - shift).T
    return total


def group_sums(features: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """The sum of the rows of every group, float64 ``[count, d]``.

    Args:
      features: ``[N, d]``.
      codes: integers ``[N]`` below ``count``.
      count: how many groups there are.

    >>> group_sums(np.array([[1.0], [2.0], [3.0]]), np.array([1, 0, 1]), 2).tolist()
    [[2.0], [4.0]]
    """
    total = np.zeros((count, features.shape[1]))
    for rows, part in row_chunks(features):
        order = np.argsort(codes[rows], kind="stable")
        found = codes[rows][order]
        starts = np.flatnonzero(np.append(True, found[1:] != found[:-1]))
        total[found[starts]] += np.add.reduceat(part[order], starts, axis=0)
    return total


class Spectrum(NamedTuple):
    """The singular values of features, squared, and the vectors of the shorter side.

    Attributes:
      values: float64 ``[r]``: the squared singular values above rounding.
      right: float64 ``[d, r]``, or ``None`` where there are fewer examples than columns.
      left: float64 ``[N, r]``, or ``None`` where ``right`` is there.
      mean: float64 ``[d]``: what was taken off, or ``None``.
    """

    values: np.ndarray
    right: np.ndarray | None
    left: np.ndarray | None
    mean: np.ndarray | None


def spectrum(features: np.ndarray, *, centre: bool = False) -> Spectrum:
    """The spectrum of features by the eigenvalues of ``F'F``, or of ``F F'`` where that is smaller.

    Args:
      features: ``[N, d]``, float32 or float64.
      centre: whether the mean is taken off.

    >>> spectrum(np.diag([1.0, 2.0])).values.tolist()
    [1.0, 4.0]
    """
    mean = column_mean(features) if centre else None
    dual = len(features) < features.shape[1]
    values, vectors = np.linalg.eigh(gram(features, mean) if dual else scatter(features, mean))
    kept = values > values[-1] * max(features.shape) * np.finfo(np.float64).eps
    values, vectors = values[kept], vectors if kept.all() else vectors[:, kept]
    return Spectrum(values, None if dual else vectors, vectors if dual else None, mean)


def group_coordinates(found: Spectrum, features: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """Indicators of groups in the basis of left singular vectors, ``U'Y``, float64 ``[r, count]``.

    >>> group_coordinates(spectrum(np.diag([1.0, 2.0])), np.diag([1.0, 2.0]), np.array([0, 0]), 1).tolist()
    [[1.0], [1.0]]
    """
    if found.left is not None:
        return group_sums(found.left, codes, count).T
    sums = group_sums(features, codes, count)
    if found.mean is not None:
        sums -= np.bincount(codes, minlength=count)[:, None] * found.mean
    assert found.right is not None
    return (sums @ found.right).T / np.sqrt(found.values)[:, None]


def coordinates(found: Spectrum, features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Targets in the basis of left singular vectors, ``U'Y``, float64 ``[r, K]``.

    >>> coordinates(spectrum(np.diag([1.0, 2.0])), np.diag([1.0, 2.0]), np.array([[3.0], [5.0]])).tolist()
    [[3.0], [5.0]]
    """
    if found.left is not None:
        return found.left.T @ np.asarray(targets, np.float64)
    assert found.right is not None
    total = np.zeros((features.shape[1], targets.shape[1]))
    for rows, part in row_chunks(features, found.mean):
        total += part.T @ np.asarray(targets[rows], np.float64)
    return found.right.T @ total / np.sqrt(found.values)[:, None]


def fourth_moment(features: np.ndarray, mean: np.ndarray) -> float:
    """``sum |x - mean|^4`` over the examples.

    >>> fourth_moment(np.array([[1.0], [3.0]]), np.array([2.0]))
    2.0
    """
    return float(sum(np.square(np.square(part).sum(axis=1)).sum() for _, part in row_chunks(features, mean)))


def shrinkage(values: np.ndarray, fourth: float, count: int, width: int) -> float:
    """The share of the identity in the Ledoit-Wolf covariance.

    Args:
      values: the eigenvalues of the covariance (divided by ``N``); zeros may be left out.
      fourth: ``sum |x - mean|^4``.
      count: ``N``.
      width: ``d``.

    Source: Ledoit & Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004.

    >>> shrinkage(np.array([1.0]), 2.0, 2, 1)
    0.0
    """
    return _share(float(values.sum()), float(np.square(values).sum()), fourth, count, width)


def _share(trace: float, size: float, fourth: float, count: int, width: int) -> float:
    """From the trace and the squared norm of the covariance."""
    distance = (size - trace**2 / width) / width
    noise = min((fourth / count - size) / (count * width), distance)
    return noise / distance if noise > 0 else 0.0


def ledoit_wolf(features: np.ndarray) -> tuple[np.ndarray, float]:
    """The Ledoit-Wolf covariance of examples: the empirical one, moved towards a multiple of the identity.

    Args:
      features: ``[N, d]``, float32 or float64.

    Returns:
      ``(covariance, shrinkage)``: ``(1 - a) S + a tr(S) / d I``, float64 ``[d, d]``, and ``a``.

    Source: Ledoit & Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004.

    >>> round(ledoit_wolf(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]))[1], 4)
    0.9444
    """
    count, width = features.shape
    mean = column_mean(features)
    covariance = scatter(features, mean) / count
    trace, size = float(np.trace(covariance)), float(np.square(covariance).sum())
    share = _share(trace, size, fourth_moment(features, mean), count, width)
    covariance *= 1 - share
    covariance.flat[:: width + 1] += share * trace / width
    return covariance, share
