"""Objectives for two domains with an opponent: DANN, CDAN, MDD, and the weights of the opponent."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from transferjax._context import current_step
from transferjax._errors import DataError, SelectionError, TransferError, is_whole
from transferjax._types import Array, Model
from transferjax.objectives import _adversarial
from transferjax.objectives._adapt import Domains, objective_of
from transferjax.tree import Selector, auxiliary

DISCRIMINATOR, ADVERSARY = "discriminator", "adversary"


def discriminator(
    width: int, *, hidden: tuple[int, ...] = (256, 256), outputs: int = 1
) -> Callable[[Array], dict[str, dict[str, Array]]]:
    """The weights of a small network with ReLU between its layers: a discriminator, or MDD's second classifier.

    Args:
      width: of the features; for :func:`cdan` the number of classes times that.
      hidden: widths of the hidden layers.
      outputs: 1 for a discriminator, the number of classes for MDD's ``adversary``.

    Returns:
      ``key -> {"0": {"kernel", "bias"}, ...}``, for ``tj.extend``: kernels are He-normal, biases zero.

    Raises:
      TransferError: a width is no whole number of at least 1.

    >>> sorted(discriminator(3, hidden=(4,))(jax.random.key(0)))
    ['0', '1']
    """
    widths = (width, *hidden, outputs)
    if not all(is_whole(one) for one in widths):
        raise TransferError(f"discriminator() expects widths of at least 1, got {widths}: width, hidden and outputs.")

    def init(key: Array) -> dict[str, dict[str, Array]]:
        keys = jax.random.split(key, len(widths) - 1)
        return {
            str(n): {"kernel": jax.random.normal(one, pair) * (2 / pair[0]) ** 0.5, "bias": jnp.zeros(pair[1])}
            for n, (one, pair) in enumerate(zip(keys, itertools.pairwise(widths)))
        }

    return init


def dann(
    supervised: Callable[[Any], Any],
    model: Model,
    *,
    at: Selector | str,
    steps: int | None = None,
    progress: float | Array | None = None,
    weight: float | Array = 1.0,
    together: bool | None = None,
) -> Partial:
    """Domain-adversarial training: a discriminator learns to tell the domains apart, the features learn to prevent it.

    The discriminator is the auxiliary weights ``discriminator``, which learn in a group of their own::

        model = tj.extend(model, "discriminator", tj.objectives.discriminator(width), key=key)
        tuning = tj.chain(model=tj.train("model/**"), discriminator=tj.train("aux/**"))

    Args:
      supervised: as in :func:`adapt`.
      model: as in :func:`adapt`, extended by ``discriminator``.
      at: the module path whose outputs ``[B, ..., width]`` are told apart, averaged over positions.
      steps: how many steps the training takes: the progress is the number of the step over it.
      progress: the progress itself, in [0, 1]; a leaf. The gradient reaches the features times
        ``-(2 / (1 + exp(-10 progress)) - 1)``. Outside a training step ``steps`` means 1.
      weight: of the adversarial loss, for features and discriminator; a leaf.
      together: as in :func:`adapt`.

    Returns:
      An ``Objective`` as that of :func:`adapt`, with the metric ``domain_accuracy`` of the discriminator: .5 is what
      the features want.

    Raises:
      TransferError: neither or both of ``steps`` and ``progress`` are given.
      SelectionError: the model lacks the weights, or ``at`` is not one array.

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, 2016, arXiv:1505.07818.

    >>> import transferjax as tj
    >>> network = lambda params, x: tj.interop.mark("body", x @ params["body"]) @ params["head"]
    >>> model = tj.interop.pure(network, {"body": jnp.eye(2), "head": jnp.eye(2)})
    >>> model = tj.extend(model, "discriminator", discriminator(2), key=jax.random.key(0))
    >>> objective = dann(tj.objectives.cross_entropy, model, at="body", steps=1000)
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.array([0, 1]), "target_inputs": jnp.eye(2)}
    >>> sorted(objective(model.params, model.extra, batch, None, True).metrics)
    ['accuracy', 'alignment', 'domain_accuracy']
    """
    auxiliary(model.params, DISCRIMINATOR)
    alignment = Partial(_domains_apart, _progress("dann", steps, progress))
    return objective_of("dann", supervised, model, alignment, at, weight, together)


def cdan(
    supervised: Callable[[Any], Any],
    model: Model,
    *,
    at: Selector | str,
    steps: int | None = None,
    progress: float | Array | None = None,
    weight: float | Array = 1.0,
    entropy_conditioning: bool = False,
    together: bool | None = None,
) -> Partial:
    """:func:`dann` on the outer product of predictions and features: domains match class by class.

    Args:
      supervised: as in :func:`adapt`.
      model: as in :func:`dann`; the discriminator's width is the number of classes times that of the features.
      at: as in :func:`dann`.
      steps: as in :func:`dann`.
      progress: as in :func:`dann`.
      weight: as in :func:`dann`.
      entropy_conditioning: certain predictions count more (CDAN+E).
      together: as in :func:`adapt`.

    Returns:
      An ``Objective`` as that of :func:`dann`.

    Raises:
      TransferError: neither or both of ``steps`` and ``progress`` are given.
      SelectionError: the model lacks the weights, or ``at`` is not one array.

    Source: Long et al., Conditional Adversarial Domain Adaptation, 2018, arXiv:1705.10667.

    >>> import transferjax as tj
    >>> network = lambda params, x: tj.interop.mark("body", x @ params["body"]) @ params["head"]
    >>> model = tj.interop.pure(network, {"body": jnp.eye(2), "head": jnp.eye(2)})
    >>> model = tj.extend(model, "discriminator", discriminator(4), key=jax.random.key(0))
    >>> objective = cdan(tj.objectives.cross_entropy, model, at="body", progress=0.5)
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.array([0, 1]), "target_inputs": jnp.eye(2)}
    >>> float(objective(model.params, model.extra, batch, None, True).metrics["domain_accuracy"])
    0.5
    """
    auxiliary(model.params, DISCRIMINATOR)
    function = _classes_apart_by_certainty if entropy_conditioning else _classes_apart
    alignment = Partial(function, _progress("cdan", steps, progress))
    return objective_of("cdan", supervised, model, alignment, at, weight, together)


def mdd(
    supervised: Callable[[Any], Any],
    model: Model,
    *,
    at: Selector | str,
    steps: int | None = None,
    progress: float | Array | None = None,
    weight: float | Array = 1.0,
    margin: float | Array = 4.0,
    reversed_by: float | Array = 0.1,
    together: bool | None = None,
) -> Partial:
    """Margin disparity discrepancy: a second classifier agrees on the source and disagrees on the target.

    The second classifier is the auxiliary weights ``adversary``::

        init = tj.objectives.discriminator(width, outputs=classes)
        model = tj.extend(model, "adversary", init, key=key)

    Args:
      supervised: as in :func:`adapt`.
      model: as in :func:`adapt`, extended by ``adversary``.
      at: the module path whose outputs the adversary sees, averaged over positions.
      steps: as in :func:`dann`.
      progress: as in :func:`dann`.
      weight: of the discrepancy; a leaf.
      margin: as in ``losses.mdd``.
      reversed_by: what the reversed gradient is multiplied by beside the coefficient of its progress.
      together: as in :func:`adapt`.

    Returns:
      An ``Objective`` as that of :func:`adapt`; the metric ``alignment`` is what the adversary lowers, minus
      ``losses.mdd``.

    Raises:
      TransferError: neither or both of ``steps`` and ``progress`` are given.
      SelectionError: the model lacks the weights, or ``at`` is not one array.

    Source: Zhang et al., Bridging Theory and Algorithm for Domain Adaptation, 2019, arXiv:1904.05801.

    >>> import transferjax as tj
    >>> network = lambda params, x: tj.interop.mark("body", x @ params["body"]) @ params["head"]
    >>> model = tj.interop.pure(network, {"body": jnp.eye(2), "head": jnp.eye(2)})
    >>> model = tj.extend(model, "adversary", discriminator(2, outputs=2), key=jax.random.key(0))
    >>> objective = mdd(tj.objectives.cross_entropy, model, at="body", steps=1000)
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.array([0, 1]), "target_inputs": jnp.eye(2)}
    >>> float(objective(model.params, model.extra, batch, None, True).metrics["alignment"]) > 0
    True
    """
    auxiliary(model.params, ADVERSARY)
    alignment = Partial(_disparity, _progress("mdd", steps, progress), margin, reversed_by)
    return objective_of("mdd", supervised, model, alignment, at, weight, together)


def _progress(name: str, steps: Any, progress: Any) -> Partial:
    """What gives the progress while a step is traced."""
    if (steps is None) == (progress is None):
        raise TransferError(
            f"{name}() got {'neither' if steps is None else 'both'} of steps and progress. Expected steps=, the length "
            "of the training, or progress= in [0, 1]."
        )
    if steps is not None:
        if not is_whole(steps):
            raise TransferError(f"{name}() expects steps, a whole number of at least 1, got {steps!r}.")
        return Partial(_elapsed, float(steps))
    if isinstance(progress, int | float) and not 0 <= progress <= 1:
        raise TransferError(f"{name}() expects progress in [0, 1], got {progress}.")
    return Partial(_constant, progress)


def _elapsed(steps) -> Any:
    step = current_step()
    return 1.0 if step is None else jnp.clip(step / steps, 0.0, 1.0)


def _constant(progress) -> Any:
    return progress


def _perceptron(name: str, weights: Any, features: Array) -> Array:
    width, layers = weights["0"]["kernel"].shape[0], len(weights)
    if features.shape[1] != width:
        raise DataError(
            f"the auxiliary weights '{name}' take features of width {width}, got {features.shape[1]}. Expected "
            f"tj.extend(model, {name!r}, tj.objectives.discriminator({features.shape[1]}, ...), key=key)."
        )
    for n in range(layers):
        features = features @ weights[str(n)]["kernel"] + weights[str(n)]["bias"]
        features = jax.nn.relu(features) if n + 1 < layers else features
    return features


def _one(domains: Domains) -> tuple[Array, Array]:
    if len(domains.source) != 1:
        raise SelectionError(
            f"at selects {len(domains.source)} arrays. Expected one module with one output, which the opponent sees."
        )
    return domains.source[0], domains.target[0]


def _watched(params: Any) -> tuple[Callable[[Array], Array], list[Array]]:
    """The discriminator, and the list into which its scores go."""
    scores: list[Array] = []

    def discriminate(features: Array) -> Array:
        scores.append(_perceptron(DISCRIMINATOR, auxiliary(params, DISCRIMINATOR), features))
        return scores[-1]

    return discriminate, scores


def _domains_apart(progress, params, domains: Domains) -> tuple[Array, dict[str, Array]]:
    source, target = _one(domains)
    watched, scores = _watched(params)
    value = _adversarial.dann(watched, source, target, coefficient=_adversarial.reversal(progress()))
    return value, {"domain_accuracy": _told_apart(scores[0], len(source))}


def _classes_apart(progress, params, domains: Domains, conditioning: bool = False) -> tuple[Array, dict[str, Array]]:
    source, target = _one(domains)
    watched, scores = _watched(params)
    value = _adversarial.cdan(
        watched,
        source,
        target,
        domains.source_outputs,
        domains.target_outputs,
        coefficient=_adversarial.reversal(progress()),
        entropy_conditioning=conditioning,
    )
    return value, {"domain_accuracy": _told_apart(scores[0], len(source))}


def _classes_apart_by_certainty(progress, params, domains: Domains) -> tuple[Array, dict[str, Array]]:
    return _classes_apart(progress, params, domains, conditioning=True)


def _disparity(progress, margin, reversed_by, params, domains: Domains) -> tuple[Array, dict[str, Array]]:
    source, target = _one(domains)
    coefficient = reversed_by * _adversarial.reversal(progress())
    seen = _adversarial.reverse_gradient(jnp.concatenate([source, target]), coefficient)
    found = _perceptron(ADVERSARY, auxiliary(params, ADVERSARY), seen)
    own, other = found[: len(source)], found[len(source) :]
    return -_adversarial.mdd(domains.source_outputs, own, domains.target_outputs, other, margin=margin), {}


def _told_apart(scores: Array, sources: int) -> Array:
    """The share of examples whose domain the discriminator knows, the mean of both domains' shares."""
    right = (scores.reshape(-1) > 0) == (jnp.arange(len(scores)) < sources)
    own, other = jnp.split(right.astype(jnp.float32), [sources])
    return 0.5 * (jnp.mean(own) + jnp.mean(other))
