"""Means of models weighted by statistics of their data: Fisher information, and Gram matrices of layers' inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transferjax._errors import DataError, describe, nearest_hint
from transferjax.merging._checks import as_fraction, as_weights
from transferjax.merging._leaf import Leaf, is_traced
from transferjax.merging._trees import is_float, leaves, merged, numbered


def fisher(models: Sequence[Any], fishers: Sequence[Any], weights: Any = None) -> Any:
    """The mean of models in which each entry counts by its Fisher information.

    ``sum(weight * F * model) / sum(weight * F)``, and where that divisor is zero ``sum(weight * model) / sum(weight)``.
    The diagonal of the Fisher matrix is the mean over examples of the squared gradient of the log-likelihood, with
    labels drawn from the model's own predictions.

    Computed in float32 (float64 stays) and returned in the models' dtype; leaves of integers, truth values and PRNG
    keys must be equal. Weights and arrays may be traced by JAX; else numpy computes.

    Args:
      models: trees of arrays, equal in paths, shapes and dtypes.
      fishers: a tree per model with an array of its shape, none below zero, at each path where the model has floats.
      weights: ``[n]`` numbers, none below zero; ``None``: ones.

    Returns:
      A tree like the first model.

    Raises:
      DataError: the trees are not alike or not finite, a Fisher entry is negative or its tree is of another form, or
        the weights are not as above.

    Source: Matena & Raffel, Merging models with Fisher-weighted averaging, arXiv:2111.09832.

    >>> import numpy as np
    >>> models = [{"bias": np.array([0.0, 0.0])}, {"bias": np.array([4.0, 4.0])}]
    >>> fisher(models, [{"bias": np.array([3.0, 0.0])}, {"bias": np.array([1.0, 0.0])}])
    {'bias': array([1., 2.])}
    """
    trees, beside = numbered("fisher", models), numbered("fisher", fishers, what="fisher")
    if len(trees) != len(beside):
        raise DataError(f"fisher() got {len(beside)} fishers for {len(trees)} models. Expected one per model.")
    factors = as_weights("fisher", weights, len(trees), signed=False)
    found = {name: leaves("fisher", name, tree, empty=True) for name, tree in beside.items()}
    _check_fishers(leaves("fisher", "model 0", trees["model 0"]), found)
    count = len(trees)

    def rule(leaf: Leaf) -> Any:
        both = leaf.beside({name: tree[leaf.path] for name, tree in found.items()})
        shares = leaf.scalars(factors)

        def check(*chunks: Any) -> None:
            for name, chunk in zip(found, chunks[count:]):
                if chunk.min() < 0:
                    raise DataError(f"'{leaf.path}' is negative in {name}. Expected squares of gradients, from 0 on.")

        def formula(at: Any, *chunks: Any) -> Any:
            above = below = plain = leaf.scalars(0)
            for share, model, information in zip(shares, chunks[:count], chunks[count:], strict=True):
                above, below = above + share * information * model, below + share * information
                plain = plain + share * model
            nothing = below == 0
            return above / (below + nothing) + nothing * (plain / shares.sum())

        return both.map(formula, check)

    return merged("fisher", trees, rule, (weights, fishers))


def _check_fishers(model: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> None:
    needed = [path for path, leaf in model.items() if is_float(leaf)]
    for name, tree in found.items():
        for path in needed:
            if path not in tree:
                hint = nearest_hint(path, [p for p in tree if p not in model])
                raise DataError(f"{name} lacks '{path}', which the models have. Expected an array per leaf.{hint}")
            if np.shape(tree[path]) != np.shape(model[path]):
                raise DataError(
                    f"'{path}' is {describe(tree[path])} in {name} and {describe(model[path])} in the models. "
                    "Expected equal shapes."
                )
        surplus = [path for path in tree if path not in model]
        if surplus:
            raise DataError(
                f"{name} has '{surplus[0]}', which the models lack. Expected an array per leaf of the models."
                f"{nearest_hint(surplus[0], needed)}"
            )


def regmean(models: Sequence[Any], grams: Sequence[Mapping[str, Any]], alpha: float = 0.9) -> Any:
    """RegMean: the kernels whose outputs come closest to each model's own on that model's inputs.

    With the Gram matrix ``G = X'X`` of a layer's inputs ``X`` ``[N, d_in]`` in each model, off the diagonal times
    ``alpha``, a kernel becomes ``inverse(sum(G)) sum(G kernel)``. Leaves without a Gram matrix are averaged. Inputs
    that are zero in all models average their row of the kernel.

    Computed in float64 and returned in the models' dtype; leaves of integers, truth values and PRNG keys must be
    equal. Arrays may be traced by JAX, which then computes in float32.

    Args:
      models: trees of arrays, equal in paths, shapes and dtypes.
      grams: per model ``{path of a kernel: [d_in, d_in]}``, the same paths for each. A kernel's leading axes multiply
        to ``d_in``: ``[d_in, d_out]``, ``[h, w, c_in, c_out]`` with ``d_in = h w c_in``, ``[d_in, heads, d_head]``.
      alpha: what entries off the diagonal are multiplied by, in [0, 1].

    Returns:
      A tree like the first model.

    Raises:
      DataError: the trees are not alike or not finite, a Gram matrix has no kernel, another shape or is singular, or
        ``alpha`` is outside.

    Source: Jin et al., Dataless knowledge fusion by merging weights of language models, arXiv:2212.09849.

    >>> import numpy as np
    >>> models = [{"kernel": np.array([[1.0], [1.0]])}, {"kernel": np.array([[3.0], [3.0]])}]
    >>> grams = [{"kernel": np.diag([3.0, 1.0])}, {"kernel": np.diag([1.0, 1.0])}]
    >>> regmean(models, grams)["kernel"].tolist()
    [[1.5], [2.0]]
    """
    trees = numbered("regmean", models)
    alpha = as_fraction("regmean", "alpha", alpha)
    found = _grams(grams, leaves("regmean", "model 0", trees["model 0"]), len(trees))

    def rule(leaf: Leaf) -> Any:
        if leaf.path not in found[0]:
            return leaf.map(lambda at, *chunks: sum(chunks[1:], start=chunks[0]) / len(chunks))
        matrices = [tree[leaf.path] for tree in found]
        for number, matrix in enumerate(matrices):
            if not is_traced(matrix) and not np.isfinite(np.asarray(matrix, np.float64)).all():
                raise DataError(f"gram {number} of '{leaf.path}' has NaN or infinity. Expected finite numbers.")
        solution = _solved(leaf, matrices, alpha)
        return leaf.beside({"its solution": solution}).map(lambda at, *chunks: chunks[-1])

    return merged("regmean", trees, rule, grams)


def _grams(grams: Any, model: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """The Gram matrices of each model by path, checked against its kernels."""
    if not isinstance(grams, Sequence) or not all(isinstance(one, Mapping) for one in grams) or len(grams) != count:
        got = f"{len(grams)} of them" if isinstance(grams, Sequence) else describe(grams)
        raise DataError(
            f"regmean() expects grams as a list of {{path: [d_in, d_in]}}, one for each of {count} models; got {got}."
        )
    for number, one in enumerate(grams):
        for path in [*one, *grams[0]]:
            if path not in model:
                hint = nearest_hint(path, model)
                raise DataError(f"gram {number} of '{path}' has no kernel in the models.{hint}")
            if path not in one or path not in grams[0]:
                raise DataError(f"'{path}' has a gram in only some of the models. Expected the same paths for each.")
            _check_gram(number, path, one[path], model[path])
    return list(grams)


def _check_gram(number: int, path: str, gram: Any, kernel: Any) -> None:
    shape, found = np.shape(kernel), np.shape(gram)
    wanted = [int(np.prod(shape[:axes])) for axes in range(1, len(shape))]
    if len(found) != 2 or found[0] != found[1] or found[0] not in wanted:
        sizes = " or ".join(f"({size}, {size})" for size in wanted) or "none, as it has no two axes"
        raise DataError(f"gram {number} of '{path}' is {describe(gram)}; expected {sizes} for {describe(kernel)}.")


def _solved(leaf: Leaf, grams: list[Any], alpha: float) -> Any:
    """The kernel of the closed form, flat."""
    xp, work = leaf.xp, np.float32 if leaf.traced else np.float64
    size = np.shape(grams[0])[0]
    kernels = [xp.asarray(flat, work).reshape(size, -1) for flat in leaf.chunks(slice(0, leaf.size))]
    shrunk = [xp.asarray(gram, work) for gram in grams]
    shrunk = [alpha * gram + (1 - alpha) * xp.diag(xp.diagonal(gram)) for gram in shrunk]
    left = sum(shrunk[1:], start=shrunk[0])
    right = sum(gram @ kernel for gram, kernel in zip(shrunk, kernels, strict=True))
    idle = xp.diagonal(left) == 0
    left = left + xp.diag(idle * work(1))
    right = right + idle[:, None] * (sum(kernels[1:], start=kernels[0]) / len(kernels))
    try:
        solution = xp.linalg.solve(left, right)
    except np.linalg.LinAlgError:
        raise DataError(
            f"the grams of '{leaf.path}' sum to a singular matrix. Expected alpha below one, or more examples."
        ) from None
    return solution.reshape(-1)
