"""Values for an abstract NNX module: one random draw for all kernels, so that creation compiles one small program."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from transferjax import tree

CLASSIFIER_STD = 0.01


def materialise(build: Callable[[], Any], key: jax.Array) -> Any:
    """The module that ``build()`` describes, with freshly drawn values.

    Convolution kernels are normal with variance ``2 / (k * k * features)`` (depthwise: ``2 / (k * k)``), as the
    EfficientNet reference has them; dense kernels are normal with standard deviation 0.01; scales and variances are
    one, biases and means zero.

    Args:
      build: makes the module; it is traced by ``nnx.eval_shape`` only.
      key: a typed PRNG key, consumed.

    Returns:
      The module.
    """
    graph, state = nnx.split(nnx.eval_shape(build))
    flat, treedef = tree.flatten(state)
    values = _values(dict(flat), key)
    return nnx.merge(graph, jax.tree.unflatten(treedef, [values[path] for path, _ in flat]))


def _values(leaves: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    traced = isinstance(key, Tracer)
    # Drawn eagerly, one array per shape would compile one program per shape; numpy slices compile nothing.
    module = jnp if traced else np
    key_kernels, key_streams = jax.random.split(key)
    kernels = {path: leaf for path, leaf in leaves.items() if path.endswith("/kernel")}
    # Drawn in sorted order; the draw of a path must not depend on the number of classes, so the head comes last.
    order = sorted(kernels, key=lambda path: (path.startswith("head/fc/"), tree.natural(path)))
    draw = module.asarray(jax.random.normal(key_kernels, (sum(kernels[path].size for path in order),)))
    values: dict[str, Any] = {}
    start = 0
    for path in order:
        leaf = kernels[path]
        part = draw[start : start + leaf.size].reshape(leaf.shape)
        values[path] = jnp.asarray(part * _std(leaf.shape), leaf.dtype)
        start += leaf.size
    streams = [path for path, leaf in leaves.items() if _is_key(leaf)]
    values.update(zip(streams, jax.random.split(key_streams, max(1, len(streams))), strict=False))
    return {path: values[path] if path in values else _constant(path, leaf) for path, leaf in leaves.items()}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _std(shape: tuple[int, ...]) -> Any:
    if len(shape) == 2:
        return np.float32(CLASSIFIER_STD)
    *window, inputs, features = shape
    outputs = 1 if inputs == 1 else features
    return np.float32(math.sqrt(2.0 / (math.prod(window) * outputs)))


def _constant(path: str, leaf: Any) -> jax.Array:
    ones = path.endswith(("/scale", "/var"))
    return jnp.asarray((np.ones if ones else np.zeros)(leaf.shape, leaf.dtype))
