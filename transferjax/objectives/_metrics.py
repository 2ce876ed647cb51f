"""Per-example metrics and the arithmetic that objectives share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from transferjax._errors import DataError, TransferError, describe, is_whole
from transferjax._types import Array


def as_partial(function: Callable[..., Any]) -> Partial:
    """A function as a pytree, so that it can be part of an objective; a ``Partial`` as it is.

    >>> as_partial(abs)(-1)
    1
    """
    return function if isinstance(function, Partial) else Partial(function)


def as_apply(function: Any, name: str) -> Partial:
    """The first argument of an objective, checked: a function of the form of ``Model.apply``.

    >>> as_apply(lambda params, extra, inputs, *, key=None, train=False: (inputs, extra), "cross_entropy")(1, 2, 3)
    (3, 2)
    """
    form = "(params, extra, inputs, *, key, train)"
    if not callable(function):
        raise TransferError(f"{name}() expects a function {form} first, got {describe(function)}: pass model.apply.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return as_partial(function)
    try:
        signature.bind(None, None, None, key=None, train=False)
    except TypeError:
        came = f"{describe(function)} of ({', '.join(signature.parameters)})"
        raise TransferError(f"{name}() expects a function {form} first, got {came}: pass model.apply.") from None
    return as_partial(function)


def mean(values: Array, batch: Any) -> Array:
    """Mean of ``[B]`` values, weighted by ``batch["weight"]`` where it is there.

    >>> import jax.numpy as jnp
    >>> float(mean(jnp.array([1.0, 3.0]), {"weight": jnp.array([1.0, 0.0])}))
    1.0
    """
    if "weight" not in batch:
        return jnp.mean(values)
    weight = batch["weight"]
    if jnp.shape(weight) != values.shape:
        raise DataError(f"the batch's weight is {describe(weight)}; expected one per example, {values.shape}.")
    return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1e-9)


def counted_labels(batch: Any) -> Array:
    """The batch's labels, with 0 for integer labels of weight 0: they may be outside the classes and count nothing.

    >>> import jax.numpy as jnp
    >>> counted_labels({"labels": jnp.array([1, -1]), "weight": jnp.array([1.0, 0.0])}).tolist()
    [1, 0]
    """
    labels = batch["labels"]
    if "weight" not in batch or not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != batch["weight"].shape:
        return labels
    return jnp.where(batch["weight"] > 0, labels, 0)


def soft_targets(logits: Array, labels: Array) -> Array:
    """Labels as distributions ``[..., C]``; an integer outside ``[0, C)`` gives a row of NaN.

    >>> import jax.numpy as jnp
    >>> soft_targets(jnp.zeros((1, 2)), jnp.array([1])).tolist()
    [[0.0, 1.0]]
    """
    if labels.shape == logits.shape:
        return labels.astype(jnp.float32)
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise DataError(
            f"labels are {describe(labels)} for logits {describe(logits)}. Expected integers of shape "
            f"{logits.shape[:-1]} or soft targets of shape {logits.shape}."
        )
    classes = logits.shape[-1]
    rows = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    return jnp.where(((labels >= 0) & (labels < classes))[..., None], rows, jnp.nan)


def soft_cross_entropy(logits: Array, targets: Array) -> Array:
    """Cross-entropy ``[...]`` of logits ``[..., C]`` in float32; a target of 0 never gives NaN, even at -inf.

    >>> import jax.numpy as jnp
    >>> soft_cross_entropy(jnp.array([0.0, -jnp.inf]), jnp.array([1.0, 0.0])).tolist()
    -0.0
    """
    terms = targets * jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.where(targets == 0, 0.0, terms), axis=-1)


def accuracy(outputs: Array, batch: Any) -> Array:
    """Per example ``[B]``: 1 where the largest logit is the label's (the largest target's, when soft).

    >>> import jax.numpy as jnp
    >>> accuracy(jnp.array([[0.0, 1.0]]), {"labels": jnp.array([1])}).tolist()
    [1.0]
    """
    labels = batch["labels"]
    hard = labels if labels.ndim == outputs.ndim - 1 else jnp.argmax(labels, axis=-1)
    return (jnp.argmax(outputs, axis=-1) == hard).astype(jnp.float32)


def top_k_accuracy(k: int) -> Partial:
    """Per example ``[B]``: 1 where the label is among the ``k`` largest logits.

    >>> import jax.numpy as jnp
    >>> top_k_accuracy(2)(jnp.array([[0.0, 1.0, 2.0]]), {"labels": jnp.array([1])}).tolist()
    [1.0]
    """
    if not is_whole(k):
        raise TransferError(f"top_k_accuracy() expects a whole number of at least 1, got {k!r}.")
    return Partial(_InTop(k))


class _InTop:
    def __init__(self, k: int):
        self.k = k

    def __call__(self, outputs, batch):
        best = jax.lax.top_k(outputs, self.k)[1]
        return jnp.any(best == batch["labels"][..., None], axis=-1).astype(jnp.float32)

    def __eq__(self, other):
        return isinstance(other, _InTop) and other.k == self.k

    def __hash__(self):
        return hash(("top_k", self.k))


def negative_log_likelihood(outputs: Array, batch: Any) -> Array:
    """Per example ``[B]``: softmax cross-entropy without smoothing, for evaluation.

    >>> import jax.numpy as jnp
    >>> round(float(negative_log_likelihood(jnp.zeros((1, 2)), {"labels": jnp.array([1])})[0]), 4)
    0.6931
    """
    targets = soft_targets(outputs, batch["labels"])
    return soft_cross_entropy(outputs, targets)


def squared_error(outputs: Array, batch: Any) -> Array:
    """Per example ``[B]``: squared difference, averaged over output dimensions.

    >>> import jax.numpy as jnp
    >>> squared_error(jnp.array([3.0]), {"labels": jnp.array([1.0])}).tolist()
    [4.0]
    """
    return flat_mean((outputs.astype(jnp.float32) - same_shape(outputs, batch["labels"])) ** 2)


def flat_mean(values: Array) -> Array:
    return jnp.mean(values.reshape(values.shape[0], -1).astype(jnp.float32), axis=-1)


def same_shape(outputs: Array, labels: Array) -> Array:
    if outputs.shape != labels.shape:
        raise DataError(f"labels are {describe(labels)}; expected the outputs' shape, {tuple(outputs.shape)}.")
    return labels
