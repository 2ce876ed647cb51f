"""A function over a batch, a few examples at a time on CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from transferjax._errors import TransferError, is_whole


def map_chunks(function: Callable[[Any], Any], inputs: Any, examples: int) -> Any:
    """``function(inputs)``; compiled for CPU, it is computed on a few examples at a time.

    What a convolutional network computes between two layers is many times larger than its input. In chunks it stays in
    cache, and the program needs that many times less temporary memory. GPU and TPU get the whole batch at once.

    Args:
      function: ``inputs -> outputs``, pure, each example for itself; traced once per platform.
      inputs: array ``[B, ...]`` or a pytree of them.
      examples: the most in a chunk. Taken whole are: a batch that no number from half of it up to it divides, or whose
        size is symbolic; arrays that are not being traced; and, as shards have to stay where they are, every batch of
        a process with several devices.

    Returns:
      What ``function(inputs)`` returns: every leaf ``[B, ...]``.

    Raises:
      TransferError: ``examples`` is no whole number of at least 1.

    >>> import jax
    >>> jax.jit(lambda x: map_chunks(lambda part: 2 * part, x, 2))(jnp.arange(4.0)).tolist()
    [0.0, 2.0, 4.0, 6.0]
    """
    size = _chunk(inputs, examples)
    if size is None:
        return function(inputs)

    def chunked(inputs: Any) -> Any:
        apart = jax.tree.map(lambda x: jnp.reshape(x, (-1, size, *x.shape[1:])), inputs)
        outputs = jax.lax.map(function, apart)
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outputs)

    return jax.lax.platform_dependent(inputs, cpu=chunked, default=function)


def _chunk(inputs: Any, most: int) -> int | None:
    """How many examples a chunk has; ``None`` to take the batch whole."""
    if not is_whole(most):
        raise TransferError(f"expected a whole number of at least 1 example in a chunk, got {most!r}.")
    leaves = jax.tree.leaves(inputs)
    if not leaves or not all(isinstance(leaf, Tracer) and leaf.ndim > 0 for leaf in leaves):
        return None
    counts = {leaf.shape[0] for leaf in leaves}
    count = counts.pop()
    if counts or not is_whole(count) or count <= most or jax.device_count() > 1:
        return None
    return next((size for size in range(most, (most - 1) // 2, -1) if size > 0 and count % size == 0), None)
