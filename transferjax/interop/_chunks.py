"""Inference in chunks that stay in the processor's cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from transferjax._errors import TransferError
from transferjax._types import Extra, Model, Params
from transferjax.interop._extend import Layer
from transferjax.interop._forward import Hooks, Pass, forward_of, rebuild


def in_chunks(model: Model, examples: int = 8) -> Model:
    """The Model that, in inference mode and compiled for CPU, takes its batch a few examples at a time.

    What a convolutional network computes between two layers is many times larger than its input. In chunks it stays in
    cache, and the program needs that many times less temporary memory. GPU and TPU get the whole batch at once, as does
    training, where examples may meet in a BatchNorm, and a pass that captures or changes what modules return.

    Args:
      model: any Model whose outputs have the batch as their first axis, and whose ``extra`` inference leaves alone (no
        decoding cache).
      examples: the most in a chunk; a batch that no number from half of it up to it divides is taken whole.

    Returns:
      A Model with the same params, extra and outputs.

    Raises:
      TransferError: ``examples`` is below 1.

    >>> import jax
    >>> from transferjax.interop import pure
    >>> model = in_chunks(pure(lambda params, x: x * params, 2.0), 2)
    >>> jax.jit(model.apply)(model.params, model.extra, jax.numpy.arange(4.0))[0].tolist()
    [0.0, 2.0, 4.0, 6.0]
    """
    if examples < 1:
        raise TransferError(f"in_chunks() expects at least 1 example in a chunk, got {examples}.")
    return rebuild(model, _Chunked(forward_of(model, "in_chunks"), examples))


@dataclasses.dataclass(frozen=True)
class _Chunked(Layer):
    examples: int

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        size = _chunk(inputs, self.examples)
        modules = self.inner.modules()
        if size is None or modules is None or hooks.train is not False or hooks.at or hooks.inserts:
            return self.inner(params, extra, inputs, hooks)

        def whole(params, extra, inputs):
            return self.inner(params, extra, inputs, hooks).outputs

        def chunked(params, extra, inputs):
            # Every n-th example, so that a batch that is sharded over devices stays where it is.
            apart = lambda x: jnp.moveaxis(jnp.reshape(x, (size, -1, *x.shape[1:])), 1, 0)
            outputs = jax.lax.map(lambda part: whole(params, extra, part), jax.tree.map(apart, inputs))
            return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[2:]), outputs)

        outputs = jax.lax.platform_dependent(params, extra, inputs, cpu=chunked, default=whole)
        return Pass(outputs, extra, {}, modules)


def _chunk(inputs: Any, most: int) -> int | None:
    """How many examples a chunk has; ``None`` to take the batch whole, as outside of a compiled program."""
    leaves = jax.tree.leaves(inputs)
    if not leaves or not all(isinstance(leaf, Tracer) and leaf.ndim > 0 for leaf in leaves):
        return None
    counts = {leaf.shape[0] for leaf in leaves}
    count = counts.pop()
    if counts or count <= most:
        return None
    return next((size for size in range(most, (most - 1) // 2, -1) if size > 0 and count % size == 0), None)
