"""The 1x1 convolution and its two transposes as matrix products, for the CPU backend.

Every function takes the static window first; see ``_convolution.Window``. Products are summed in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def forward(window: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[B, H, W, C], [1, 1, C, D] -> [B, H', W', D]``."""
    return _product(window, _seen(window, x), kernel[0, 0], ((3,), (0,))).astype(x.dtype)


def to_inputs(window: Any, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[B, H', W', D], [1, 1, C, D] -> [B, H, W, C]``."""
    seen = _product(window, g, kernel[0, 0], ((3,), (1,))).astype(g.dtype)
    shape = jax.ShapeDtypeStruct(window.inputs, g.dtype)
    return jax.linear_transpose(lambda x: _seen(window, x), shape)(seen)[0]


def to_kernel(window: Any, x: jax.Array, g: jax.Array) -> jax.Array:
    """``[B, H, W, C], [B, H', W', D] -> [1, 1, C, D]``."""
    # In two dimensions: with more, XLA transposes the input first.
    rows, columns = _seen(window, x).reshape(-1, window.kernel[2]), g.reshape(-1, window.kernel[3])
    return _product(window, rows, columns, ((0,), (0,)))[None, None].astype(x.dtype)


def _product(window: Any, a: jax.Array, b: jax.Array, axes: Any) -> jax.Array:
    return lax.dot_general(a, b, (axes, ((), ())), precision=window.precision, preferred_element_type=jnp.float32)


def _seen(window: Any, x: jax.Array) -> jax.Array:
    """The pixels that some output position sees, with the padding's zeros."""
    padded = jnp.pad(x, ((0, 0), *window.padding, (0, 0))) if any(map(any, window.padding)) else x
    return padded[:, :: window.strides[0], :: window.strides[1]]
