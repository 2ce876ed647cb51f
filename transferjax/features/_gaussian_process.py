"""Gaussian process regression as a read-out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError
from transferjax.features._readout import Readout
from transferjax.features._targets import (
    CLASSES,
    as_strengths,
    as_training,
    path_report,
    standardisation,
    standardised,
    to_float32,
    widen,
)

MOST = 5000
NOISES = (1e-3, 1e-2, 1e-1, 1.0)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def gaussian_process(
    features: Any,
    labels: Any,
    *,
    length_scales: Any = None,
    noises: Any = NOISES,
    weights: Any = None,
    num_classes: int | None = None,
    standardise: bool = True,
) -> Readout:
    """The posterior mean of a Gaussian process with kernel ``exp(-.5 * distance**2 / length_scale**2)``.

    For at most 5,000 examples. Each column of the targets (one-hot rows for classes, 1 and -1 for labels) is given
    mean 0 and variance 1 first; the length scale and the variance of the noise, relative to that, are those with the
    largest marginal likelihood, summed over the columns. At fixed ones this is scikit-learn's
    ``GaussianProcessRegressor(RBF(length_scale), alpha=noise, normalize_y=True, optimizer=None)``.

    Args:
      features: ``[N, d]``.
      labels: classes, integers ``[N]``; several labels, booleans or zeros and ones ``[N, K]``; targets, floats
        ``[N]`` or ``[N, K]``.
      length_scales: positive numbers, or one; ``None``: 1/4 to 4 times the median distance of the examples.
      noises: positive numbers, or one.
      weights: ``[N]``: the noise of an example is divided by it, as if it had been seen so often.
      num_classes: columns of the outputs for classes; ``None``: the largest label plus one.
      standardise: give every column mean 0 and variance 1 first.

    Returns:
      A :class:`Readout`; its report has the log marginal likelihood of every pair.

    Raises:
      DataError: an argument cannot be used, or there are more than 5,000 examples.

    Source: Rasmussen and Williams, Gaussian processes for machine learning (2006), chapters 2 and 5.

    >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
    >>> readout = gaussian_process(x, np.array([0.0, 1.0, 0.0, 1.0]), length_scales=0.1, noises=1e-6)
    >>> readout.predict(readout.params, x).round(2).tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    table, targets, counts = as_training(features, labels, weights, num_classes, name="gaussian_process")
    if len(table) > MOST:
        raise DataError(
            f"gaussian_process() is for at most {MOST:,} examples; these are {len(table):,}. Write ridge()."
        )
    shift, scale = standardisation(table, counts, standardise)
    x = (table - shift) * scale
    wanted = targets.matrix if targets.kind == CLASSES else targets.signs
    mean = np.average(wanted, axis=0, weights=counts)
    spread = np.sqrt(np.average((wanted - mean) ** 2, axis=0, weights=counts))
    spread = np.where(spread > 0, spread, 1.0)
    squared = _squared_distances(x)
    lengths = _lengths(squared) if length_scales is None else as_strengths(length_scales, "length_scales")
    tried, best = as_strengths(noises, "noises"), (-np.inf, np.zeros_like(wanted))
    rows: list[tuple[float, float, float]] = []
    chosen = 0
    for length in lengths:
        kernel = np.exp(-0.5 * squared / length**2)
        for noise, likelihood, dual in _posteriors(kernel, (wanted - mean) / spread, counts, tried):
            if likelihood > best[0] or not rows:
                best, chosen = (likelihood, dual), len(rows)
            rows.append((float(length), float(noise), likelihood))
    params = to_float32(
        {
            "shift": shift,
            "scale": scale,
            "examples": x,
            "length_scale": np.asarray(rows[chosen][0]),
            "kernel": widen(targets, best[1] * spread, 0.0),
            "bias": widen(targets, mean, -np.inf),
        }
    )
    columns = ("length scale", "noise", "log marginal likelihood")
    how = "the only one" if len(rows) == 1 else "marginal likelihood"
    facts = {"noise": rows[chosen][1], "examples": len(table)}
    return Readout(_predict, params, path_report("Gaussian process", columns, rows, chosen, how, **facts))


@jax.jit
def _predict(params: Any, features: Any) -> Any:
    x, examples = standardised(params, features), params["examples"]
    across = jnp.matmul(x, examples.T, precision="highest")
    squared = (x * x).sum(1)[:, None] + (examples * examples).sum(1) - 2 * across
    near = jnp.exp(-0.5 * jnp.maximum(squared, 0) / params["length_scale"] ** 2)
    return jnp.matmul(near, params["kernel"], precision="highest") + params["bias"]


def _squared_distances(x: np.ndarray) -> np.ndarray:
    squares = (x * x).sum(axis=1)
    found = np.maximum(squares[:, None] + squares - 2 * (x @ x.T), 0)
    np.fill_diagonal(found, 0)
    return found


def _lengths(squared: np.ndarray) -> np.ndarray:
    """Multiples of the median distance between different examples."""
    return np.sqrt(np.median(squared[squared > 0])) * np.array(FACTORS)


def _posteriors(kernel: np.ndarray, wanted: np.ndarray, weights: np.ndarray, noises: np.ndarray) -> Any:
    """``(noise, log marginal likelihood, dual weights [N, K])`` for every noise, from one eigendecomposition."""
    root = np.sqrt(weights)[:, None]
    values, vectors = np.linalg.eigh(root * kernel * root.T)
    moments = vectors.T @ (root * wanted)
    count, width = wanted.shape
    for noise in noises:
        spectrum = np.maximum(values, 0) + noise
        fits = (moments**2 / spectrum[:, None]).sum()
        volume = np.log(spectrum).sum() - np.log(weights).sum()
        likelihood = -0.5 * (fits + width * (volume + count * np.log(2 * np.pi)))
        yield noise, float(likelihood), root * (vectors @ (moments / spectrum[:, None]))
