"""Principal components and whitening as maps of features."""

from __future__ import annotations

from typing import Any

import numpy as np

from transferjax._errors import TransferError
from transferjax._report import Report
from transferjax.features._affine import affine, affine_params, check_dims, check_ridge, leading, moments, power
from transferjax.features._maps import FeatureMap


def pca(features: Any, dims_or_energy: int | float) -> FeatureMap:
    """The directions along which features vary most.

    Args:
      features: ``[N, d]``, numpy or jax.
      dims_or_energy: a whole number: how many directions; a float in (0, 1]: as many as hold this share of the
        variance. The largest entry of each direction is positive.

    Returns:
      A :class:`FeatureMap`, ``[..., d] -> [..., dims]``; the report has a row per direction: its variance (divided by
      ``N - 1``), its share, and the share of all up to it.

    Raises:
      DataError: the features are too few, all alike, or not finite.
      TransferError: more directions than columns, not fewer than examples, or no share of the variance.

    Source: Pearson, On lines and planes of closest fit to systems of points in space, 1901.

    >>> x = np.random.default_rng(0).normal(size=(50, 3)) * [5.0, 2.0, 0.01]
    >>> len(pca(x, 0.99).report.rows), pca(x, 1).params["kernel"].shape
    (2, (3, 1))
    """
    table, mean, covariance = moments(features, "features")
    most = min(table.shape[1], len(table) - 1)
    if isinstance(dims_or_energy, float):
        if not 0 < dims_or_energy <= 1:
            raise TransferError(
                f"pca() expects a whole number of directions, or a float in (0, 1], the share of the variance to keep; "
                f"got {dims_or_energy}."
            )
        values, vectors = leading(covariance, most)
        held = np.cumsum(values) / values.sum()
        dims = min(int(np.searchsorted(held, dims_or_energy - 1e-12)) + 1, most)
    else:
        check_dims("pca", dims_or_energy, most)
        dims = int(dims_or_energy)
        values, vectors = leading(covariance, dims)
    total = float(np.trace(covariance))
    parts = values[:dims] / total
    rows = tuple(
        (n, float(value), float(part), float(whole))
        for n, (value, part, whole) in enumerate(zip(values, parts, np.cumsum(parts)), start=1)
    )
    facts = {"examples": len(table), "width": table.shape[1], "dims": dims}
    report = Report("PCA", ("direction", "variance", "share", "so far"), rows, facts)
    return FeatureMap(affine, affine_params(mean, vectors[:, :dims]), report)


def whiten(features: Any, *, ridge: float = 1e-6) -> FeatureMap:
    """Features of mean 0 and covariance 1, as close to the original ones as that allows (ZCA).

    Args:
      features: ``[N, d]``, numpy or jax.
      ridge: added to the diagonal of the covariance, as a share of the mean variance; 0: none, and directions without
        variance become 0.

    Returns:
      A :class:`FeatureMap`, ``[..., d] -> [..., d]``; the report holds the largest factor by which a direction grows.

    Raises:
      DataError: the features are too few, all alike, or not finite.
      TransferError: ``ridge`` is negative.

    Source: Bell & Sejnowski, The independent components of natural scenes are edge filters, 1997.

    >>> x = np.random.default_rng(0).normal(size=(500, 2)) @ np.array([[3.0, 1.0], [0.0, 0.5]])
    >>> found = whiten(x)
    >>> (np.round(np.cov(found.apply(found.params, x), rowvar=False), 3) + 0.0).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    check_ridge("whiten", ridge)
    table, mean, covariance = moments(features, "features")
    kernel = power(covariance, -0.5, ridge)
    facts = {"examples": len(table), "ridge": ridge, "largest factor": float(np.linalg.norm(kernel, 2))}
    return FeatureMap(affine, affine_params(mean, kernel), Report("Whitening", (), (), facts))
