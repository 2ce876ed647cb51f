"""Maps between unlike feature spaces in closed form: CORAL, Procrustes, ridge, CCA, subspace alignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from transferjax._errors import TransferError
from transferjax._report import Report
from transferjax.features._affine import (
    affine,
    affine_params,
    check_dims,
    check_ridge,
    check_width,
    cross,
    leading,
    moments,
    paired,
    power,
    signs,
)
from transferjax.numerics._covariance import column_mean
from transferjax.numerics._ridge import Ridge, decompose_ridge, left_out_ridge, solve_ridge


class FeatureMap(NamedTuple):
    """A map of features, fitted exactly.

    Attributes:
      apply: ``(params, x [..., d]) -> y [..., k]``, pure, and fit for ``jax.jit``.
      params: a dict of float32 arrays. Maps into a space between two domains hold the other domain's map under
        ``target``: ``apply(params["target"], y)``.
      report: what was fitted, and how well.

    >>> found = procrustes(np.eye(3), np.eye(3)[:, [1, 2, 0]])
    >>> np.round(found.apply(found.params, np.array([[1.0, 0.0, 0.0]]))).tolist()
    [[0.0, 0.0, 1.0]]
    """

    apply: Callable[[Any, Any], Any]
    params: Any
    report: Report


def coral(source: Any, target: Any, *, ridge: float = 1e-3) -> FeatureMap:
    """Re-colours source features: their mean and covariance become the target's.

    ``(x - mean_s) C_s^(-1/2) C_t^(1/2) + mean_t``.

    Args:
      source: ``[N, d]``, features of the source domain, numpy or jax.
      target: ``[M, d]``, features of the target domain.
      ridge: added to the diagonal of each covariance, as a share of its mean variance; directions that the source
        hardly uses are not blown up. The authors take 1, on standardised features.

    Returns:
      A :class:`FeatureMap`. The report holds the distance of the covariances before and after, relative to the
      target's, and the largest factor by which a direction grows.

    Raises:
      DataError: the widths differ, or a domain has fewer than two examples, no variance, or numbers that are not
        finite.
      TransferError: ``ridge`` is not above 0.

    Source: Sun, Feng & Saenko, Return of Frustratingly Easy Domain Adaptation, 2016, arXiv:1511.05547, algorithm 1.

    >>> source = np.random.default_rng(0).normal(size=(200, 2))
    >>> found = coral(source, source * [1.0, 3.0] + 5.0)
    >>> np.round(found.apply(found.params, source).std(0) / source.std(0), 1).tolist()
    [1.0, 3.0]
    """
    check_ridge("coral", ridge, above=True)
    (source, mean, before), (target, other, wanted) = moments(source, "source"), moments(target, "target")
    check_width("coral", source, target)
    whitened, coloured = power(before, -0.5, ridge), power(wanted, 0.5, ridge)
    kernel = whitened @ coloured
    after = kernel.T @ before @ kernel
    size = np.linalg.norm(wanted)
    rows = (
        ("before", float(np.linalg.norm(before - wanted) / size)),
        ("after", float(np.linalg.norm(after - wanted) / size)),
    )
    facts = {"source": len(source), "target": len(target), "ridge": ridge}
    facts["largest factor"] = float(np.linalg.norm(kernel, 2))
    return FeatureMap(
        affine, affine_params(mean, kernel, other), Report("CORAL", ("covariances", "distance"), rows, facts)
    )


def procrustes(x: Any, y: Any, *, scale: bool = False, centre: bool = True) -> FeatureMap:
    """The rotation (or reflection) that carries one set of features closest to another, row by row.

    Args:
      x: ``[N, d]``.
      y: ``[N, d]``, of the same examples in the same order.
      scale: whether all distances may be multiplied by one factor, too.
      centre: whether the means are taken off first and put back after; without it the map is a pure rotation.

    Returns:
      A :class:`FeatureMap`; the report holds the factor and the share of the variance of ``y`` that is met.

    Raises:
      DataError: the numbers of examples or the widths differ, or features are constant or not finite.

    Source: Schoenemann, A generalized solution of the orthogonal Procrustes problem, 1966.

    >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    >>> found = procrustes(x, 3.0 * x[:, ::-1] + 1.0, scale=True)
    >>> round(found.report.metadata["factor"], 6), round(found.report.metadata["met"], 6)
    (3.0, 1.0)
    """
    x, y = paired(x, y)
    check_width("procrustes", x, y)
    means = [column_mean(part) if centre else np.zeros(part.shape[1]) for part in (x, y)]
    left, values, right = np.linalg.svd(cross(x, y, means[0], means[1]))
    sizes = [float(np.square(np.asarray(part, np.float64) - mean).sum()) for part, mean in zip((x, y), means)]
    factor = float(values.sum() / sizes[0]) if scale else 1.0
    met = 1 - (sizes[1] - 2 * factor * values.sum() + factor**2 * sizes[0]) / sizes[1]
    facts = {"examples": len(x), "width": x.shape[1], "factor": factor, "met": float(met)}
    params = affine_params(means[0], factor * (left @ right), means[1])
    return FeatureMap(affine, params, Report("Procrustes", (), (), facts))


def ridge_map(x: Any, y: Any, strengths: Sequence[float] | None = None) -> FeatureMap:
    """The linear map with intercept that predicts one set of features from another, by ridge regression.

    The strength is the one with the smallest leave-one-out error, which is exact: a residual divided by one minus the
    example's leverage.

    Args:
      x: ``[N, d]``.
      y: ``[N, k]``, of the same examples in the same order.
      strengths: added to the eigenvalues of the scatter ``X'X`` (of centred features), each above 0; ``None``: 17
        from 1e-6 to 100 times the largest one.

    Returns:
      A :class:`FeatureMap`. The report has a row per strength: its mean squared leave-one-out error, and the share of
      the variance of ``y`` that is met when predicted that way; the metadata the choice.

    Raises:
      DataError: the numbers of examples differ, or features are constant or not finite.
      TransferError: there is no strength, or one is not above 0.

    Source: Golub, Heath & Wahba, Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter, 1979.

    >>> x = np.random.default_rng(0).normal(size=(50, 3))
    >>> found = ridge_map(x, x @ np.ones((3, 2)) + 7.0)
    >>> np.round(found.apply(found.params, np.ones((1, 3))), 3).tolist()
    [[10.0, 10.0]]
    """
    x, y = paired(x, y)
    found = decompose_ridge(x, np.asarray(y, np.float64), np.ones(len(x)))
    total = float((found.targets**2).sum())
    tried = (
        _largest(found) * np.logspace(-6, 2, 17) if strengths is None else np.asarray(strengths, np.float64).reshape(-1)
    )
    if not tried.size or not (tried > 0).all() or not np.isfinite(tried).all():
        raise TransferError("ridge_map() expects strengths above 0, at least one. Write strengths=[0.1, 1.0].")
    left_out = left_out_ridge(found, tried)
    errors = [float(((predicted - found.targets - found.means[1]) ** 2).mean()) for predicted in left_out]
    best = int(np.argmin(errors))
    kernel, _ = solve_ridge(found, tried[best])
    rows = tuple((float(s), e, 1 - e * y.size / total) for s, e in zip(tried, errors))
    facts = {"strength": float(tried[best]), "chosen by": "exact leave-one-out", "examples": len(x)}
    if len(tried) > 1 and best in (0, len(tried) - 1):
        facts["note"] = "the best strength is the first or last one tried"
    report = Report("Ridge map", ("strength", "leave-one-out error", "met"), rows, facts)
    return FeatureMap(affine, affine_params(found.means[0], kernel, found.means[1]), report)


def _largest(found: Ridge) -> float:
    """The largest eigenvalue of the scatter; in the dual form the largest one in the decomposition is the bias's."""
    return float(np.sort(found.values)[-2 if found.dual else -1])


def cca(x: Any, y: Any, dims: int, *, ridge: float = 1e-3) -> FeatureMap:
    """Canonical correlation: the directions of two sets of features that go together, scaled to unit variance.

    Args:
      x: ``[N, d]``.
      y: ``[N, k]``, of the same examples in the same order.
      dims: how many pairs of directions.
      ridge: added to the diagonal of each covariance, as a share of its mean variance; 0 for none.

    Returns:
      A :class:`FeatureMap` of ``x`` into the common space, ``[..., dims]``; ``apply(params["target"], y)`` maps ``y``
      there. The report has a row per pair: the correlation of the two on the examples.

    Raises:
      DataError: the numbers of examples differ, or features are constant or not finite.
      TransferError: ``dims`` is above the widths or not below the number of examples, or ``ridge`` is negative.

    Source: Hotelling, Relations between two sets of variates, 1936; regularised after Vinod, Canonical ridge, 1976.

    >>> x = np.random.default_rng(0).normal(size=(100, 3))
    >>> [round(row[1], 3) for row in cca(x, x[:, :2] @ np.ones((2, 2)), 1).report.rows]
    [1.0]
    """
    check_ridge("cca", ridge)
    x, y = paired(x, y)
    check_dims("cca", dims, min(x.shape[1], y.shape[1], len(x) - 1))
    (_, mean, one), (_, other, two) = moments(x, "x"), moments(y, "y")
    roots = [power(part, -0.5, ridge) for part in (one, two)]
    across = cross(x, y, mean, other) / (len(x) - 1)
    left, _, right = np.linalg.svd(roots[0] @ across @ roots[1], full_matrices=False)
    kernels = [roots[0] @ left[:, :dims], roots[1] @ right[:dims].T]
    sign = signs(kernels[0])
    variances = [np.maximum(np.einsum("di,de,ei->i", k, c, k), 1e-300) for k, c in zip(kernels, (one, two))]
    kernels = [kernel * sign / np.sqrt(variance) for kernel, variance in zip(kernels, variances)]
    correlations = np.einsum("di,de,ei->i", kernels[0], across, kernels[1])
    rows = tuple((n, float(value)) for n, value in enumerate(correlations, start=1))
    params = {**affine_params(mean, kernels[0]), "target": affine_params(other, kernels[1])}
    return FeatureMap(
        affine, params, Report("CCA", ("pair", "correlation"), rows, {"ridge": ridge, "examples": len(x)})
    )


def subspace_alignment(source: Any, target: Any, dims: int) -> FeatureMap:
    """The source's principal directions turned onto the target's: ``x P_s P_s' P_t`` is compared with ``y P_t``.

    Args:
      source: ``[N, d]``, features of the source domain.
      target: ``[M, d]``, features of the target domain.
      dims: how many directions.

    Returns:
      A :class:`FeatureMap` of the source into the target's subspace, ``[..., dims]``;
      ``apply(params["target"], y)`` maps the target there. The report has a row per direction: the share of either
      domain's variance, and the cosine of the angle between the two subspaces.

    Raises:
      DataError: the widths differ, or features are constant or not finite.
      TransferError: ``dims`` is above the width or not below the numbers of examples.

    Source: Fernando et al., Unsupervised Visual Domain Adaptation Using Subspace Alignment, 2013.

    >>> x = np.random.default_rng(0).normal(size=(50, 3)) * [5.0, 2.0, 0.1]
    >>> found = subspace_alignment(x, x, 2)
    >>> bool(np.allclose(found.apply(found.params, x), found.apply(found.params["target"], x), atol=1e-5))
    True
    """
    (source, mean, one), (target, other, two) = moments(source, "source"), moments(target, "target")
    check_width("subspace_alignment", source, target)
    check_dims("subspace_alignment", dims, min(source.shape[1], len(source) - 1, len(target) - 1))
    (values, own), (others, theirs) = (leading(covariance, dims) for covariance in (one, two))
    angles = np.linalg.svd(own.T @ theirs, compute_uv=False)
    rows = tuple(
        (n, float(a / np.trace(one)), float(b / np.trace(two)), float(min(c, 1.0)))
        for n, (a, b, c) in enumerate(zip(values, others, angles), start=1)
    )
    params = {**affine_params(mean, own @ (own.T @ theirs)), "target": affine_params(other, theirs)}
    columns = ("direction", "source variance", "target variance", "cosine")
    facts = {"source": len(source), "target": len(target)}
    return FeatureMap(affine, params, Report("Subspace alignment", columns, rows, facts))
