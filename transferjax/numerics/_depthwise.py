"""The depthwise convolution and its two transposes as shifted products, for the CPU backend.

Every function takes the static window first; see ``_convolution.Window``. Products are summed in float32. The sums are
written in ``jax.lax``, whose operations are traced several times faster than those of ``jax.numpy``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Terms that one element of the weight gradient's fused sum adds up: more of them write less, but compile longer.
TERMS = 16


def output_size(window: Any) -> tuple[int, int]:
    """Height and width of the output."""
    return tuple(
        (n + sum(p) - k) // s + 1
        for n, p, k, s in zip(window.inputs[1:3], window.padding, window.kernel[:2], window.strides)
    )  # pyright: ignore[reportReturnType]


def forward(window: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[B, H, W, C], [kh, kw, 1, C] -> [B, H', W', C]``."""
    (height, width), (sh, sw) = output_size(window), window.strides
    padded = _padded(x, *((*pads, 0) for pads in window.padding))
    batch, channels = window.inputs[0], window.inputs[3]
    weights = kernel.astype(jnp.float32)
    total: Any = None
    for i in range(window.kernel[0]):
        for j in range(window.kernel[1]):
            stop = (batch, i + (height - 1) * sh + 1, j + (width - 1) * sw + 1, channels)
            part = lax.slice(padded, (0, i, j, 0), stop, (1, sh, sw, 1))
            total = _add(total, _scaled(part, weights, i, j))
    return total.astype(x.dtype)


def to_inputs(window: Any, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[B, H', W', C], [kh, kw, 1, C] -> [B, H, W, C]``.

    With strides, the rows (and columns) of the padded result that have the same remainder form a convolution of
    stride one each; they are computed apart and interleaved. Rows that are padding are left out where possible.
    """
    batch, height, width, channels = window.inputs
    (sh, sw), (kh, kw) = window.strides, window.kernel[:2]
    (y_first, rows, y_pad), (x_first, columns, x_pad) = (_transposed_axis(window, axis) for axis in (0, 1))
    padded = _padded(g, y_pad, x_pad)
    weights = kernel.astype(jnp.float32)
    deep, wide = (kh - 1) // sh, (kw - 1) // sw

    def phase(a: int, b: int) -> jax.Array:
        total: Any = jnp.zeros((batch, rows, columns, channels), jnp.float32) if a >= kh or b >= kw else None
        for i in range(a, kh, sh):
            for j in range(b, kw, sw):
                y, x = deep - i // sh, wide - j // sw
                part = lax.slice(padded, (0, y, x, 0), (batch, y + rows, x + columns, channels))
                total = _add(total, _scaled(part, weights, i, j))
        return total.astype(g.dtype)

    if (sh, sw) == (1, 1):
        return phase(0, 0)
    phases = [jnp.stack([phase(a, b) for b in range(sw)], axis=3) for a in range(sh)]
    full = jnp.stack(phases, axis=2).reshape(batch, rows * sh, columns * sw, channels)
    return full[:, y_first : y_first + height, x_first : x_first + width]


def _padded(x: jax.Array, rows: tuple[int, int, int], columns: tuple[int, int, int]) -> jax.Array:
    """``x`` with zeros around it, as an array of its own. Without the barrier XLA reads the taps in the middle from
    ``x`` itself, and so fuses what computes ``x`` into every reader: a stem's convolution would run twice."""
    return lax.optimization_barrier(lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), rows, columns, (0, 0, 0))))


def _transposed_axis(window: Any, axis: int) -> tuple[int, int, tuple[int, int, int]]:
    """Of the interleaved result: the first wanted entry, entries per phase, and the pad of ``g`` that they need."""
    size, before, stride = window.inputs[axis + 1], window.padding[axis][0], window.strides[axis]
    start = before // stride
    entries = -(-(before + size) // stride) - start
    low = (window.kernel[axis] - 1) // stride - start
    return before - start * stride, entries, (low, start + entries - output_size(window)[axis], 0)


def to_kernel(window: Any, x: jax.Array, g: jax.Array) -> jax.Array:
    """``[B, H, W, C], [B, H', W', C] -> [kh, kw, 1, C]``.

    A plain sum of products per tap makes XLA write every product. Here one fused pass per row of taps adds
    ``TERMS`` products of different examples, and what is left to reduce is that many times smaller.
    """
    kh, sh = window.kernel[0], window.strides[0]
    terms = min(TERMS, window.inputs[0])
    examples = -(-window.inputs[0] // terms)
    parts = _phases(window, x, examples * terms)
    g = jnp.pad(g, ((0, examples * terms - g.shape[0]), (0, 0), (0, 0), (0, 0)))
    taps: list[Any] = [None] * kh
    for a in range(min(sh, kh)):
        count = len(range(a, kh, sh))
        rows = lax.map(lambda i, a=a: _row_of_taps(window, parts[a], g, i, terms), jnp.arange(count))
        for number in range(count):
            taps[a + number * sh] = rows[number]
    return jnp.stack(taps)[:, :, None].astype(x.dtype)


def _phases(window: Any, x: jax.Array, batch: int) -> list[list[jax.Array]]:
    """The padded input by remainder of row and column, so that every tap is a slice of stride one."""
    pads, sizes = [], output_size(window)
    for n, (before, _), k, s, out in zip(window.inputs[1:3], window.padding, window.kernel[:2], window.strides, sizes):
        pads.append((before, ((k - 1) // s + out) * s - n - before, 0))
    # The last rows may lie behind every window: a negative pad drops them.
    padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, batch - x.shape[0], 0), *pads, (0, 0, 0)))
    sh, sw = window.strides
    if (sh, sw) == (1, 1):
        return [[padded]]
    return lax.optimization_barrier([[padded[:, a::sh, b::sw] for b in range(sw)] for a in range(sh)])


def _row_of_taps(window: Any, parts: list[jax.Array], g: jax.Array, i: jax.Array, terms: int) -> jax.Array:
    (height, width), stride = output_size(window), window.strides[1]
    rows = [lax.dynamic_slice_in_dim(part, i, height, axis=1) for part in parts]
    size, channels = g.shape[0] // terms, g.shape[3]
    pieces = [lax.slice_in_dim(g, t * size, (t + 1) * size).astype(jnp.float32) for t in range(terms)]
    sums = []
    for j in range(window.kernel[1]):
        row, left, total = rows[j % stride], j // stride, None
        for t, piece in enumerate(pieces):
            stop = ((t + 1) * size, height, left + width, channels)
            shifted = lax.slice(row, (t * size, 0, left, 0), stop).astype(jnp.float32)
            total = _add(total, lax.mul(shifted, piece))
        sums.append(total)
    return jnp.stack(sums).sum((1, 2, 3))


def _scaled(part: jax.Array, weights: jax.Array, i: int, j: int) -> jax.Array:
    """A shifted input times one tap: ``[B, H, W, C], [kh, kw, 1, C] -> [B, H, W, C]`` in float32."""
    tap = lax.slice(weights, (i, j, 0, 0), (i + 1, j + 1, 1, weights.shape[3]))
    return lax.mul(part.astype(jnp.float32), lax.broadcast_in_dim(tap, part.shape, (0, 1, 2, 3)))


def _add(total: Any, part: jax.Array) -> jax.Array:
    return part if total is None else lax.add(total, part)
