"""Exact evaluation over any number of examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, TransferError, describe
from transferjax._types import Apply, Batch, Params, Tuning
from transferjax.finetune._match import check_batches
from transferjax.finetune._state import FinetuneState


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """A compiled evaluation; call it as ``evaluate(state, frozen, batches) -> {name: mean}``.

    Attributes:
      apply: the network.
      metrics: ``{name: (outputs, batch) -> [B]}``.
      tuning: how the state becomes parameters.
      jitted: ``jitted(trainable, extra, frozen, batch) -> ({name: weighted sum}, weight)`` of one batch.
    """

    apply: Apply
    metrics: Mapping[str, Callable[[Any, Batch], jax.Array]]
    tuning: Tuning
    jitted: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "jitted", jax.jit(self._sums))

    def __call__(self, state: FinetuneState, frozen: Params, batches: Iterable[Batch]) -> dict[str, float]:
        check_batches(batches, "evaluate")
        pending, sums, weight, size = None, dict.fromkeys(self.metrics, 0.0), 0.0, 0
        for batch in batches:
            batch, size = _padded(batch, size)
            found = self.jitted(state.trainable, state.extra, frozen, batch)
            if pending is not None:
                weight += _add(sums, pending)
            pending = found
        if pending is None:
            raise DataError("evaluate() got no batch. Expected at least one.")
        weight += _add(sums, pending)
        if weight <= 0:
            raise DataError("evaluate() got examples whose weights sum to 0. Expected a positive sum.")
        return {name: total / weight for name, total in sums.items()}

    def _sums(self, trainable, extra, frozen, batch):
        outputs, _ = self.apply(self.tuning.merge(trainable, frozen), extra, batch["inputs"], train=False)
        weight = batch["weight"]
        totals = {}
        for name, metric in self.metrics.items():
            values = metric(outputs, batch)
            if values.shape != weight.shape:
                raise TransferError(
                    f"metric '{name}' gave {describe(values)}; expected one value per example, {weight.shape}."
                )
            totals[name] = jnp.sum(jnp.where(weight > 0, values * weight, 0.0))
        return totals, jnp.sum(weight)


def make_eval(apply: Apply, metrics: Mapping[str, Callable[[Any, Batch], jax.Array]], tuning: Tuning) -> Evaluate:
    """An evaluation that is exact over a last partial batch and compiles once.

    A batch that is smaller than those before it is padded with examples of weight 0, and sums are added on the host in
    float64.

    Args:
      apply: ``Model.apply``; it runs in inference mode.
      metrics: ``{name: (outputs, batch) -> [B]}``, for example ``{"accuracy": transferjax.objectives.accuracy}``.
      tuning: how state and frozen weights become parameters.

    Returns:
      ``evaluate(state, frozen, batches) -> {name: mean over all examples}``, weighted by ``batch["weight"]`` if given.

    Raises:
      TransferError: there is no dict of metrics or no tuning, or (when traced) a metric gives no value per example.
      DataError: (when called) there is no batch.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(())}, {})
    >>> state, frozen = tj.init(jax.random.key(0), model, tj.full(), optax.sgd(0.1))
    >>> batches = [{"inputs": jnp.ones(3), "labels": jnp.zeros(3)}, {"inputs": jnp.ones(1), "labels": jnp.ones(1)}]
    >>> make_eval(apply, {"error": tj.objectives.squared_error}, tj.full())(state, frozen, batches)
    {'error': 0.75}
    """
    if not isinstance(metrics, Mapping):
        raise TransferError(
            f"make_eval() expects a dict of metrics second, got {describe(metrics)}: "
            "write {'accuracy': tj.objectives.accuracy}."
        )
    if not isinstance(tuning, Tuning):
        raise TransferError(f"make_eval() expects a Tuning third, got {describe(tuning)}: write tj.train('head/**').")
    if not metrics:
        raise TransferError("make_eval() expects at least one metric, such as {'accuracy': objectives.accuracy}.")
    return Evaluate(apply, dict(metrics), tuning)


def _padded(batch: Batch, size: int) -> tuple[dict[str, Any], int]:
    count = len(jax.tree.leaves(batch["inputs"])[0])
    weight = np.asarray(batch.get("weight", np.ones(count, np.float32)), np.float32)
    batch = {**batch, "weight": weight}
    missing = max(size, count) - count
    if missing:
        repeated = lambda leaf: np.concatenate([np.asarray(leaf), np.repeat(np.asarray(leaf)[-1:], missing, axis=0)])
        pad = lambda leaf: repeated(leaf) if np.ndim(leaf) and len(leaf) == count else leaf
        batch = {**jax.tree.map(pad, batch), "weight": np.concatenate([weight, np.zeros(missing, np.float32)])}
    return batch, max(size, count)


def _add(sums: dict[str, float], found: tuple[dict[str, Any], Any]) -> float:
    totals, weight = found
    for name, total in totals.items():
        sums[name] += float(total)
    return float(weight)
