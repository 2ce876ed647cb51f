"""Losses against an opponent: a discriminator of domains, or a second classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import DataError, describe
from transferjax._types import Array
from transferjax.objectives._alignment import pair
from transferjax.objectives._confusion import as_logits, certainty


@jax.custom_jvp
def reverse_gradient(x: Array, coefficient: Any = 1.0) -> Array:
    """``x`` itself; gradients that flow back through it are multiplied by ``-coefficient``.

    Args:
      x: any array.
      coefficient: scalar; it gets no gradient.

    Returns:
      ``x``.

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, 2016, arXiv:1505.07818.

    >>> float(jax.grad(lambda x: reverse_gradient(x, 2.0) ** 2)(3.0))
    -12.0
    """
    del coefficient
    return x


@reverse_gradient.defjvp
def _reverse(primals, tangents):
    x, coefficient = primals
    return x, (-coefficient * tangents[0]).astype(tangents[0].dtype)


def reversal(progress: Any) -> Array:
    """The coefficient of gradient reversal by the progress of training: ``2 / (1 + exp(-10 p)) - 1``.

    Args:
      progress: from 0 (the start: nothing flows back) to 1 (the end).

    Returns:
      A scalar from 0 to almost 1.

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, 2016, arXiv:1505.07818, section 5.2.2.

    >>> float(reversal(0.0)), round(float(reversal(0.1)), 4)
    (0.0, 0.4621)
    """
    return jnp.tanh(5.0 * jnp.asarray(progress, jnp.float32))


def dann(
    discriminator: Callable[[Array], Array], source: Array, target: Array, *, coefficient: float | Array = 1.0
) -> Array:
    """How well a discriminator tells two domains apart: its cross-entropy, which it lowers and the features raise.

    Args:
      discriminator: ``[N, d] -> [N]`` (or ``[N, 1]``), the logit of "source".
      source: ``[N, d]``, features of the source domain.
      target: ``[M, d]``, features of the target domain.
      coefficient: of the reversed gradient, :func:`reversal` of the progress.

    Returns:
      A float32 scalar: the mean of both domains' cross-entropies.

    Raises:
      DataError: the widths differ, or the discriminator returns anything but one logit per example.

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, 2016, arXiv:1505.07818.

    >>> round(float(dann(lambda x: 0 * x[:, 0], jnp.ones((2, 3)), jnp.ones((2, 3)))), 4)
    0.6931
    """
    source, target = pair(source, target, "dann")
    scores = _scores(discriminator, reverse_gradient(jnp.concatenate([source, target]), coefficient), "dann")
    own, other = jnp.split(jax.nn.softplus(_signed(scores, len(source))), [len(source)])
    return 0.5 * (jnp.mean(own) + jnp.mean(other))


def cdan(
    discriminator: Callable[[Array], Array],
    source: Array,
    target: Array,
    source_logits: Array,
    target_logits: Array,
    *,
    coefficient: float | Array = 1.0,
    entropy_conditioning: bool = False,
) -> Array:
    """:func:`dann` on the outer product of predictions and features, so that domains match class by class.

    Args:
      discriminator: ``[N, C * d] -> [N]`` (or ``[N, 1]``), the logit of "source"; column ``c * d + i`` is the
        probability of class c times feature i.
      source: ``[N, d]``, features of the source domain.
      target: ``[M, d]``, features of the target domain.
      source_logits: ``[N, C]``; no gradient flows through them.
      target_logits: ``[M, C]``; no gradient flows through them.
      coefficient: of the reversed gradient, :func:`reversal` of the progress.
      entropy_conditioning: certain predictions count more (CDAN+E).

    Returns:
      A float32 scalar: the mean over the examples of both domains.

    Raises:
      DataError: features and logits do not fit each other, or the discriminator returns anything but one logit per
        example.

    Source: Long et al., Conditional Adversarial Domain Adaptation, 2018, arXiv:1705.10667.

    >>> x, logits = jnp.ones((2, 3)), jnp.zeros((2, 4))
    >>> round(float(cdan(lambda x: 0 * x[:, 0], x, x, logits, logits)), 4)
    0.6931
    """
    source, target = pair(source, target, "cdan")
    logits = [as_logits(part, "cdan") for part in (source_logits, target_logits)]
    if [part.shape for part in logits] != [(len(part), logits[0].shape[1]) for part in (source, target)]:
        raise DataError(
            f"cdan() got logits {logits[0].shape} and {logits[1].shape} for features {source.shape} and "
            f"{target.shape}. Expected one row of logits per example, of the same classes."
        )
    joined = jax.lax.stop_gradient(jnp.concatenate(logits))
    product = jax.nn.softmax(joined)[:, :, None] * jnp.concatenate([source, target])[:, None, :]
    scores = _scores(discriminator, reverse_gradient(product.reshape(len(product), -1), coefficient), "cdan")
    values = jax.nn.softplus(_signed(scores, len(source)))
    return jnp.mean(certainty(joined) * values if entropy_conditioning else values)


def mdd(
    source_logits: Array,
    source_adversary: Array,
    target_logits: Array,
    target_adversary: Array,
    *,
    margin: float | Array = 4.0,
) -> Array:
    """The margin disparity discrepancy: how much better an adversary agrees with the source's predictions.

    ``margin * E_s log p_adv[y] + E_t log(1 - p_adv[y])`` with y the class that the logits predict. The adversary
    raises it, the features lower it; no gradient flows through the logits.

    Args:
      source_logits: ``[N, C]`` of the classifier, on the source domain.
      source_adversary: ``[N, C]`` of the adversary.
      target_logits: ``[M, C]`` of the classifier, on the target domain.
      target_adversary: ``[M, C]`` of the adversary.
      margin: the weight of the source's term.

    Returns:
      A float32 scalar, at most 0.

    Raises:
      DataError: the logits have other shapes.

    Source: Zhang et al., Bridging Theory and Algorithm for Domain Adaptation, 2019, arXiv:1904.05801.

    >>> logits = jnp.array([[9.0, 0.0]])
    >>> bool(mdd(logits, logits, logits, -logits) > mdd(logits, -logits, logits, logits))
    True
    """
    parts = [as_logits(part, "mdd") for part in (source_logits, source_adversary, target_logits, target_adversary)]
    shapes = [part.shape for part in parts]
    if shapes[0] != shapes[1] or shapes[2] != shapes[3] or shapes[0][1] != shapes[2][1]:
        raise DataError(
            f"mdd() got logits {shapes[0]} and {shapes[2]}, and of the adversary {shapes[1]} and {shapes[3]}. "
            "Expected one row of each per example, of the same classes."
        )
    source, target = (jax.nn.one_hot(jnp.argmax(part, axis=1), part.shape[1]) for part in (parts[0], parts[2]))
    agreement = jnp.sum(source * jax.nn.log_softmax(parts[1]), axis=1)
    others = jnp.sum((1.0 - target) * jax.nn.softmax(parts[3]), axis=1)
    return margin * jnp.mean(agreement) + jnp.mean(jnp.log(jnp.minimum(others + 1e-6, 1.0)))


def _scores(discriminator: Callable[[Array], Array], features: Array, name: str) -> Array:
    scores = discriminator(features)
    if jnp.shape(scores) not in ((len(features),), (len(features), 1)):
        raise DataError(
            f"{name}(): the discriminator returns {describe(scores)} for features {features.shape}. Expected one logit "
            f"per example, ({len(features)},)."
        )
    return jnp.reshape(scores, (-1,)).astype(jnp.float32)


def _signed(scores: Array, sources: int) -> Array:
    """Logits of the wrong domain: their softplus is the cross-entropy."""
    return jnp.where(jnp.arange(len(scores)) < sources, -scores, scores)
