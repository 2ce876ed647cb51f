"""Task2Vec: a data set as the diagonal Fisher information of a network on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from transferjax._errors import DataError, describe
from transferjax._types import Batch, Model
from transferjax.numerics import diagonal_fisher
from transferjax.tree import Selector, everything, fill, paths, split


def task2vec(
    model: Model, batches: Iterable[Batch], *, select: Selector | str = everything, key: jax.Array | None = None
) -> np.ndarray:
    """A data set as a vector: how much each filter of a network matters to its predictions there.

    The diagonal of the Fisher information, ``mean over x of E over y ~ p(y | x) of (d log p(y | x) / d w)^2``, averaged
    over the weights of each filter (all axes of a leaf but the last; leaves with one axis stay). The labels are the
    network's own: fit its head to the data set first, with the rest frozen. Networks of one architecture and one number
    of classes are comparable, or any where ``select`` leaves the head out.

    Args:
      model: a ``Model`` whose outputs are logits ``[B, C]``; it runs in inference mode.
      batches: batches with ``inputs``, and ``weight`` ``[B]`` where examples count more or less.
      select: the params that the vector is of.
      key: draw one label per example with it; default: the exact mean over all ``C`` labels, ``C`` backward passes.

    Returns:
      float64 ``[number of filters]``, not negative, in the order of the paths.

    Raises:
      DataError: there is no batch, outputs are no logits, or the information is not finite or zero throughout.
      SelectionError: ``select`` matches nothing.

    Source: Achille, Lam, Tewari, Ravichandran, Maji, Fowlkes, Soatto & Perona, Task2Vec: task embedding for
    meta-learning, ICCV 2019.

    >>> import jax.numpy as jnp
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs @ params["kernel"], extra)
    >>> model = Model(apply, None, {"kernel": jnp.zeros((3, 2))}, {})
    >>> task2vec(model, [{"inputs": jnp.ones((4, 3))}]).tolist()
    [0.25, 0.25]
    """
    chosen, rest = split(model.params, select)
    total = diagonal_fisher(_logits(model.apply), chosen, (rest, model.extra), batches, verb="task2vec", key=key)
    parts = [
        leaf.reshape(-1, leaf.shape[-1]).mean(axis=0) if leaf.ndim > 1 else leaf.ravel()
        for leaf in paths(total).values()
    ]
    vector = np.concatenate(parts)
    if not np.isfinite(vector).all() or not vector.any():
        raise DataError(
            "the Fisher information is not finite, or zero throughout. Expected logits that depend on the selected "
            "params: look at inputs that are not finite, or at weights that are zero."
        )
    return vector


def _logits(apply: Any) -> Any:
    return lambda chosen, others, inputs: apply(fill(chosen, others[0]), others[1], inputs)[0]


def task2vec_distance(a: Any, b: Any) -> float:
    """The distance of two tasks: the cosine distance of ``a / (a + b)`` and ``b / (a + b)``, between 0 and 1.

    Args:
      a: what :func:`task2vec` made of one data set, ``[E]``.
      b: of another one, with the same network.

    Raises:
      DataError: the vectors have different lengths, are negative or not finite, or one is zero.

    Source: Achille et al., Task2Vec: task embedding for meta-learning, ICCV 2019.

    >>> task2vec_distance([1.0, 0.0], [0.0, 2.0]), round(task2vec_distance([1.0, 2.0], [1.0, 2.0]), 12)
    (1.0, 0.0)
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise DataError(
            f"the embeddings are {describe(first)} and {describe(second)}; expected two vectors [E] that task2vec made "
            "with one network and one selection."
        )
    for vector in (first, second):
        if not np.isfinite(vector).all() or (vector < 0).any() or not vector.any():
            raise DataError("an embedding is negative, zero throughout or not finite; expected what task2vec returns.")
    both = np.maximum(first + second, np.finfo(np.float64).tiny)
    left, right = first / both, second / both
    return float(max(0.0, 1 - left @ right / np.sqrt((left @ left) * (right @ right))))
