"""A supervised objective and a loss on what the network makes of a batch, in one pass; and sums of objectives."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.tree_util import Partial

from transferjax._errors import DataError, SelectionError, TransferError, describe, listing
from transferjax._types import Array, Loss, Model, Objective
from transferjax.objectives._adapt import given, makes_objective
from transferjax.objectives._metrics import as_partial
from transferjax.tree import Selector, as_selector

OUTPUTS = "outputs"


def auxiliary_loss(
    supervised: Callable[[Any], Any] | None,
    model: Model,
    term: Callable[[Any, Any, Mapping[str, Array]], Any],
    *,
    at: Selector | str | None = None,
    weight: float | Array = 1.0,
    supervised_weight: float | Array = 1.0,
) -> Partial:
    """``supervised_weight * supervised + weight * term``, both of one pass: the frame for a loss of your own.

    Args:
      supervised: what makes the supervised objective of a network: ``tj.objectives.cross_entropy`` itself, or
        ``functools.partial(tj.objectives.cross_entropy, label_smoothing=0.1)``; ``None``: the term alone, which needs
        no labels.
      model: a Model; one that can capture, where ``at`` is given.
      term: ``(params, batch, layers) -> value`` or ``-> (value, {metric: scalar})``; ``layers`` has the network's
        outputs under ``outputs`` and each captured ``[B, ..., d]`` under its module path. It means over the batch, by
        ``batch["weight"]`` (``[B]``) where that is there.
      at: module paths whose outputs the term sees.
      weight: of the term; a leaf.
      supervised_weight: of the supervised objective; a leaf.

    Returns:
      An ``Objective`` with the metrics of the supervised one, ``auxiliary_loss`` or the term's own.

    Raises:
      TransferError: ``supervised`` is an objective already, or the model cannot capture.

    >>> import jax.numpy as jnp, transferjax as tj
    >>> model = tj.interop.pure(lambda params, x: x @ params, jnp.eye(2))
    >>> small = lambda params, batch, layers: jnp.mean(layers["outputs"] ** 2)
    >>> objective = auxiliary_loss(tj.objectives.mean_squared_error, model, small, weight=0.1)
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.eye(2)}
    >>> round(float(objective(model.params, model.extra, batch, None, True).value), 4)
    0.05
    """
    return beside("auxiliary_loss", supervised, model, as_partial(term), at, weight, supervised_weight)


def beside(
    name: str, supervised: Any, model: Any, term: Partial, at: Any, weight: Any, supervised_weight: Any
) -> Partial:
    """:func:`auxiliary_loss` for a function of another name, which its errors tell.

    Raises:
      TransferError: ``supervised`` is an objective already, or the model cannot capture.
    """
    if supervised is not None and not makes_objective(supervised):
        raise TransferError(
            f"{name}() expects what makes an objective of a network, got {describe(supervised)}: pass "
            "tj.objectives.cross_entropy itself, functools.partial(tj.objectives.cross_entropy, ...), or None."
        )
    check_model(name, model, at)
    own = None if supervised is None else as_partial(supervised(Partial(given)))
    look = Partial(Look(model.apply, model.capture, None if at is None else as_selector(at)))
    return Partial(_beside, own, look, term, weight, supervised_weight, Partial(_Named(name)))


def check_model(name: str, model: Any, at: Any) -> None:
    """Refuses what is no Model, or one that cannot capture where ``at`` asks for it."""
    if not isinstance(model, Model) or (at is not None and model.capture is None):
        got = "capture is None" if isinstance(model, Model) else f"got {describe(model)}"
        raise TransferError(f"{name}() expects a Model that can say what its modules make; {got}. Use tj.interop.")


@dataclasses.dataclass(frozen=True)
class Look:
    """A pass of a network: its outputs and what some of its modules make, by name."""

    apply: Any
    capture: Any
    at: Selector | None

    def __call__(self, params, extra, inputs, key=None, train=False) -> tuple[Any, dict[str, Any], Any]:
        if self.at is None:
            outputs, extra = self.apply(params, extra, inputs, key=key, train=train)
            return outputs, {OUTPUTS: outputs}, extra
        outputs, extra, layers = self.capture(params, extra, inputs, self.at, key=key, train=train)
        if OUTPUTS in layers:
            raise SelectionError(f"a module is called '{OUTPUTS}', which stands for the network's own. Rename it.")
        return outputs, {**layers, OUTPUTS: outputs}, extra


@dataclasses.dataclass(frozen=True)
class _Named:
    """The metric of a term that has none of its own."""

    name: str

    def __call__(self, value):
        return {self.name: value}


def _beside(own, look, term, weight, supervised_weight, named, params, extra, batch, key, train) -> Loss:
    if "inputs" not in batch:
        raise DataError(f"the batch has no 'inputs': it has {sorted(batch)}.")
    outputs, layers, extra = look(params, extra, batch["inputs"], key, train)
    found = term(params, batch, layers)
    value, metrics = found if isinstance(found, tuple) else (found, named(found))
    if own is None:
        return Loss(weight * value, dict(metrics), extra)
    loss = own(params, extra, {**batch, "inputs": outputs}, key, train)
    return Loss(supervised_weight * loss.value + weight * value, {**loss.metrics, **metrics}, extra, loss.weight)


def total(weights: Mapping[str, float | Array] | None = None, /, **objectives: Objective) -> Partial:
    """A weighted sum of objectives: ``sum of weights[name] * objective``.

    Each gets the same ``extra`` and key, so that what two of them compute alike is computed once by the compiled
    program. The new ``extra`` has from each objective what it changed; where two change the same, the first.

    Args:
      weights: by name, 1 where it is left out; leaves.
      **objectives: by name; at least one.

    Returns:
      An ``Objective`` whose metrics are each part's value under its name and the metrics of all; those that several
      have are called ``name/metric``. Accumulation counts as the first part does that says how.

    Raises:
      TransferError: no objective, something else, or a weight without one; or (when called) a part returns no ``Loss``.

    >>> import jax.numpy as jnp, transferjax as tj
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params, extra)
    >>> error = tj.objectives.mean_squared_error(apply)
    >>> batch = {"inputs": jnp.ones(2), "labels": jnp.zeros(2)}
    >>> float(total({"again": 0.5}, error=error, again=error)(jnp.ones(()), {}, batch, None, True).value)
    1.5
    """
    if not objectives:
        raise TransferError("total() got no objective. Expected total(task=objective, other=objective).")
    for name, objective in objectives.items():
        if not callable(objective) or isinstance(objective, Model):
            raise TransferError(f"total(): '{name}' is {describe(objective)}; expected an Objective.")
        if not _takes_five(objective):
            raise TransferError(
                f"total(): '{name}' cannot be called as (params, extra, batch, key, train). Expected an Objective: of "
                "what makes one, the result, as tj.objectives.l2_sp(reference)."
            )
    weights = {} if weights is None else weights
    if not isinstance(weights, Mapping):
        raise TransferError(f"total() got {describe(weights)} as weights. Expected them by name: {{'name': 0.1}}.")
    strange = sorted(set(weights) - set(objectives))
    if strange:
        raise TransferError(f"total() has a weight for {listing(strange)}, which is none of {listing([*objectives])}.")
    parts = {name: as_partial(objective) for name, objective in objectives.items()}
    return Partial(_total, parts, {name: weights.get(name, 1.0) for name in parts})


def _takes_five(objective: Any) -> bool:
    try:
        inspect.signature(objective).bind(*range(5))
    except TypeError:
        return False
    except ValueError:  # it does not say
        return True
    return True


def _total(parts, weights, params, extra, batch, key, train) -> Loss:
    found = {name: parts[name](params, extra, batch, key, train) for name in parts}
    for name, loss in found.items():
        if not isinstance(loss, Loss):
            raise TransferError(
                f"total(): '{name}' returned {describe(loss)}; expected tj.Loss(value, metrics, extra)."
            )
    values = [weights[name] * loss.value for name, loss in found.items()]
    seen: dict[str, list[str]] = {}
    for name, loss in found.items():
        for metric in loss.metrics:
            seen.setdefault(metric, []).append(name)
    metrics = {
        metric if len(names) == 1 and metric not in found else f"{name}/{metric}": found[name].metrics[metric]
        for metric, names in seen.items()
        for name in names
    }
    changed = [loss.extra for loss in found.values()]
    first = lambda old, *new: next((leaf for leaf in new if leaf is not old), old)
    counted = next((loss.weight for loss in found.values() if loss.weight is not None), None)
    if isinstance(counted, Mapping):
        counted = {"loss": counted["loss"]} if "loss" in counted else None
    own = {name: loss.value for name, loss in found.items()}
    return Loss(sum(values[1:], values[0]), {**own, **metrics}, jax.tree.map(first, extra, *changed), counted)
