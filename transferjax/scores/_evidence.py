"""LogME: the maximum evidence of a Bayesian linear readout."""

from __future__ import annotations

from typing import Any

import numpy as np

from transferjax._errors import DataError
from transferjax.numerics._covariance import check_varies, coordinates, group_coordinates, spectrum
from transferjax.numerics._tables import as_classes, as_features, check_equal

GRID, REFINED = 65, 32
EXACT = 1e-14  # the share of the targets' energy below which a residual is rounding
BLOCK = 1 << 18


def logme(features: Any, labels: Any) -> float:
    """The logarithm of the maximum evidence per example, averaged over classes (or over targets).

    Every class is a regression of its 0/1 indicator on the features, ``y = F w + noise`` with ``w ~ N(0, 1/alpha)``
    and noise ``N(0, 1/beta)``; the evidence ``p(y | F)`` is maximised over ``alpha`` and ``beta``. It is the whole
    evidence for more columns than examples too. With ``s`` the squared singular values of ``F``, ``w = U'y`` and
    ``t = alpha / beta``, the maximum over ``beta`` is

    ``1/2 log(N / E) - 1/2 - 1/2 log(2 pi) - 1/(2N) sum log(1 + s / t)``, ``E = |y|^2 - sum w^2 s / (s + t)``,

    which is maximised over ``t``. The Gram matrix is made some rows at a time; no array of length ``N`` is made per
    class. Where fewer columns than examples reproduce a target exactly, the evidence has no bound; the residual is
    then taken to be 1e-14 of the target.

    Args:
      features: numbers ``[N, d]``.
      labels: integers ``[N]``: classes; or floats ``[N]`` or ``[N, K]``: targets of a regression.

    Raises:
      DataError: features are not finite or constant, labels are of another number, one class only, or a target is zero.

    Source: You, Liu, Wang & Long, LogME: practical assessment of pre-trained models, ICML 2021.

    >>> features = np.array([[1.0, 0.1], [1.1, 0.0], [0.0, 1.0], [0.1, 1.2]])
    >>> logme(features, [0, 0, 1, 1]) > logme(features, [0, 1, 0, 1])
    True
    """
    table = as_features(features)
    targets = np.asarray(labels)
    regression = targets.dtype.kind == "f" or targets.dtype.name == "bfloat16"
    if regression:
        targets = as_features(targets[:, None] if targets.ndim == 1 else targets, "labels")
        check_equal("labels", len(targets), "features", len(table))
        energy = np.square(targets, dtype=np.float64).sum(axis=0)
        if not energy.all():
            raise DataError(
                f"target {np.flatnonzero(energy == 0)[0]} of {len(energy)} is zero in every example. Expected targets "
                "that vary; leave it out."
            )
    classes = None if regression else as_classes(targets, len(table))
    check_varies(table)
    found = spectrum(table)
    if classes is None:
        weights = coordinates(found, table, targets)
    else:
        weights = group_coordinates(found, table, classes.codes, len(classes.values))
        energy = classes.counts.astype(np.float64)
    step = max(1, BLOCK // len(found.values))
    parts = [
        _evidence(found.values, weights[:, start : start + step] ** 2, energy[start : start + step], len(table))
        for start in range(0, len(energy), step)
    ]
    return float(np.concatenate(parts).mean())


def _evidence(values: np.ndarray, weights: np.ndarray, energy: np.ndarray, count: int) -> np.ndarray:
    """The maximum evidence per example of every target: ``values`` ``[r]``, ``weights`` ``(U'y)^2`` ``[r, K]``."""
    spanned = len(values) >= count  # every target is a sum of columns, and none of it lies outside them
    outside = np.maximum(energy - weights.sum(axis=0), EXACT * energy) * (not spanned)
    values = values[:, None]

    def at(log_ratio: np.ndarray) -> np.ndarray:
        ratio = np.exp(log_ratio)
        left = outside + (weights * (ratio / (values + ratio))).sum(axis=0)
        return 0.5 * np.log(count / left) - np.log1p(values / ratio).sum(axis=0) / (2 * count)

    low, high = np.log(values[0]) - 25.0, np.log(values[-1]) + 30.0
    grid = np.linspace(low, high, GRID)
    coarse = np.stack([at(point) for point in grid])
    best = coarse.argmax(axis=0)
    maximum = np.maximum(coarse.max(axis=0), _refined(at, grid, best))
    return maximum - 0.5 * (1 + np.log(2 * np.pi))


def _refined(at: Any, grid: np.ndarray, best: np.ndarray) -> np.ndarray:
    """The maximum between the neighbours of every best point of the grid, by golden sections."""
    golden = (5**0.5 - 1) / 2
    low, high = grid[np.maximum(best - 1, 0), 0], grid[np.minimum(best + 1, len(grid) - 1), 0]
    inner, outer = high - golden * (high - low), low + golden * (high - low)
    first, second = at(inner), at(outer)
    for _ in range(REFINED):
        left = first > second
        low, high = np.where(left, low, inner), np.where(left, outer, high)
        kept, value = np.where(left, inner, outer), np.where(left, first, second)
        fresh = np.where(left, high - golden * (high - low), low + golden * (high - low))
        made = at(fresh)
        inner, outer = np.where(left, fresh, kept), np.where(left, kept, fresh)
        first, second = np.where(left, made, value), np.where(left, value, made)
    return np.maximum(first, second)
