"""Principal components of many examples, and mixtures of Gaussians by EM from a start without randomness."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from transferjax.numerics._covariance import row_chunks, spectrum

ROWS = 1 << 21  # numbers of a chunk's log-probabilities and differences


def principal_scores(
    features: np.ndarray, *, energy: float | None = None, count: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Examples in the basis of their principal components.

    Args:
      features: ``[N, d]``, float32 or float64.
      energy: keep the fewest components that hold this share of the variance.
      count: keep at most this many.

    Returns:
      ``(float64 [N, k], float64 [k])``: the scores, and the variances (divided by ``N``), the largest first.

    >>> principal_scores(np.array([[1.0, 0.0], [3.0, 0.0]]))[1].tolist()
    [1.0]
    """
    found = spectrum(features, centre=True)
    values = found.values[::-1] / len(features)
    kept = len(values) if count is None else min(count, len(values))
    if energy is not None:
        shares = np.cumsum(values) / values.sum()
        kept = min(kept, int(np.searchsorted(shares, energy, side="right")) + 1)
    if found.left is not None:
        return found.left[:, ::-1][:, :kept] * np.sqrt(found.values[::-1][:kept]), values[:kept]
    assert found.right is not None
    basis = found.right[:, ::-1][:, :kept]
    scores = np.empty((len(features), kept))
    for rows, part in row_chunks(features, found.mean):
        scores[rows] = part @ basis
    return scores, values[:kept]


class Mixture(NamedTuple):
    """A mixture of Gaussians with full covariances.

    Attributes:
      weights: float64 ``[K]``.
      means: float64 ``[K, d]``.
      precisions: float64 ``[K, d, d]``: the inverses of the covariances' Cholesky factors, lower triangles.
      likelihood: the mean log-likelihood of an example, as it was before the last step of EM.
    """

    weights: np.ndarray
    means: np.ndarray
    precisions: np.ndarray
    likelihood: float = -np.inf


def gaussian_mixture(
    points: np.ndarray,
    components: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    floor: float = 1e-6,
    start: np.ndarray | None = None,
) -> Mixture:
    """A mixture of Gaussians by EM.

    Args:
      points: float64 ``[N, d]``.
      components: at most this many; points that are all alike are not divided.
      iterations: the most.
      tolerance: stop when the mean log-likelihood grows by less.
      floor: added to every variance, as a share of the points' mean variance.
      start: integers ``[N]``: the component that each point begins in; default :func:`divide`.

    Source: Dempster, Laird & Rubin, Maximum likelihood from incomplete data via the EM algorithm, 1977.

    >>> gaussian_mixture(np.array([[0.0], [1.0], [9.0], [10.0]]), 2).means.ravel().round(6).tolist()
    [0.5, 9.5]
    """
    floor = floor * float(points.var(axis=0).mean()) + np.finfo(np.float64).tiny
    codes = divide(points, components) if start is None else start
    mixture = _from_codes(points, codes, floor)
    before = -np.inf
    for _ in range(iterations):
        mixture = _step(points, mixture, floor)
        if abs(mixture.likelihood - before) < tolerance:
            break
        before = mixture.likelihood
    return mixture


def responsibilities(mixture: Mixture, points: np.ndarray) -> np.ndarray:
    """The probability of every component given each point, float64 ``[N, K]``.

    >>> mixture = gaussian_mixture(np.array([[0.0], [1.0], [9.0], [10.0]]), 2)
    >>> responsibilities(mixture, np.array([[0.2]])).round(6).tolist()
    [[1.0, 0.0]]
    """
    found = np.empty((len(points), len(mixture.weights)))
    step = _rows(mixture)
    for begin in range(0, len(points), step):
        found[begin : begin + step] = _posterior(mixture, points[begin : begin + step])[0]
    return found


def divide(points: np.ndarray, parts: int) -> np.ndarray:
    """Divides points by their principal directions: the part of the largest spread is cut at its mean, again and again.

    Nothing is drawn: the parts do not depend on the order of the points, nor on a rotation.

    Args:
      points: float64 ``[N, d]``.
      parts: at most this many; fewer where points coincide.

    Returns:
      The part of each point, integers ``[N]``.

    Source: Su & Dy, In search of deterministic methods for initializing K-means and Gaussian mixture clustering, 2007.

    >>> sorted(divide(np.array([[0.0], [1.0], [9.0], [10.0]]), 2).tolist())
    [0, 0, 1, 1]
    """
    codes = np.zeros(len(points), np.int64)
    spread = [_spread(points)]
    while len(spread) < parts:
        widest = int(np.argmax(spread))
        if spread[widest] <= 0:
            break
        rows = np.flatnonzero(codes == widest)
        offset = points[rows] - points[rows].mean(axis=0)
        direction = np.linalg.eigh(offset.T @ offset)[1][:, -1]
        side = offset @ direction > 0
        if side.all() or not side.any():
            spread[widest] = 0.0
            continue
        codes[rows[side]] = len(spread)
        spread[widest] = _spread(points[rows[~side]])
        spread.append(_spread(points[rows[side]]))
    return codes


def _spread(points: np.ndarray) -> float:
    return float(np.square(points - points.mean(axis=0)).sum()) if (points != points[0]).any() else 0.0


def _rows(mixture: Mixture) -> int:
    return max(64, ROWS // (len(mixture.weights) + mixture.means.shape[1]))


def _from_codes(points: np.ndarray, codes: np.ndarray, floor: float) -> Mixture:
    count, width = int(codes.max()) + 1, points.shape[1]
    means, covariances = np.empty((count, width)), np.empty((count, width, width))
    for k in range(count):
        part = points[codes == k]
        means[k] = part.mean(axis=0)
        covariances[k] = (part - means[k]).T @ (part - means[k]) / len(part)
    return _mixture(np.bincount(codes) / len(points), means, covariances, floor, -np.inf)


def _mixture(weights: np.ndarray, means: np.ndarray, covariances: np.ndarray, floor: float, at: float) -> Mixture:
    width = means.shape[1]
    covariances.reshape(len(means), -1)[:, :: width + 1] += floor
    return Mixture(weights, means, np.linalg.inv(np.linalg.cholesky(covariances)), at)


def _posterior(mixture: Mixture, points: np.ndarray) -> tuple[np.ndarray, float]:
    """Responsibilities ``[n, K]``, and the sum of the points' log-likelihoods."""
    width = points.shape[1]
    log = np.empty((len(points), len(mixture.weights)))
    for k, (mean, factor) in enumerate(zip(mixture.means, mixture.precisions)):
        log[:, k] = np.log(np.diagonal(factor)).sum() - 0.5 * np.square((points - mean) @ factor.T).sum(axis=1)
    with np.errstate(divide="ignore"):
        log += np.log(mixture.weights) - 0.5 * width * np.log(2 * np.pi)
    highest = log.max(axis=1, keepdims=True)
    np.exp(log - highest, out=log)
    total = log.sum(axis=1, keepdims=True)
    return log / total, float((np.log(total) + highest).sum())


def _step(points: np.ndarray, mixture: Mixture, floor: float) -> Mixture:
    """One step of EM, some points at a time; second moments are taken about the old means."""
    count, width = mixture.means.shape
    mass, shifts, seconds = np.zeros(count), np.zeros((count, width)), np.zeros((count, width, width))
    likelihood = 0.0
    step = _rows(mixture)
    for begin in range(0, len(points), step):
        part = points[begin : begin + step]
        weights, found = _posterior(mixture, part)
        likelihood += found
        mass += weights.sum(axis=0)
        for k in range(count):
            offset = part - mixture.means[k]
            weighted = offset * weights[:, k : k + 1]
            shifts[k] += weighted.sum(axis=0)
            seconds[k] += weighted.T @ offset
    safe = np.maximum(mass, 10 * np.finfo(np.float64).eps)[:, None]
    shifts /= safe
    seconds = seconds / safe[..., None] - shifts[:, :, None] * shifts[:, None, :]
    return _mixture(mass / len(points), mixture.means + shifts, seconds, floor, likelihood / len(points))
