"""Values for an abstract NNX module: one random draw for all kernels, so that creation compiles one small program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from transferjax import tree

Std = Callable[[str, tuple[int, ...]], float | None]


def materialise(build: Callable[[], Any], key: jax.Array, std: Std, head: str) -> Any:
    """The module that ``build()`` describes, with freshly drawn values.

    Leaves that have a standard deviation are normal; of the others scales and variances are one, all else zero.

    Args:
      build: makes the module; it is traced by ``nnx.eval_shape`` only.
      key: a typed PRNG key, consumed.
      std: ``(path, shape) -> standard deviation`` or ``None``.
      head: how the paths of the last dense layer begin; its size changes no other draw.

    Returns:
      The module.
    """
    graph, state = nnx.split(nnx.eval_shape(build))
    flat, treedef = tree.flatten(state)
    values = _values(dict(flat), key, std, head)
    return nnx.merge(graph, jax.tree.unflatten(treedef, [values[path] for path, _ in flat]))


def _values(leaves: dict[str, Any], key: jax.Array, std: Std, head: str) -> dict[str, Any]:
    traced = isinstance(key, Tracer)
    # Drawn eagerly, one array per shape would compile one program per shape; numpy slices compile nothing.
    module = jnp if traced else np
    key_kernels, key_streams = jax.random.split(key)
    scales = {path: std(path, leaf.shape) for path, leaf in leaves.items() if not _is_key(leaf)}
    drawn = {path: np.float32(scale) for path, scale in scales.items() if scale is not None}
    # Drawn in sorted order; the draw of a path must not depend on the number of classes, so the head comes last.
    order = sorted(drawn, key=lambda path: (path.startswith(head), tree.natural(path)))
    draw = module.asarray(jax.random.normal(key_kernels, (sum(leaves[path].size for path in order),)))
    values: dict[str, Any] = {}
    start = 0
    for path in order:
        leaf = leaves[path]
        part = draw[start : start + leaf.size].reshape(leaf.shape)
        values[path] = jnp.asarray(part * drawn[path], leaf.dtype)
        start += leaf.size
    streams = [path for path, leaf in leaves.items() if _is_key(leaf)]
    values.update(zip(streams, jax.random.split(key_streams, max(1, len(streams))), strict=False))
    return {path: values[path] if path in values else _constant(path, leaf) for path, leaf in leaves.items()}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _constant(path: str, leaf: Any) -> jax.Array:
    ones = path.endswith(("/scale", "/var"))
    return jnp.asarray((np.ones if ones else np.zeros)(leaf.shape, leaf.dtype))


class _ShapeRngs:
    def __init__(self):
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def shape_rngs() -> Any:
    """In place of ``nnx.Rngs`` where a network without dropout is traced for its shapes: each draw is the same key.

    Under a trace, NNX looks through all that was traced whenever it counts a draw: nine tenths of the time that it
    takes to make a large network.

    >>> nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=shape_rngs())).kernel.shape
    (2, 3)
    """
    return _ShapeRngs()
