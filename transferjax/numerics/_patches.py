"""The 1x1 and the few-channel convolution and their two transposes as matrix products, for the CPU backend.

Every function takes the static window first; see ``_convolution.Window``. Products are summed in float32.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from transferjax.numerics._depthwise import output_size


def forward(window: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[B, H, W, C], [kh, kw, C, D] -> [B, H', W', D]``."""
    patches = _patches(window, x)
    matrix = kernel.reshape(-1, window.kernel[3])
    return _product(window, patches, matrix, ((3,), (0,))).astype(x.dtype)


def to_inputs(window: Any, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[B, H', W', D], [kh, kw, C, D] -> [B, H, W, C]``."""
    matrix = kernel.reshape(-1, window.kernel[3])
    patches = _product(window, g, matrix, ((3,), (1,))).astype(g.dtype)
    shape = jax.ShapeDtypeStruct(window.inputs, g.dtype)
    return jax.linear_transpose(lambda x: _patches(window, x), shape)(patches)[0]


def to_kernel(window: Any, x: jax.Array, g: jax.Array) -> jax.Array:
    """``[B, H, W, C], [B, H', W', D] -> [kh, kw, C, D]``."""
    # In two dimensions: with more, XLA transposes the patches first.
    patches = _patches(window, x).reshape(-1, math.prod(window.kernel[:3]))
    product = _product(window, patches, g.reshape(-1, window.kernel[3]), ((0,), (0,)))
    return product.reshape(window.kernel).astype(x.dtype)


def _product(window: Any, a: jax.Array, b: jax.Array, axes: Any) -> jax.Array:
    return lax.dot_general(a, b, (axes, ((), ())), precision=window.precision, preferred_element_type=jnp.float32)


def _patches(window: Any, x: jax.Array) -> jax.Array:
    """``[B, H, W, C] -> [B, H', W', kh * kw * C]``: what each output position sees."""
    (height, width), (sh, sw) = output_size(window), window.strides
    padded = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    parts = [
        padded[:, i : i + (height - 1) * sh + 1 : sh, j : j + (width - 1) * sw + 1 : sw]
        for i in range(window.kernel[0])
        for j in range(window.kernel[1])
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
