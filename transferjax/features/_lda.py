"""Linear discriminant analysis as a read-out."""

from __future__ import annotations

from typing import Any

import numpy as np

from transferjax._errors import DataError
from transferjax._report import Report
from transferjax.features._neighbours import class_means
from transferjax.features._readout import Readout
from transferjax.features._targets import (
    CLASSES,
    LABELS,
    as_training,
    by_classes,
    linear,
    linear_params,
    standardisation,
)


def lda(
    features: Any,
    labels: Any,
    *,
    shrinkage: float | None = None,
    weights: Any = None,
    num_classes: int | None = None,
    standardise: bool = False,
) -> Readout:
    """Linear discriminant analysis: one normal distribution per class, all with one covariance.

    The covariance is the mean of those of the classes, weighted by their frequency, each shrunk towards the mean
    variance: ``(1 - s) * C + s * trace(C) / d * I``. Ledoit and Wolf's estimate of ``s`` is made on standardised
    features, class by class, as scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")`` makes
    it. The outputs are log posteriors up to what is the same for all classes; for several labels, the log odds.

    Args:
      features: ``[N, d]``.
      labels: classes, integers ``[N]``, or several labels, booleans or zeros and ones ``[N, K]``.
      shrinkage: from 0 (none) to 1; ``None``: Ledoit and Wolf's estimate.
      weights: ``[N]``, how often each example counts; ``None``: once.
      num_classes: columns of the outputs for classes; ``None``: the largest label plus one.
      standardise: give every column mean 0 and variance 1 first.

    Returns:
      A :class:`Readout`; its report has the shrinkage of each class (of no and yes for each label).

    Raises:
      DataError: an argument cannot be used, the labels are targets, or no class has two different examples.

    Source: Fisher, Annals of Eugenics 7 (1936); Ledoit and Wolf, J. Multivariate Analysis 88 (2004).

    >>> x = np.array([[0.0], [1.0], [4.0], [5.0]])
    >>> readout = lda(x, np.array([0, 0, 1, 1]), shrinkage=0.0)
    >>> readout.predict(readout.params, x).argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise DataError(f"shrinkage is {shrinkage!r}; expected a number from 0 to 1, or None for an estimate.")
    takes, instead = (CLASSES, LABELS), "For targets write ridge()."
    training = as_training(features, labels, weights, num_classes, name="lda", takes=takes, instead=instead)
    table, targets, counts = training
    shift, scale = standardisation(table, counts, standardise)
    x = (table - shift) * scale
    rows: list[tuple[int, int, float, float]] = []

    def fit(codes: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        means = class_means(x, codes, counts, number)
        priors = np.bincount(codes, counts, minlength=number) / counts.sum()
        covariance = np.zeros((x.shape[1], x.shape[1]))
        for code in range(number):
            mine = codes == code
            found, used = _shrunk(x[mine] - means[code], counts[mine], shrinkage)
            covariance += priors[code] * found
            rows.append((code, int(mine.sum()), float(priors[code]), used))
        if not covariance.any():
            raise DataError("lda() needs a class with two different examples. For one each write nearest_mean().")
        small = x.shape[1] * np.finfo(np.float64).eps
        kernel = np.linalg.pinv(covariance, rcond=small, hermitian=True) @ means.T
        return kernel, np.log(priors) - 0.5 * (means.T * kernel).sum(axis=0)

    params = linear_params(targets, shift, scale, *by_classes(targets, fit))
    how = "Ledoit and Wolf" if shrinkage is None else "the argument"
    facts = {"shrinkage by": how, "examples": len(table)}
    report = Report("Linear discriminant analysis", ("class", "examples", "prior", "shrinkage"), tuple(rows), facts)
    return Readout(linear, params, report)


def _shrunk(centred: np.ndarray, weights: np.ndarray, shrinkage: float | None) -> tuple[np.ndarray, float]:
    """A covariance ``[d, d]`` shrunk towards a multiple of the identity, and by how much."""
    if shrinkage is not None:
        return _towards_identity(_covariance(centred, weights), shrinkage), float(shrinkage)
    spread = np.sqrt(np.average(centred**2, axis=0, weights=weights))
    small = 10 * np.finfo(np.float64).eps * abs(centred).max()
    spread = np.where(spread > small, spread, 1.0)
    x = centred / spread
    covariance = _covariance(x, weights)
    used = _ledoit_wolf(x, weights, covariance)
    return spread[:, None] * _towards_identity(covariance, used) * spread, used


def _covariance(centred: np.ndarray, weights: np.ndarray) -> np.ndarray:
    root = np.sqrt(weights / weights.sum())[:, None] * centred
    return root.T @ root


def _towards_identity(covariance: np.ndarray, shrinkage: float) -> np.ndarray:
    width = len(covariance)
    return (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / width * np.eye(width)


def _ledoit_wolf(x: np.ndarray, weights: np.ndarray, covariance: np.ndarray) -> float:
    """The shrinkage that is best for normal data, from 0 to 1."""
    width, count = x.shape[1], weights.sum()
    if width == 1:
        return 0.0
    squares = (covariance**2).sum()
    fourth = weights @ (x**2).sum(axis=1) ** 2 / count
    noise = (fourth - squares) / (width * count)
    distance = (squares - np.trace(covariance) ** 2 / width) / width
    noise = min(noise, distance)
    return float(noise / distance) if noise > 0 else 0.0
