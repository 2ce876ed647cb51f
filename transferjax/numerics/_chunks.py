"""A function over a batch, a few examples at a time on CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def map_chunks(function: Callable[[Any], Any], inputs: Any, examples: int) -> Any:
    """``function(inputs)``; compiled for CPU, it is computed on a few examples at a time.

    What a convolutional network computes between two layers is many times larger than its input. In chunks it stays in
    cache, and the program needs that many times less temporary memory. GPU and TPU get the whole batch at once.

    Args:
      function: ``inputs -> outputs``, pure, each example for itself; traced once per platform.
      inputs: array ``[B, ...]`` or a pytree of them.
      examples: the most in a chunk; a batch that no number from half of it up to it divides is taken whole, and so are
        arrays outside of a compiled program.

    Returns:
      What ``function(inputs)`` returns: every leaf ``[B, ...]``.

    >>> import jax
    >>> jax.jit(lambda x: map_chunks(lambda part: 2 * part, x, 2))(jnp.arange(4.0)).tolist()
    [0.0, 2.0, 4.0, 6.0]
    """
    size = _chunk(inputs, examples)
    if size is None:
        return function(inputs)

    def chunked(inputs: Any) -> Any:
        # Every n-th example, so that a batch that is sharded over devices stays where it is.
        apart = jax.tree.map(lambda x: jnp.reshape(x, (size, -1, *x.shape[1:])), inputs)
        count = jax.tree.leaves(apart)[0].shape[1]
        part = lambda i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), apart)
        outputs = jax.lax.map(lambda i: function(part(i)), jnp.arange(count))
        return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[2:]), outputs)

    return jax.lax.platform_dependent(inputs, cpu=chunked, default=function)


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
