"""A source that could be used: its features of the task, and what training it would cost."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from transferjax import features as features_
from transferjax import program, tuning
from transferjax._errors import DataError, describe
from transferjax._types import Batch, Cache, Model, Tuning
from transferjax.features import FeatureTable
from transferjax.tree import Selector, paths

LAST = (3, 4)
"""How many last stages learn in the partial tunings whose cost is counted: those of the package's evidence."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A source, looked at once.

    Attributes:
      features: of the training examples, in the order of the network; the last array is what a head would see.
      parameters: of the network; ``None``: unknown.
      step_seconds: of one training step per example by tuning, ``{"full": 0.004, "last 4": 0.001}``; empty: unknown.

    >>> import numpy as np
    >>> Candidate(FeatureTable({"outputs": np.ones((2, 3))}, np.arange(2))).parameters is None
    True
    """

    features: FeatureTable
    parameters: int | None = None
    step_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)


def measure(
    model: Model,
    batches: Iterable[Batch],
    *,
    at: Selector | str | None = None,
    cache: Cache | None = None,
    order: list[Any] | None = None,
) -> Candidate:
    """One pass over the training examples, and what a step of fine-tuning would cost on this machine.

    Seconds are those of a forward pass, measured, times the operations of a step over those of the pass, counted on
    the jaxpr: nothing is trained for it. Compiling is not counted.

    Args:
      model: without a classifier, so that its outputs are features.
      batches: as :func:`transferjax.features.extract` takes them; gone over twice.
      at: module paths whose outputs are features too.
      cache: as for ``extract``.
      order: of its stages from input to output; ``None``: by order of use.

    Raises:
      DataError: the batches can be gone over once only, or as ``extract``.

    >>> import numpy as np, transferjax as tj
    >>> model = tj.interop.pure(lambda params, x: x @ params["kernel"], {"kernel": jnp.ones((3, 2))})
    >>> batches = [{"inputs": np.ones((4, 3), np.float32), "labels": np.arange(4) % 2, "id": np.arange(4)}]
    >>> found = measure(model, batches)
    >>> found.parameters, sorted(found.step_seconds)
    (6, ['full', 'last 3', 'last 4'])
    """
    check_again(batches)
    table = features_.extract(model, batches, at=at, cache=cache)
    first = next(iter(batches))
    features_.extract(model, [first])  # compiles, where the pass has looked at layers too
    begin = time.perf_counter()
    features_.extract(model, [first])
    each = (time.perf_counter() - begin) / len(first["id"])
    count = sum(leaf.size for leaf in paths(model.params).values() if hasattr(leaf, "size"))
    return Candidate(
        table, count, {name: each * ratio for name, ratio in _ratios(model, first["inputs"], order).items()}
    )


def check_again(batches: Any) -> None:
    """Refuses what can be gone over once only."""
    if not isinstance(batches, Iterable) or iter(batches) is batches:
        raise DataError(
            f"the data set is {describe(batches)}, which cannot be gone over more than once. Expected a list of "
            "batches or transferjax.data.batches(source, size, shuffle=False, drop_remainder=False)."
        )


def _ratios(model: Model, inputs: Any, order: list[Any] | None) -> dict[str, float]:
    """Operations of a training step over those of a forward pass, for each tuning."""
    forward = lambda params, inputs: model.apply(params, model.extra, inputs, train=False)[0]
    alone = program.cost(forward, model.params, inputs).flops
    stages = tuning.stages(model, inputs) if order is None else order
    ways = {f"last {count}": tuning.last(min(count, len(stages)), stages) for count in LAST}
    ways = {"full": tuning.full(), **ways}
    return {name: _step(way, model, forward, inputs) / max(alone, 1) for name, way in ways.items()}


def _step(way: Tuning, model: Model, forward: Any, inputs: Any) -> float:
    key = jax.eval_shape(lambda: jax.random.key(0))
    trainable, frozen = jax.eval_shape(way.init, key, model.params)

    def gradient(trainable: Any, frozen: Any, inputs: Any) -> Any:
        total = lambda trainable: sum(
            jnp.sum(leaf.astype(jnp.float32) ** 2)
            for leaf in jax.tree.leaves(forward(way.merge(trainable, frozen), inputs))
        )
        return jax.grad(total)(trainable)

    return program.cost(gradient, trainable, frozen, inputs).flops
