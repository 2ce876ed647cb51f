"""Merges that look at angles: between two models, around many, and between models and their base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from transferjax.merging._average import weighted
from transferjax.merging._checks import as_number, as_weights
from transferjax.merging._leaf import Leaf
from transferjax.merging._trees import merged, numbered

PARALLEL = 0.9995
"""The cosine beyond which an arc is a line."""
ROUNDS, CONVERGED = 50, 1e-7


def slerp(a: Any, b: Any, t: Any) -> Any:
    """Spherical interpolation: each leaf moves along the arc from ``a`` to ``b``, as one vector.

    With the angle ``w`` between the two leaves, ``(sin((1 - t) w) * a + sin(t w) * b) / sin(w)``; where ``|cos w|`` is
    above 0.9995 it is the line ``(1 - t) * a + t * b``. A leaf of zeros counts as orthogonal to any other.

    Computed in float32 (float64 stays) and returned in the dtype of ``a``; leaves of integers, truth values and PRNG
    keys must be equal. ``t`` and arrays may be traced by JAX; else numpy computes.

    Args:
      a: a tree of arrays, where ``t`` is 0.
      b: a tree equal to it in paths, shapes and dtypes, where ``t`` is 1.
      t: a finite number.

    Returns:
      A tree like ``a``.

    Raises:
      DataError: the trees are not alike or not finite, or ``t`` is no finite number.

    Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.

    >>> import numpy as np
    >>> half = slerp({"bias": np.array([2.0, 0.0])}, {"bias": np.array([0.0, 2.0])}, 0.5)
    >>> half["bias"].round(3)
    array([1.414, 1.414])
    """
    t = as_number("slerp", "t", t)

    def rule(leaf: Leaf) -> Any:
        xp = leaf.xp
        cosine = xp.clip(_cosines(xp, leaf.gram(lambda a, b: [a, b]))[0, 1], -1, 1)
        line = abs(cosine) > PARALLEL
        angle = xp.arccos(xp.where(line, 0.0, cosine))
        arc = [xp.sin((1 - t) * angle) / xp.sin(angle), xp.sin(t * angle) / xp.sin(angle)]
        factors = leaf.scalars([xp.where(line, straight, bent) for straight, bent in zip((1 - t, t), arc)])
        return leaf.map(lambda at, *pair: weighted(factors, pair))

    return merged("slerp", {"a": a, "b": b}, rule, t)


def _cosines(xp: Any, gram: Any) -> Any:
    """The cosines between vectors, from their inner products; those of a vector of zeros are zero."""
    norms = xp.sqrt(xp.diagonal(gram))
    inverse = (norms > 0) / xp.where(norms > 0, norms, 1)
    return gram * inverse[:, None] * inverse[None, :]


def karcher(models: Sequence[Any], weights: Any = None) -> Any:
    """The Karcher mean: of each leaf the direction whose squared angles to the models' sum least, and the mean norm.

    Leaves are vectors on a sphere of their norms; the mean direction is found by gradient steps, of which each is a
    sum of the models, so that only their inner products are needed. Leaves of zeros have no say in the direction.

    Computed in float32 (float64 stays) and returned in the models' dtype; leaves of integers, truth values and PRNG
    keys must be equal. Weights and arrays may be traced by JAX; else numpy computes.

    Args:
      models: trees of arrays, equal in paths, shapes and dtypes.
      weights: ``[n]`` numbers, none below zero, that sum to one; ``None``: equal ones.

    Returns:
      A tree like the first model.

    Raises:
      DataError: the trees are not alike or not finite, or the weights are of another number, sum or sign.

    Source: Karcher, Riemannian center of mass and mollifier smoothing, 1977; for weights of networks arXiv:2603.04972.

    >>> import numpy as np
    >>> mean = karcher([{"bias": np.array([2.0, 0.0])}, {"bias": np.array([0.0, 4.0])}])
    >>> mean["bias"].round(3)
    array([2.121, 2.121])
    """
    trees = numbered("karcher", models)
    weights = as_weights("karcher", weights, len(trees), mean=True, signed=False)

    def rule(leaf: Leaf) -> Any:
        if len(models) == 1:
            return leaf.map(lambda at, model: model)
        factors = leaf.scalars(_on_sphere(leaf, weights))
        return leaf.map(lambda at, *chunks: weighted(factors, chunks))

    return merged("karcher", trees, rule, weights)


def _on_sphere(leaf: Leaf, weights: Any) -> Any:
    """The Karcher mean as coefficients of the models."""
    xp = leaf.xp
    gram = leaf.gram(lambda *chunks: list(chunks))
    norms = xp.sqrt(xp.diagonal(gram))
    alphas = xp.asarray(weights, gram.dtype)
    cosines = _cosines(xp, gram)
    says = alphas * (norms > 0)
    says = says / xp.where(says.sum() > 0, says.sum(), 1)
    square = lambda c: c @ cosines @ c
    unit = lambda c: c / xp.sqrt(xp.where(square(c) > 0, square(c), 1))
    cancels = square(says) < 1e-10  # directions that sum to nothing: begin at the one of most weight
    start = unit(xp.where(cancels, xp.eye(len(alphas))[xp.argmax(says)], says))

    def step(mean: Any) -> tuple[Any, Any]:
        dots = xp.clip(cosines @ mean, -1, 1)
        angles, sines = xp.arccos(dots), xp.sin(xp.arccos(dots))
        pull = says * xp.where(sines < 1e-6, angles < 1, angles / xp.maximum(sines, 1e-6))  # none by an opposite one
        tangent = pull - (pull @ dots) * mean
        length = xp.sqrt(xp.maximum(square(tangent), 0))
        turned = xp.cos(length) * mean + xp.sin(length) * tangent / xp.where(length > 0, length, 1)
        return unit(xp.where(length > CONVERGED, turned, mean)), length

    return (alphas * norms).sum() * _repeated(step, start, leaf.traced) / xp.where(norms > 0, norms, 1)


def _repeated(step: Callable[[Any], tuple[Any, Any]], mean: Any, traced: bool) -> Any:
    """The mean after as many steps as it takes; of what is traced, after all of them."""
    if traced:
        return jax.lax.fori_loop(0, ROUNDS, lambda _, mean: step(mean)[0], mean)
    for _ in range(ROUNDS):
        mean, length = step(mean)
        if length <= CONVERGED:
            break
    return mean


def model_stock(base: Any, models: Sequence[Any]) -> Any:
    """Model Stock: the mean of the models, drawn towards their base as far as they disagree.

    Leaf by leaf, with the mean cosine ``c`` between the models' task vectors, ``t = n c / (1 + (n - 1) c)`` and
    ``t * mean + (1 - t) * base``. Models that go the same way give their mean, orthogonal ones the base.

    Computed in float32 (float64 stays) and returned in the base's dtype; leaves of integers, truth values and PRNG
    keys must be equal. Arrays may be traced by JAX; else numpy computes.

    Args:
      base: the tree that the models were fine-tuned from.
      models: at least two trees equal to it in paths, shapes and dtypes.

    Returns:
      A tree like the base.

    Raises:
      DataError: the trees are not alike or not finite, or there are fewer than two models.

    Source: Jang et al., Model Stock, arXiv:2403.19522.

    >>> import numpy as np
    >>> base, models = {"bias": np.zeros(2)}, [{"bias": np.array([2.0, 1.0])}, {"bias": np.array([2.0, -1.0])}]
    >>> model_stock(base, models)["bias"].round(3)
    array([1.5, 0. ])
    """
    trees = {"base": base, **numbered("model_stock", models, least=2)}
    count = len(models)

    def rule(leaf: Leaf) -> Any:
        xp = leaf.xp
        cosines = _cosines(xp, leaf.gram(lambda base, *models: [model - base for model in models]))
        cosine = (cosines.sum() - xp.trace(cosines)) / (count * (count - 1))
        below = 1 + (count - 1) * cosine
        opposed = abs(below) < 1e-6
        share = leaf.scalars(xp.where(opposed, 0, count * cosine / xp.where(opposed, 1, below)))
        mean = lambda models: sum(models[1:], start=models[0]) / count
        return leaf.map(lambda at, base, *models: share * mean(models) + (1 - share) * base)

    return merged("model_stock", trees, rule)
