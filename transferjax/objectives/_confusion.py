"""What the outputs for unlabelled examples should be like: certain, spread over the classes, unconfused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import DataError, describe
from transferjax._types import Array

PRECISE = jax.lax.Precision.HIGHEST


def entropy(logits: Array) -> Array:
    """The mean entropy of the predictions, in nats.

    Args:
      logits: ``[N, C]`` of the target domain.

    Returns:
      A float32 scalar.

    Raises:
      DataError: they are no ``[N, C]``.

    Source: Grandvalet & Bengio, Semi-supervised Learning by Entropy Minimization, 2004.

    >>> round(float(entropy(jnp.zeros((3, 2)))), 4)
    0.6931
    """
    return jnp.mean(entropies(as_logits(logits, "entropy")))


def information_maximisation(logits: Array) -> Array:
    """Certain predictions, all classes used: the mean entropy less the entropy of the mean prediction.

    Args:
      logits: ``[N, C]`` of the target domain.

    Returns:
      A float32 scalar, the negative mutual information of example and prediction.

    Raises:
      DataError: they are no ``[N, C]``.

    Source: Liang et al., Do We Really Need to Access the Source Data?, 2020, arXiv:2002.08546.

    >>> round(float(information_maximisation(1e3 * jnp.eye(2))), 4)
    -0.6931
    """
    logits = as_logits(logits, "information_maximisation")
    log_mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(len(logits))
    return jnp.mean(entropies(logits)) + _plogp(log_mean).sum()


def mcc(logits: Array, *, temperature: float | Array = 2.5) -> Array:
    """Minimum class confusion: how much the predictions of a batch confuse pairs of classes.

    With softened predictions ``P``, weights ``w`` of the examples (1 + exp of the negative entropy, mean 1, no
    gradient), ``P' diag(w) P`` with columns of sum 1: the sum off the diagonal, divided by the classes.

    Args:
      logits: ``[N, C]`` of the target domain.
      temperature: softens the predictions.

    Returns:
      A float32 scalar in [0, 1].

    Raises:
      DataError: they are no ``[N, C]``.

    Source: Jin et al., Minimum Class Confusion for Versatile Domain Adaptation, 2020, arXiv:1912.03699.

    >>> float(mcc(1e3 * jnp.eye(2))), float(mcc(jnp.zeros((2, 2))))
    (0.0, 0.5)
    """
    logits = as_logits(logits, "mcc") / temperature
    predictions = jax.nn.softmax(logits)
    weights = certainty(logits)
    confusion = jnp.matmul((predictions * weights[:, None]).T, predictions, precision=PRECISE)
    totals = jnp.maximum(confusion.sum(1), 1e-30)  # a class that no example may have confuses nothing
    return jnp.mean((confusion.sum(0) - jnp.diagonal(confusion)) / totals)


def certainty(logits: Array) -> Array:
    """The weight ``[N]`` of each example by the entropy of its prediction, of mean 1; no gradient flows through it.

    >>> certainty(jnp.array([[0.0, 0.0], [0.0, 0.0]])).tolist()
    [1.0, 1.0]
    """
    weights = jax.lax.stop_gradient(1.0 + jnp.exp(-entropies(logits)))
    return weights / jnp.mean(weights)


def entropies(logits: Array) -> Array:
    """The entropy ``[N]`` of every prediction.

    >>> entropies(jnp.array([[0.0, -jnp.inf]])).tolist()
    [0.0]
    """
    return 0.0 - _plogp(jax.nn.log_softmax(logits)).sum(-1)


def as_logits(logits: Any, name: str) -> Array:
    """Logits as float32 ``[N, C]``, checked.

    Raises:
      DataError: they are none.

    >>> as_logits(jnp.zeros((2, 3)), "mcc").shape
    (2, 3)
    """
    if jnp.ndim(logits) != 2 or not all(jnp.shape(logits)):
        raise DataError(f"{name}() got logits {describe(logits)}. Expected [N, C], one row per example, none empty.")
    return jnp.asarray(logits, jnp.float32)


def _plogp(log_p: Array) -> Array:
    """``p log p``, 0 where p is 0."""
    possible = log_p > -jnp.inf
    safe = jnp.where(possible, log_p, 0.0)
    return jnp.where(possible, jnp.exp(safe) * safe, 0.0)
