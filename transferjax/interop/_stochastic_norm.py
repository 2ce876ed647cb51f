"""Stochastic normalisation: BatchNorm that trains by its running statistics too."""

from __future__ import annotations

import dataclasses
from typing import Any

from transferjax._errors import TransferError
from transferjax._types import Extra, Model, Params
from transferjax.interop._extend import Layer
from transferjax.interop._forward import Hooks, Pass, forward_of, rebuild


def stochastic_norm(model: Model, probability: float = 0.5) -> Model:
    """The Model whose BatchNorms, in training mode, normalise some channels by their running statistics.

    Which channels is drawn anew at every pass, once for all its examples; the others are normalised by the batch, and
    the running statistics move as ever. It holds a network nearer to its source where batches are few or small. In
    inference mode, and in BatchNorms that are not in training mode, nothing changes. Layers that one ``nnx.scan`` or
    ``nnx.vmap`` runs share their draw.

    Args:
      model: a Model of a Flax module with BatchNorms.
      probability: of a channel to be normalised by the running statistics, in [0, 1], static; one minus the p of the
        paper. 0 is plain BatchNorm.

    Returns:
      A Model with the same params and extra, which needs a key in training mode.

    Raises:
      TransferError: ``probability`` is no number in [0, 1]; (in training mode) the model has no BatchNorm of Flax, or
        the key is missing.

    Source: Kou, You, Long and Wang, "Stochastic Normalization", NeurIPS 2020.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import transferjax.interop
    >>> model = stochastic_norm(transferjax.interop.nnx(nnx.BatchNorm(4, epsilon=0.0, rngs=nnx.Rngs(0))))
    >>> inputs = jnp.array([[2.0] * 4, [6.0] * 4])
    >>> outputs, _ = model.apply(model.params, model.extra, inputs, key=jax.random.key(0), train=True)
    >>> sorted({tuple(channel) for channel in outputs.T.tolist()})
    [(-1.0, 1.0), (2.0, 6.0)]
    """
    if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 <= probability <= 1:
        shown = probability if isinstance(probability, int | float) else type(probability).__name__
        raise TransferError(f"stochastic_norm() expects a static number in [0, 1], got {shown}.")
    return rebuild(model, _StochasticNorm(forward_of(model, "stochastic_norm"), float(probability)))


@dataclasses.dataclass(frozen=True)
class _StochasticNorm(Layer):
    probability: float

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        running = self.probability if hooks.running is None else hooks.running
        passed = self.inner(params, extra, inputs, dataclasses.replace(hooks, running=running))
        if hooks.train is not False and not passed.batch_norms:
            raise TransferError(
                "stochastic_norm() found no BatchNorm of Flax in the model. Expected one of tj.interop.nnx or "
                "tj.interop.linen with nnx.BatchNorm or nn.BatchNorm; leave it out for other networks."
            )
        return passed
