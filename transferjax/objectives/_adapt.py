"""Objectives for two domains: labels from the source, and features that do not tell the target from it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from transferjax._errors import DataError, SelectionError, TransferError, describe
from transferjax._types import Array, Loss, Model
from transferjax.objectives import _alignment
from transferjax.objectives._metrics import as_partial
from transferjax.tree import Selector, as_selector


class Domains(NamedTuple):
    """What the network makes of both domains: layers ``[B, d]``, averaged over positions, and the outputs."""

    source: tuple[Array, ...]
    target: tuple[Array, ...]
    source_outputs: Array
    target_outputs: Array


def adapt(
    supervised: Callable[[Any], Any],
    model: Model,
    loss: Callable[[Array, Array], Array],
    *,
    at: Selector | str | None = None,
    weight: float | Array = 1.0,
    together: bool | None = None,
) -> Partial:
    """A supervised objective on the source plus the distance of two domains: ``supervised + weight * loss``.

    The batch holds ``inputs`` and ``labels`` of the source and ``target_inputs`` without labels, as many of each.
    Without BatchNorm (``extra`` is empty) both domains go through the network in one pass. With it they go one after
    the other, each normalised by its own statistics, and the averages in the new ``extra`` move by the source's first
    and then by the target's: a network that normalises a mixture can match the domains' moments and still mix up
    their classes.

    Args:
      supervised: what makes the supervised objective of a network: ``tj.objectives.cross_entropy`` itself, or
        ``functools.partial(tj.objectives.cross_entropy, label_smoothing=0.1)``.
      model: a Model that can capture.
      loss: ``(source [B, d], target [B, d]) -> scalar``: ``losses.coral``, ``losses.mk_mmd``, ``losses.bsp``,
        ``losses.afn``; or :func:`on_target` of ``losses.mcc``, ``losses.entropy``,
        ``losses.information_maximisation``.
      at: module paths whose outputs are compared, averaged over positions; several are summed over. ``None``: the
        outputs of the network.
      weight: of the loss; a leaf.
      together: whether both domains share one pass; BatchNorm then normalises, and averages, over the mixture.

    Returns:
      An ``Objective`` with the metrics of the supervised one and ``alignment``. ``batch["weight"]`` weighs the
      supervised part alone. The distance compares examples, so accumulation takes the mean over its parts.

    Raises:
      TransferError: ``supervised`` is an objective already, or the model cannot capture.
      DataError: (when traced) the batch lacks ``target_inputs``.

    Source: Sun & Saenko, Deep CORAL, 2016, arXiv:1607.01719; Long et al., 2015, arXiv:1502.02791.

    >>> import transferjax as tj
    >>> model = tj.interop.pure(lambda params, x: x @ params, jnp.eye(2))
    >>> objective = adapt(tj.objectives.cross_entropy, model, tj.objectives.losses.coral, weight=0.5)
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.array([0, 1]), "target_inputs": 2 * jnp.eye(2)}
    >>> sorted(objective(model.params, model.extra, batch, None, True).metrics)
    ['accuracy', 'alignment']
    """
    return objective_of("adapt", supervised, model, Partial(_summed, as_partial(loss)), at, weight, together)


def on_target(loss: Callable[[Array], Array]) -> Partial:
    """A loss of the target's outputs as a loss of both domains', for :func:`adapt`.

    Args:
      loss: ``target [B, C] -> scalar``.

    Returns:
      ``(source, target) -> loss(target)``.

    >>> float(on_target(jnp.sum)(jnp.ones((2, 2)), jnp.ones((2, 3))))
    6.0
    """
    return Partial(_on_target, as_partial(loss))


def jan(
    supervised: Callable[[Any], Any],
    model: Model,
    *,
    at: Selector | str,
    weight: float | Array = 1.0,
    sigma: float | None = 0.92,
    together: bool | None = None,
) -> Partial:
    """Joint adaptation: the joint discrepancy of some layers and of the predictions, added to a supervised objective.

    Args:
      supervised: as in :func:`adapt`.
      model: as in :func:`adapt`.
      at: module paths whose outputs are compared, averaged over positions.
      weight: of the discrepancy; a leaf.
      sigma: of the one kernel on the predictions; ``None``: five kernels as on the layers.
      together: as in :func:`adapt`.

    Returns:
      An ``Objective`` as that of :func:`adapt`.

    Source: Long et al., Deep Transfer Learning with Joint Adaptation Networks, 2017, arXiv:1605.06636.

    >>> import transferjax as tj
    >>> network = lambda params, x: tj.interop.mark("body", x @ params["body"]) @ params["head"]
    >>> model = tj.interop.pure(network, {"body": jnp.eye(2), "head": jnp.eye(2)})
    >>> objective = jan(tj.objectives.cross_entropy, model, at="body")
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.array([0, 1]), "target_inputs": jnp.eye(2)}
    >>> float(objective(model.params, model.extra, batch, None, True).metrics["alignment"]) <= 0
    True
    """
    return objective_of("jan", supervised, model, Partial(_joint, sigma), at, weight, together)


def objective_of(
    name: str,
    supervised: Callable[[Any], Any],
    model: Model,
    alignment: Partial,
    at: Selector | str | None,
    weight: Any,
    together: bool | None,
) -> Partial:
    """The frame of the others: ``alignment(params, domains) -> (value, metrics)`` beside a supervised objective.

    Raises:
      TransferError: ``supervised`` makes no objective, or the model cannot capture.
    """
    if not makes_objective(supervised):
        raise TransferError(
            f"{name}() expects what makes an objective of a network first, got {describe(supervised)}: pass "
            "tj.objectives.cross_entropy itself, or functools.partial(tj.objectives.cross_entropy, ...)."
        )
    if not isinstance(model, Model) or (at is not None and model.capture is None):
        got = "capture is None" if isinstance(model, Model) else f"got {describe(model)}"
        raise TransferError(f"{name}() expects a Model that can say what its modules make; {got}. Use tj.interop.")
    shared = not jax.tree.leaves(model.extra) if together is None else bool(together)
    forward = _Both(model.apply, model.capture, None if at is None else as_selector(at), shared)
    return Partial(_adapted, as_partial(supervised(Partial(given))), Partial(forward), alignment, weight)


def makes_objective(supervised: Any) -> bool:
    if isinstance(supervised, Partial) or not callable(supervised):
        return False
    try:
        inspect.signature(supervised).bind(None)
    except TypeError:
        return False
    return True


def given(params, extra, inputs, *, key=None, train=False):
    """The form of ``Model.apply`` for outputs that are there already."""
    return inputs, extra


def _adapted(objective, forward, alignment, weight, params, extra, batch, key, train) -> Loss:
    for name in ("inputs", "target_inputs"):
        if name not in batch:
            raise DataError(
                f"the batch has no '{name}': it has {sorted(batch)}. Expected inputs and labels of the source, and "
                "target_inputs."
            )
    domains, extra = forward(params, extra, batch["inputs"], batch["target_inputs"], key, train)
    own = {name: value for name, value in batch.items() if name != "target_inputs"}
    loss = objective(params, extra, {**own, "inputs": domains.source_outputs}, key, train)
    value, metrics = alignment(params, domains)
    return Loss(loss.value + weight * value, {**loss.metrics, "alignment": value, **metrics}, loss.extra, loss.weight)


@dataclasses.dataclass(frozen=True)
class _Both:
    """The network on both domains."""

    apply: Any
    capture: Any
    at: Selector | None
    together: bool

    def __call__(self, params, extra, inputs, target, key, train) -> tuple[Domains, Any]:
        shapes = [jax.tree.map(lambda x: (jnp.shape(x)[1:], jnp.result_type(x)), part) for part in (inputs, target)]
        if shapes[0] != shapes[1]:
            raise DataError(
                f"target_inputs are {_shown(target)} and inputs {_shown(inputs)}. Expected both domains alike but for "
                "the number of examples."
            )
        count = len(jax.tree.leaves(inputs)[0])
        if not self.together:
            keys = (None, None) if key is None else jax.random.split(key)
            source, layers, extra = self._pass(params, extra, inputs, keys[0], train)
            other, others, extra = self._pass(params, extra, target, keys[1], train)
            return Domains(layers, others, source, other), extra
        joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), inputs, target)
        outputs, layers, extra = self._pass(params, extra, joined, key, train)
        source, other = (tuple(layer[part] for layer in layers) for part in (slice(count), slice(count, None)))
        return Domains(source, other, outputs[:count], outputs[count:]), extra

    def _pass(self, params, extra, inputs, key, train) -> tuple[Any, tuple[Array, ...], Any]:
        count, captured = len(jax.tree.leaves(inputs)[0]), None
        if self.at is None:
            outputs, extra = self.apply(params, extra, inputs, key=key, train=train)
        else:
            outputs, extra, captured = self.capture(params, extra, inputs, self.at, key=key, train=train)
        for name, layer in {"outputs": outputs, **(captured or {})}.items():
            if not hasattr(layer, "ndim") or layer.ndim < 2 or len(layer) != count:
                raise SelectionError(
                    f"'{name}' is {describe(layer)} for {count} examples. Expected an array [B, ..., d]: narrow at to "
                    "modules with one output."
                )
        layers = [outputs] if captured is None else captured.values()
        return outputs, tuple(layer.mean(axis=tuple(range(1, layer.ndim - 1))) for layer in layers), extra


def _shown(inputs: Any) -> str:
    return ", ".join(describe(leaf) for leaf in jax.tree.leaves(inputs))


def _summed(loss, params, domains: Domains) -> tuple[Array, dict[str, Array]]:
    values = [loss(one, other) for one, other in zip(domains.source, domains.target, strict=True)]
    return sum(values[1:], values[0]), {}


def _on_target(loss, source, target) -> Array:
    return loss(target)


def _joint(sigma, params, domains: Domains) -> tuple[Array, dict[str, Array]]:
    source, target = (
        (*layers, jax.nn.softmax(outputs.astype(jnp.float32)))
        for layers, outputs in ((domains.source, domains.source_outputs), (domains.target, domains.target_outputs))
    )
    sigmas = (*(None for _ in domains.source), sigma)
    return _alignment.jmmd(source, target, sigmas=sigmas), {}
