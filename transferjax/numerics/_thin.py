"""A convolution of few input channels (the stem of an image network) as shifted products, for the CPU backend.

The native convolution wastes most of a vector register on three channels. Here each input number is multiplied by a
vector of output channels, and the taps are summed in one pass. The transposes are native: they have no such waste.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from transferjax.numerics._depthwise import output_size

MOST_PRODUCTS = 32
"""Taps times input channels up to which the sum is one small kernel that compiles quickly."""

FEWEST_OUTPUTS = 8
"""Output channels from which on they fill a vector register."""


def fits(kernel: tuple[int, ...]) -> bool:
    """Whether a kernel ``(kh, kw, C, D)`` is small enough, and more than a matrix product."""
    taps = kernel[0] * kernel[1]
    return taps > 1 and taps * kernel[2] <= MOST_PRODUCTS and kernel[3] >= FEWEST_OUTPUTS


def forward(window: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[B, H, W, C], [kh, kw, C, D] -> [B, H', W', D]``."""
    (height, width), (sh, sw) = output_size(window), window.strides
    padded = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    weights = kernel.astype(jnp.float32)
    shape = (window.inputs[0], height, width, window.kernel[3])
    total: Any = lax.full(shape, 0.0, jnp.float32)
    for i in range(window.kernel[0]):
        for j in range(window.kernel[1]):
            stop = (shape[0], i + (height - 1) * sh + 1, j + (width - 1) * sw + 1)
            for c in range(window.kernel[2]):
                numbers = lax.slice(padded, (0, i, j, c), (*stop, c + 1), (1, sh, sw, 1)).astype(jnp.float32)
                tap = lax.slice(weights, (i, j, c, 0), (i + 1, j + 1, c + 1, shape[3]))
                wide = (lax.broadcast_in_dim(array, shape, (0, 1, 2, 3)) for array in (numbers, tap))
                total = lax.add(total, lax.mul(*wide))
    return total.astype(x.dtype)


def to_inputs(window: Any, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[B, H', W', D], [kh, kw, C, D] -> [B, H, W, C]``."""
    shape = jax.ShapeDtypeStruct(window.inputs, g.dtype)
    return jax.linear_transpose(lambda x: window.native(x, kernel), shape)(g)[0]


def to_kernel(window: Any, x: jax.Array, g: jax.Array) -> jax.Array:
    """``[B, H, W, C], [B, H', W', D] -> [kh, kw, C, D]``."""
    shape = jax.ShapeDtypeStruct(window.kernel, x.dtype)
    return jax.linear_transpose(lambda kernel: window.native(x, kernel), shape)(g)[0]
