"""Means of models: soups, a line between two, and means weighted by what each entry matters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from transferjax._report import Report
from transferjax.merging._checks import as_number, as_weights
from transferjax.merging._leaf import Leaf, is_traced
from transferjax.merging._trees import alike, merged, numbered


def soup(models: Sequence[Any], weights: Any = None) -> Any:
    """The mean of models, entry by entry.

    Computed in float32 (float64 stays) and returned in the models' dtype; leaves of integers, truth values and PRNG
    keys must be equal. With JAX arrays, or weights, that are traced it is one program of XLA; else numpy computes.

    Args:
      models: trees of arrays, equal in paths, shapes and dtypes.
      weights: ``[n]`` numbers that sum to one (where they are traced and do not, the result is NaN); ``None``: equal
        ones.

    Returns:
      A tree like the first model.

    Raises:
      DataError: the trees are not alike or not finite, or the weights are of another number or sum.

    Source: Wortsman et al., Model soups, arXiv:2203.05482.

    >>> import numpy as np
    >>> soup([{"bias": np.zeros(2)}, {"bias": np.array([2.0, 4.0])}])
    {'bias': array([1., 2.])}
    >>> soup([{"bias": np.zeros(2)}, {"bias": np.array([2.0, 4.0])}], [0.75, 0.25])
    {'bias': array([0.5, 1. ])}
    """
    trees = numbered("soup", models)
    shares = as_weights("soup", weights, len(trees), mean=True)

    def rule(leaf: Leaf) -> Any:
        if weights is None:
            return leaf.map(lambda at, *chunks: sum(chunks[1:], start=chunks[0]) / len(chunks))
        factors = leaf.scalars(shares)
        return leaf.map(lambda at, *chunks: weighted(factors, chunks))

    return merged("soup", trees, rule, weights)


def weighted(factors: Any, chunks: Sequence[Any]) -> Any:
    """The sum of chunks, each times its factor."""
    out = factors[0] * chunks[0]
    for factor, chunk in zip(factors[1:], chunks[1:], strict=True):
        out += factor * chunk
    return out


def greedy_soup(models: Sequence[Any], evaluate: Callable[[Any], Any]) -> tuple[Any, Report]:
    """The soup of those models that do not lower its score, tried from the best down.

    Each model is scored alone; then they are tried in the order of these scores (of equal ones, in that of the list),
    and one is kept when the mean of it and those kept before scores no lower than without it.

    Args:
      models: trees of arrays, equal in paths, shapes and dtypes.
      evaluate: ``params -> number``, higher is better: an accuracy on held-out examples.

    Returns:
      The soup, and a ``Report`` in the order of the trials: the model's place in the list, its own score, the score
      of the soup with it, and whether it was taken. Its metadata hold the final score and how many were taken.

    Raises:
      DataError: the trees are not alike, or a score is no finite number.

    Source: Wortsman et al., Model soups, arXiv:2203.05482.

    >>> import numpy as np
    >>> models = [{"bias": np.array([value])} for value in (9.0, 1.0, -1.0)]
    >>> params, report = greedy_soup(models, lambda params: -abs(params["bias"][0]))
    >>> params, report.rows
    ({'bias': array([0.])}, ((1, -1.0, -1.0, True), (2, -1.0, -0.0, True), (0, -9.0, -3.0, False)))
    """
    alike("greedy_soup", numbered("greedy_soup", models))
    score = lambda params, name: as_number("greedy_soup", f"the score of {name}", _plain(evaluate(params)))
    own = [score(model, f"model {number}") for number, model in enumerate(models)]
    taken: list[int] = []
    best = -math.inf
    rows = []
    for number in sorted(range(len(models)), key=lambda n: (-own[n], n)):
        trial = [*taken, number]
        found = own[number] if not taken else score(soup([models[n] for n in trial]), f"models {trial}")
        keep = found >= best
        rows.append((number, own[number], found, keep))
        taken, best = (trial, found) if keep else (taken, best)
    facts = {"score": best, "taken": len(taken)}
    report = Report("Greedy soup", ("model", "own score", "score with it", "taken"), tuple(rows), facts)
    return soup([models[number] for number in taken]), report


def _plain(value: Any) -> Any:
    return value.item() if getattr(value, "size", 0) == 1 and not is_traced(value) else value


def wise_ft(base: Any, tuned: Any, alpha: Any) -> Any:
    """The point between zero-shot and fine-tuned weights: ``(1 - alpha) * base + alpha * tuned``.

    At 0 and 1 it is exactly the base and the tuned tree. Computed in float32 (float64 stays); leaves of integers,
    truth values and PRNG keys must be equal. ``alpha`` and the arrays may be traced by JAX.

    Args:
      base: the tree before fine-tuning.
      tuned: the tree after it, equal in paths, shapes and dtypes.
      alpha: a finite number; beyond 0 and 1 it extrapolates.

    Returns:
      A tree like the base.

    Raises:
      DataError: the trees are not alike or not finite, or ``alpha`` is no finite number.

    Source: Wortsman et al., Robust fine-tuning of zero-shot models, arXiv:2109.01903.

    >>> import numpy as np
    >>> wise_ft({"bias": np.zeros(2)}, {"bias": np.array([2.0, 4.0])}, 0.5)
    {'bias': array([1., 2.])}
    """
    alpha = as_number("wise_ft", "alpha", alpha)

    def rule(leaf: Leaf) -> Any:
        if not is_traced(alpha) and alpha in (0, 1):
            return leaf.map(lambda at, *pair: pair[int(alpha)])
        share, rest = leaf.scalars(alpha), leaf.scalars(1 - alpha)

        def formula(at: Any, base: Any, tuned: Any) -> Any:
            between = rest * base + share * tuned
            if not is_traced(share):
                return between
            return jnp.where(share == 0, base, jnp.where(share == 1, tuned, between))

        return leaf.map(formula)

    return merged("wise_ft", {"base": base, "tuned": tuned}, rule, alpha)
