"""Optimal transport as a map of features, solved by ott-jax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import TransferError, is_whole
from transferjax._report import Report
from transferjax.features._affine import check_width, moments
from transferjax.features._maps import FeatureMap
from transferjax.numerics._tables import as_weights

ONLINE = 1 << 26  # from this many costs on they are computed again instead of kept


def optimal_transport(
    source: Any,
    target: Any,
    *,
    epsilon: float = 0.05,
    source_weights: Any = None,
    target_weights: Any = None,
    iterations: int = 2000,
) -> FeatureMap:
    """Carries the source's features onto the target's at the least squared distance, by entropic optimal transport.

    The map is the entropic one: each point goes to a mean of target points, whose weights follow from the dual
    potential, so that it applies to new points too. On the source points it is the barycentric projection.

    Args:
      source: ``[N, d]``, features of the source domain.
      target: ``[M, d]``, features of the target domain; the map holds them.
      epsilon: the entropy's weight, as a share of the sum of both domains' variances: small is sharp and slow.
      source_weights: ``[N]``, the mass of every example; ``None``: equal.
      target_weights: ``[M]``, likewise.
      iterations: at most so many of Sinkhorn's.

    Returns:
      A :class:`FeatureMap`; the report holds the mean squared distance of the plan, the iterations and the largest
      error of its marginals.

    Raises:
      DataError: the widths differ, or features or weights cannot be used.
      TransferError: ott-jax is missing, ``epsilon`` or ``iterations`` is not above 0, or Sinkhorn does not converge.

    Source: Courty et al., Optimal Transport for Domain Adaptation, 2017, arXiv:1507.00504; the map: Pooladian &
      Niles-Weed, Entropic estimation of optimal transport maps, 2021, arXiv:2109.12004.

    >>> import importlib.util
    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> if importlib.util.find_spec("ott"):
    ...     found = optimal_transport(x, x + 10.0, epsilon=0.01)
    ...     assert np.allclose(found.apply(found.params, x), x + 10.0, atol=1e-3)
    """
    try:
        from ott.geometry.pointcloud import PointCloud  # pyright: ignore[reportMissingImports]
        from ott.problems.linear.linear_problem import LinearProblem  # pyright: ignore[reportMissingImports]
        from ott.solvers.linear.sinkhorn import Sinkhorn  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TransferError(
            "optimal_transport() needs ott-jax, which is not installed: pip install 'transferjax[transport]'."
        ) from None
    (source, _, _), (target, _, _) = moments(source, "source"), moments(target, "target")
    check_width("optimal_transport", source, target)
    masses = [as_weights(given, len(part)) for given, part in ((source_weights, source), (target_weights, target))]
    (source, first), (target, second) = (
        (part[mass > 0], mass[mass > 0] / mass.sum()) for part, mass in zip((source, target), masses)
    )
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not epsilon > 0:
        raise TransferError(f"optimal_transport() expects epsilon, a number above 0, got {epsilon!r}.")
    if not is_whole(iterations):
        raise TransferError(f"optimal_transport() expects iterations, a whole number above 0, got {iterations!r}.")
    # A shift of either domain changes no plan: without it the costs are small and the entropy's weight fits them.
    mean, other = first @ np.asarray(source, np.float64), second @ np.asarray(target, np.float64)
    x, y = source - mean, target - other
    level = epsilon * float(first @ (x**2).sum(1) + second @ (y**2).sum(1))
    with jax.enable_x64(True):
        batch = 1024 if len(x) * len(y) > ONLINE else None
        cloud = PointCloud(jnp.asarray(x), jnp.asarray(y), epsilon=level, batch_size=batch)
        problem = LinearProblem(cloud, a=jnp.asarray(first), b=jnp.asarray(second))
        solved = Sinkhorn(threshold=1e-4, max_iterations=int(iterations))(problem)
        potential = np.asarray(solved.g)
        distance = float(solved.primal_cost) + float(np.square(mean - other).sum())
        error = max(float(jnp.abs(solved.marginal(axis=n) - mass).sum()) for n, mass in ((1, first), (0, second)))
        converged, taken = bool(solved.converged), int(solved.n_iters)
    if not converged or not np.isfinite(distance):
        raise TransferError(
            f"optimal_transport() did not converge in {taken} iterations: the marginals are off by {error:.2g}. "
            "Expected at most 0.0001: pass a larger epsilon or more iterations."
        )
    params = {
        "mean": mean,
        "points": y,
        "target": np.asarray(target, np.float64),
        "offsets": (potential - (y**2).sum(1)) / level,
        "sharpness": np.float64(2 / level),
    }
    facts = {"source": len(x), "target": len(y), "epsilon": level, "mean squared distance": distance}
    facts |= {"iterations": taken, "error of the marginals": error}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    return FeatureMap(_entropic, params, Report("Optimal transport", (), (), facts))


def _entropic(params: Any, x: Any) -> Any:
    """The mean of the target's points under the weights of the entropic plan; ``|x|^2`` cancels in the softmax."""
    precise = jax.lax.Precision.HIGHEST
    closeness = jnp.matmul(jnp.asarray(x) - params["mean"], params["points"].T, precision=precise)
    weights = jax.nn.softmax(params["sharpness"] * closeness + params["offsets"])
    return jnp.matmul(weights, params["target"], precision=precise)
