"""TIES: what task vectors agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax.merging._checks import as_fraction, as_number, as_weights
from transferjax.merging._largest import is_kept, largest
from transferjax.merging._leaf import Leaf, magnitude
from transferjax.merging._trees import merged, numbered


def ties(base: Any, models: Sequence[Any], weights: Any = None, density: float = 0.2, scale: Any = 1.0) -> Any:
    """TIES: of each task vector the largest entries, and of these the ones that agree in sign.

    Leaf by leaf: of every ``d = model - base`` the ``int(density * size)`` entries that are largest in magnitude are
    kept (of equal ones those that come first), and multiplied by the model's weight. The sign of their sum is elected,
    zero counting as positive. The entries of that sign are summed, divided by the sum of their weights, and added to
    the base, times ``scale``. A leaf of fewer than ``1 / density`` elements keeps the base's values.

    Computed in float32 (float64 stays) and returned in the base's dtype; leaves of integers, truth values and PRNG
    keys must be equal. Weights, scale and arrays may be traced by JAX; else numpy computes, and large leaves a program
    that JAX compiles for the CPU (4 million elements or more; numbers below 1.2e-38 count as zero there).

    Args:
      base: the tree that the models were fine-tuned from.
      models: trees equal to it in paths, shapes and dtypes.
      weights: ``[n]`` finite numbers; ``None``: ones.
      density: the share of entries that is kept, in [0, 1].
      scale: a finite number, called lambda in the paper.

    Returns:
      A tree like the base.

    Raises:
      DataError: the trees are not alike or not finite, or a coefficient is not as above.

    Source: Yadav et al., TIES-merging, arXiv:2306.01708.

    >>> import numpy as np
    >>> base = {"bias": np.zeros(4)}
    >>> models = [{"bias": np.array([4.0, 3.0, 0.1, 0.0])}, {"bias": np.array([-1.0, 5.0, 0.0, 0.2])}]
    >>> ties(base, models, density=0.5)
    {'bias': array([4., 4., 0., 0.])}
    """
    trees = {"base": base, **numbered("ties", models)}
    weights = as_weights("ties", weights, len(models))
    density, scale = as_fraction("ties", "density", density), as_number("ties", "scale", scale)

    def rule(leaf: Leaf) -> Any:
        cuts = [largest(leaf, number, int(density * leaf.size)) for number in range(1, len(leaf))]
        factors, factor = leaf.scalars(weights), leaf.scalars(scale)

        def formula(at: Any, base: Any, *models: Any) -> Any:
            masks = [lambda delta, cut=cut: cut(at, leaf.xp.abs(delta)) for cut in cuts]
            return _elected(base, models, masks, factors, factor)

        def program(at: slice, *chunks: Any) -> Any:
            thresholds, lasts = zip(*(cut.within(at) for cut in cuts))
            return _program(leaf.scalars(thresholds), np.asarray(lasts, np.int32), factors, factor, *chunks)

        return leaf.map(formula, program=program)

    return merged("ties", trees, rule, (weights, scale))


def _elected(base: Any, models: Sequence[Any], masks: Sequence[Any], factors: Any, factor: Any) -> Any:
    """The base plus the mean of the differences that ``masks`` keep and that have the elected sign."""
    kept = []
    for model, mask, weight in zip(models, masks, factors):
        delta = model - base
        delta *= mask(delta)
        delta *= weight
        kept.append(delta)
    up = sum(kept[1:], start=kept[0]) >= 0
    total = count = factor * 0
    for delta, weight in zip(kept, factors):
        agrees = ((delta > 0) == up) & (delta != 0)
        delta *= agrees
        total = total + delta
        count = count + agrees * weight
    total = factor * (total / (count + (count == 0)))
    return base + total


@jax.jit
def _program(thresholds: Any, lasts: Any, factors: Any, factor: Any, base: Any, *models: Any) -> Any:
    """A chunk of :func:`ties` in one pass; the largest magnitudes in arrays and differences, and in the result."""
    masks = [lambda delta, at=at: is_kept(jnp.abs(delta), *at) for at in zip(thresholds, lasts)]
    out = _elected(base, models, masks, factors, factor)
    return out, magnitude(base, *models, *(model - base for model in models)), magnitude(out)
