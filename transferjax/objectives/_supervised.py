"""Supervised objectives: what the network should say for each example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from transferjax._errors import DataError, TransferError
from transferjax._types import Array, Loss
from transferjax.objectives._metrics import (
    accuracy,
    as_apply,
    as_partial,
    counted_labels,
    flat_mean,
    mean,
    same_shape,
    soft_cross_entropy,
    soft_targets,
    squared_error,
)


def supervised(
    apply: Callable[..., Any], loss: Callable[[Any, Any], Array], metrics: dict[str, Callable[[Any, Any], Array]]
) -> Partial:
    """An objective from a network and per-example functions: the frame of the others.

    Args:
      apply: ``Model.apply``.
      loss: ``(outputs, batch) -> [B]``, one value per example.
      metrics: ``{name: (outputs, batch) -> [B]}``.

    Returns:
      An ``Objective``; values are means over the batch, weighted by ``batch["weight"]`` (``[B]``) where it is there.

    >>> import jax.numpy as jnp
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params, extra)
    >>> objective = supervised(apply, lambda outputs, batch: (outputs - batch["labels"]) ** 2, {})
    >>> batch = {"inputs": jnp.ones(2), "labels": jnp.array([1.0, 3.0])}
    >>> float(objective(jnp.ones(()), {}, batch, None, True).value)
    2.0
    """
    functions = {name: as_partial(function) for name, function in metrics.items()}
    return Partial(_supervised, as_apply(apply, "supervised"), as_partial(loss), functions)


def _require(batch: Any, *names: str) -> None:
    for name in names:
        if name not in batch:
            raise DataError(f"the batch has no '{name}': it has {sorted(batch)}. Expected {' and '.join(names)}.")


def _supervised(apply, loss, metrics, params, extra, batch, key, train) -> Loss:
    _require(batch, "inputs", "labels")
    outputs, extra = apply(params, extra, batch["inputs"], key=key, train=train)
    value = mean(loss(outputs, batch), batch)
    return Loss(value, {name: mean(function(outputs, batch), batch) for name, function in metrics.items()}, extra)


def cross_entropy(
    apply: Callable[..., Any], *, label_smoothing: float = 0.0, class_weights: Array | None = None
) -> Partial:
    """Softmax cross-entropy with integer labels ``[B]`` or soft targets ``[B, C]``.

    Args:
      apply: ``Model.apply`` with logits ``[B, C]`` as outputs.
      label_smoothing: mass in [0, 1) that is spread evenly over all classes.
      class_weights: ``[C]``; each example counts as much as its class (its targets' mean, when soft), and the mean
        is taken over these weights.

    Returns:
      An ``Objective`` with the metric ``accuracy``. A label outside the classes gives NaN, which the step rejects.

    Raises:
      TransferError: ``label_smoothing`` is outside [0, 1), or ``apply`` is no function of that form.
      DataError: (when traced) the labels fit no logits.

    >>> import jax.numpy as jnp
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs @ params, extra)
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.array([0, 1])}
    >>> round(float(cross_entropy(apply)(jnp.zeros((2, 2)), {}, batch, None, True).value), 4)
    0.6931
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise TransferError(f"cross_entropy() expects label_smoothing in [0, 1), got {label_smoothing}.")
    return Partial(_cross_entropy, as_apply(apply, "cross_entropy"), float(label_smoothing), class_weights)


def _cross_entropy(apply, label_smoothing, class_weights, params, extra, batch, key, train) -> Loss:
    _require(batch, "inputs", "labels")
    logits, extra = apply(params, extra, batch["inputs"], key=key, train=train)
    targets = soft_targets(logits, counted_labels(batch))
    classes = logits.shape[-1]
    smooth = targets * (1.0 - label_smoothing) + label_smoothing / classes
    values = soft_cross_entropy(logits, smooth)
    weighted, weight = dict(batch), None
    if class_weights is not None:
        weights = jnp.asarray(class_weights)
        if weights.shape != (classes,):
            raise DataError(f"class_weights has shape {weights.shape}; expected ({classes},), one per class.")
        weighted["weight"] = batch.get("weight", 1.0) * (targets @ weights)
        weight = {"loss": jnp.sum(weighted["weight"])}
    return Loss(mean(values, weighted), {"accuracy": mean(accuracy(logits, batch), batch)}, extra, weight)


def binary_cross_entropy(apply: Callable[..., Any], *, positive_weight: float | Array = 1.0) -> Partial:
    """Sigmoid cross-entropy for multi-label targets ``[B, C]`` of zeros and ones (or ``[B]`` for one output).

    Args:
      apply: ``Model.apply`` with logits ``[B, C]`` (or ``[B]``) as outputs.
      positive_weight: how much a positive target counts, a scalar or ``[C]``.

    Returns:
      An ``Objective`` with the metric ``accuracy`` (over all labels).

    >>> import jax.numpy as jnp
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params, extra)
    >>> batch = {"inputs": jnp.ones((2, 3)), "labels": jnp.ones((2, 3))}
    >>> round(float(binary_cross_entropy(apply)(jnp.zeros(()), {}, batch, None, True).value), 4)
    0.6931
    """
    return supervised(
        as_apply(apply, "binary_cross_entropy"), Partial(_binary_loss, positive_weight), {"accuracy": _binary_accuracy}
    )


def _binary_loss(positive_weight, logits, batch) -> Array:
    labels = same_shape(logits, batch["labels"]).astype(jnp.float32)
    logits = logits.astype(jnp.float32)
    positive, negative = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return flat_mean(-(positive_weight * labels * positive + (1.0 - labels) * negative))


def _binary_accuracy(logits, batch) -> Array:
    return flat_mean((logits > 0) == (batch["labels"] > 0.5))


def mean_squared_error(apply: Callable[..., Any]) -> Partial:
    """Squared error for regression, averaged over output dimensions and the batch.

    Args:
      apply: ``Model.apply`` with outputs of the labels' shape, ``[B, ...]``.

    Returns:
      An ``Objective`` with the metric ``mean_absolute_error``.

    >>> import jax.numpy as jnp
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params, extra)
    >>> batch = {"inputs": jnp.ones(2), "labels": jnp.array([1.0, 3.0])}
    >>> float(mean_squared_error(apply)(jnp.ones(()), {}, batch, None, True).value)
    2.0
    """
    return supervised(as_apply(apply, "mean_squared_error"), squared_error, {"mean_absolute_error": _absolute_error})


def _absolute_error(outputs, batch) -> Array:
    return flat_mean(jnp.abs(outputs.astype(jnp.float32) - same_shape(outputs, batch["labels"])))


def next_token(apply: Callable[..., Any]) -> Partial:
    """Next-token cross-entropy: position ``t`` predicts token ``t + 1``.

    The batch holds ``inputs`` ``[B, T]`` (integer tokens; or a dict with ``tokens``), and optionally ``mask``
    ``[B, T]``: a token counts as a target where its mask is not zero.

    Args:
      apply: ``Model.apply`` with logits ``[B, T, V]`` as outputs.

    Returns:
      An ``Objective``: mean over all counted tokens of the batch; metric ``accuracy``.

    >>> import jax, jax.numpy as jnp
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (jax.nn.one_hot(inputs, 4) * params, extra)
    >>> batch = {"inputs": jnp.array([[1, 1, 2]]), "mask": jnp.array([[1, 1, 0]])}
    >>> round(float(next_token(apply)(jnp.zeros(()), {}, batch, None, True).value), 4)
    1.3863
    """
    return Partial(_next_token, as_apply(apply, "next_token"))


def _next_token(apply, params, extra, batch, key, train) -> Loss:
    _require(batch, "inputs")
    logits, extra = apply(params, extra, batch["inputs"], key=key, train=train)
    tokens = batch["inputs"]["tokens"] if isinstance(batch["inputs"], dict) else batch["inputs"]
    counted = jnp.ones(tokens.shape, jnp.float32) if "mask" not in batch else (batch["mask"] != 0).astype(jnp.float32)
    if "weight" in batch:
        counted = counted * batch["weight"][:, None]
    counted, targets, scores = counted[:, 1:], tokens[:, 1:], logits[:, :-1].astype(jnp.float32)
    # What is not counted may hold any number (-100, say), which no loss or gradient may see.
    values = soft_cross_entropy(scores, soft_targets(scores, jnp.where(counted > 0, targets, 0)))
    weight = jnp.sum(counted)
    total = jnp.maximum(weight, 1e-9)
    right = (jnp.argmax(scores, axis=-1) == targets).astype(jnp.float32)
    return Loss(jnp.sum(values * counted) / total, {"accuracy": jnp.sum(right * counted) / total}, extra, weight)


def augment(objective: Callable[..., Loss], *functions: Callable[[Any, Array], Any]) -> Partial:
    """An objective whose batches pass through augmentations first, whenever it is given a key.

    Args:
      objective: any ``Objective``.
      *functions: ``(batch, key) -> batch``, applied in order inside the compiled step; ``transferjax.data`` has flips,
        crops, mixup and cutmix.

    Returns:
      An ``Objective``. The key is split: one part for each function, one for the objective.

    Raises:
      TransferError: (when called in training) the key is missing.

    >>> import jax, jax.numpy as jnp
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params, extra)
    >>> double = lambda batch, key: {**batch, "inputs": 2 * batch["inputs"]}
    >>> objective = augment(mean_squared_error(apply), double)
    >>> batch = {"inputs": jnp.ones(2), "labels": jnp.zeros(2)}
    >>> float(objective(jnp.ones(()), {}, batch, jax.random.key(0), True).value)
    4.0
    """
    return Partial(_augment, as_partial(objective), tuple(as_partial(f) for f in functions))


def _augment(objective, functions, params, extra, batch, key, train) -> Loss:
    if key is None and train is not False and functions:
        raise TransferError("augment() needs a key in training: pass key=jax.random.key(...).")
    if key is not None and functions:
        key, *parts = jax.random.split(key, len(functions) + 1)
        for function, part in zip(functions, parts, strict=True):
            batch = function(batch, part)
    return objective(params, extra, batch, key, train)
