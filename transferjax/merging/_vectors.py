"""Task vectors, ``model - base``: added, and trimmed before they are added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transferjax.merging._checks import as_fraction, as_number, as_weights
from transferjax.merging._largest import largest
from transferjax.merging._leaf import Leaf
from transferjax.merging._trees import merged, numbered


def added(leaf: Leaf, weights: Any, scale: Any, masks: Sequence[Any] | None = None) -> Any:
    """``base + scale * sum(weight * mask * (model - base))``.

    Args:
      leaf: the base first.
      masks: per model ``(at, delta) -> mask``.
    """
    factors, scale = leaf.scalars(weights), leaf.scalars(scale)

    def formula(at: Any, base: Any, *models: Any) -> Any:
        total = None
        for number, model in enumerate(models):
            delta = model - base
            if masks is not None:
                delta *= masks[number](at, delta)
            delta *= factors[number]
            total = delta if total is None else total + delta
        return base + scale * total

    return leaf.map(formula)


def task_arithmetic(base: Any, models: Sequence[Any], weights: Any = None, scale: Any = 1.0) -> Any:
    """The base plus its models' task vectors: ``base + scale * sum(weight * (model - base))``.

    A negative weight forgets a task. Computed in float32 (float64 stays) and returned in the base's dtype; leaves of
    integers, truth values and PRNG keys must be equal. Weights, scale and arrays may be traced by JAX; else numpy
    computes.

    Args:
      base: the tree that the models were fine-tuned from.
      models: trees equal to it in paths, shapes and dtypes.
      weights: ``[n]`` finite numbers; ``None``: ones.
      scale: a finite number, called lambda in the paper.

    Returns:
      A tree like the base.

    Raises:
      DataError: the trees are not alike or not finite, or a coefficient is no finite number.

    Source: Ilharco et al., Editing models with task arithmetic, arXiv:2212.04089.

    >>> import numpy as np
    >>> base, models = {"bias": np.ones(2)}, [{"bias": np.array([2.0, 1.0])}, {"bias": np.array([1.0, 3.0])}]
    >>> task_arithmetic(base, models, scale=0.5)
    {'bias': array([1.5, 2. ])}
    """
    trees = {"base": base, **numbered("task_arithmetic", models)}
    factors = as_weights("task_arithmetic", weights, len(models))
    scale = as_number("task_arithmetic", "scale", scale)
    return merged("task_arithmetic", trees, lambda leaf: added(leaf, factors, scale), (weights, scale))


def breadcrumbs(
    base: Any, models: Sequence[Any], weights: Any = None, density: float = 0.9, gamma: float = 0.01, scale: Any = 1.0
) -> Any:
    """Model breadcrumbs: task vectors without their smallest entries and without their outliers.

    Leaf by leaf, of every ``d = model - base`` the ``int(gamma * size)`` entries that are largest in magnitude are
    dropped and the ``int(density * size)`` next ones are kept; where not so many are left, fewer outliers are dropped.
    Of equal entries those that come first count as the larger. Then ``base + scale * sum(weight * d)``.

    Computed in float32 (float64 stays) and returned in the base's dtype; leaves of integers, truth values and PRNG
    keys must be equal. Weights, scale and arrays may be traced by JAX; else numpy computes.

    Args:
      base: the tree that the models were fine-tuned from.
      models: trees equal to it in paths, shapes and dtypes.
      weights: ``[n]`` finite numbers; ``None``: ones.
      density: the share of entries that is kept, in [0, 1].
      gamma: the share of the largest entries that is dropped, in [0, 1].
      scale: a finite number.

    Returns:
      A tree like the base.

    Raises:
      DataError: the trees are not alike or not finite, or a coefficient is not as above.

    Source: Davari & Belilovsky, Model breadcrumbs, arXiv:2312.06795.

    >>> import numpy as np
    >>> breadcrumbs({"bias": np.zeros(4)}, [{"bias": np.array([9.0, 2.0, -3.0, 0.1])}], density=0.5, gamma=0.25)
    {'bias': array([ 0.,  2., -3.,  0.])}
    """
    trees = {"base": base, **numbered("breadcrumbs", models)}
    weights = as_weights("breadcrumbs", weights, len(models))
    density, gamma = (as_fraction("breadcrumbs", n, v) for n, v in (("density", density), ("gamma", gamma)))
    scale = as_number("breadcrumbs", "scale", scale)

    def rule(leaf: Leaf) -> Any:
        kept = int(density * leaf.size)
        outliers = min(int(gamma * leaf.size), leaf.size - kept)
        return added(leaf, weights, scale, [_middle(leaf, n, outliers, kept) for n in range(1, len(leaf))])

    return merged("breadcrumbs", trees, rule, (weights, scale))


def _middle(leaf: Leaf, number: int, outliers: int, kept: int) -> Any:
    """The ``kept`` largest entries after the first ``outliers``."""
    most, top = largest(leaf, number, outliers + kept), largest(leaf, number, outliers)

    def mask(at: Any, delta: Any) -> Any:
        magnitudes = leaf.xp.abs(delta)
        return most(at, magnitudes) & ~top(at, magnitudes)

    return mask
