"""Matrices in few bits: int8 per channel, and four-bit NormalFloat with its block scales quantised once more."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import SelectionError, describe
from transferjax.program._leaves import Lifted, Scaled, reshaped_scale, spread, transposed_scale

BLOCK, GROUP = 64, 256
"""Weights per block scale of NF4, and block scales per scale of their own."""

NORMAL_FLOAT = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The 16 values of NF4: quantiles of the normal distribution, 0 among them."""

_static = {"static": True}


class Quantised(Lifted):
    """A matrix kept in few bits: what :func:`quantise_int8` and :func:`quantise_nf4` return.

    >>> leaves = quantise_int8(jnp.ones((3, 2))), quantise_nf4(jnp.ones((3, 2)))
    >>> [isinstance(leaf, Quantised) for leaf in leaves]
    [True, True]
    """

    def opened(self) -> Any:
        """The array, or a ``Scaled`` one whose product costs less."""
        return self.dense()

    def layered(self) -> Any:
        """The same with a leading axis of layers in every array, for ``Stacked``; ``None`` where it has no such form.

        >>> quantise_int8(jnp.ones((3, 4, 2))).layered().scale.shape
        (3, 2)
        """
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Quantised):
    """Symmetric int8: ``codes * scale``.

    Attributes:
      codes: int8, of the shape of the matrix, from -127 to 127.
      scale: float32, one per entry of ``axes``.
      axes: which axes have a scale of their own, in ascending order.
      kind: name of the matrix's dtype.

    >>> Int8(jnp.array([[127, -127]], jnp.int8), jnp.array([1.0, 2.0]) / 127, (1,), "float32").dense().tolist()
    [[1.0, -2.0]]
    """

    codes: Any
    scale: Any
    axes: tuple[int, ...] = dataclasses.field(metadata=_static)
    kind: str = dataclasses.field(metadata=_static)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.kind)

    def dense(self) -> jax.Array:
        return (self.codes.astype(jnp.float32) * spread(self.scale, self.axes, self.ndim)).astype(self.dtype)

    def opened(self) -> Scaled:
        return Scaled(self.codes.astype(self.dtype), self.scale.astype(self.dtype), self.axes)

    def layered(self) -> Int8:
        rest = tuple(axis - 1 for axis in self.axes if axis)
        scale = self.scale if 0 in self.axes else jnp.broadcast_to(self.scale, (self.shape[0], *self.scale.shape))
        return Int8(self.codes, scale, rest, self.kind)

    def cast(self, dtype: Any) -> Int8:
        return dataclasses.replace(self, kind=jnp.dtype(dtype).name)

    def transpose(self, order: Sequence[int]) -> Int8:
        return Int8(jnp.transpose(self.codes, order), *transposed_scale(self.scale, self.axes, order), self.kind)

    def reshape(self, shape: Sequence[int]) -> Int8 | None:
        found = reshaped_scale(self.scale, self.axes, self.shape, shape)
        return None if found is None else Int8(self.codes.reshape(shape), *found, self.kind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4(Quantised):
    """Four bits per weight: a NormalFloat value times the scale of its block of 64.

    Attributes:
      codes: uint8 ``[blocks, 32]``, two weights per byte, the first in the high bits.
      block_codes: int8 ``[blocks]``: a block's scale is ``mean + block_codes * group_scale``.
      group_scale: float32 ``[ceil(blocks / 256)]``.
      mean: float32, without axes: the mean of the block scales.
      original: shape of the matrix as it was quantised.
      steps: transpositions and reshapes since then.
      kind: name of the matrix's dtype.

    >>> quantise_nf4(jnp.array([1.0, 0.0, -1.0])).codes[0, :2].tolist()
    [247, 7]
    """

    codes: Any
    block_codes: Any
    group_scale: Any
    mean: Any
    original: tuple[int, ...] = dataclasses.field(metadata=_static)
    kind: str = dataclasses.field(metadata=_static)
    steps: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(default=(), metadata=_static)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.original
        for name, argument in self.steps:
            shape = argument if name == "reshape" else tuple(shape[axis] for axis in argument)
        return shape

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.kind)

    def dense(self) -> jax.Array:
        values = jnp.stack([self.codes >> 4, self.codes & 15], -1).reshape(-1, BLOCK)
        blocks = (
            jnp.asarray(NORMAL_FLOAT)[values] * _block_scales(self.block_codes, self.group_scale, self.mean)[:, None]
        )
        made = blocks.reshape(-1)[: math.prod(self.original)].reshape(self.original)
        for name, argument in self.steps:
            made = jnp.reshape(made, argument) if name == "reshape" else jnp.transpose(made, argument)
        return made.astype(self.dtype)

    def layered(self) -> NF4 | None:
        layers, *rest = self.original
        if self.steps or math.prod(rest) % (BLOCK * GROUP):
            return None  # a layer ends within a block or a group
        each = lambda x: x.reshape(layers, -1, *x.shape[1:])
        parts = {name: each(getattr(self, name)) for name in ("codes", "block_codes", "group_scale")}
        return dataclasses.replace(self, **parts, original=tuple(rest))

    def cast(self, dtype: Any) -> NF4:
        return dataclasses.replace(self, kind=jnp.dtype(dtype).name)

    def transpose(self, order: Sequence[int]) -> NF4:
        return dataclasses.replace(self, steps=(*self.steps, ("transpose", tuple(order))))

    def reshape(self, shape: Sequence[int]) -> NF4:
        return dataclasses.replace(self, steps=(*self.steps, ("reshape", tuple(shape))))


def quantise_int8(weights: jax.Array, axes: Sequence[int] = (-1,)) -> Int8:
    """The nearest matrix in int8 with one scale per channel, symmetric about 0.

    Args:
      weights: a floating-point array with at least one axis; ``jax.vmap`` quantises a stack of layers.
      axes: which axes have a scale of their own; default: the last, the outputs of a kernel ``[..., in, out]``.

    Returns:
      An :class:`Int8`; no weight moves by more than half of its channel's ``max |w| / 127``.

    Raises:
      SelectionError: ``weights`` is no floating-point array with axes, or lacks one of ``axes``.

    >>> leaf = quantise_int8(jnp.array([[1.0, -0.5], [0.25, 2.0]]))
    >>> leaf.codes.tolist(), leaf.scale.shape
    ([[127, -32], [32, 127]], (2,))
    """
    _check("quantise_int8", weights)
    if not all(-weights.ndim <= axis < weights.ndim for axis in axes):
        raise SelectionError(f"quantise_int8() expects axes of {describe(weights)}, got {tuple(axes)}.")
    own = tuple(sorted({axis % weights.ndim for axis in axes}))
    exact = weights.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), [axis for axis in range(weights.ndim) if axis not in own])
    scale = jnp.where(largest == 0, 1.0, largest) / 127
    codes = jnp.round(exact / spread(scale, own, weights.ndim)).astype(jnp.int8)
    return Int8(codes, scale, own, weights.dtype.name)


def quantise_nf4(weights: jax.Array) -> NF4:
    """The nearest matrix in four-bit NormalFloat: blocks of 64 weights, whose scales are kept in int8.

    Args:
      weights: a floating-point array with at least one axis; ``jax.vmap`` quantises a stack of layers.

    Returns:
      An :class:`NF4`, .516 bytes per weight.

    Raises:
      SelectionError: ``weights`` is no floating-point array with axes.

    Source: Dettmers et al., "QLoRA", 2023. The block scales are quantised linearly, in groups of 256 about their mean.

    >>> leaf = quantise_nf4(jnp.linspace(-1.0, 1.0, 128).reshape(8, 16))
    >>> leaf.codes.shape, float(jnp.abs(leaf.dense() - jnp.linspace(-1.0, 1.0, 128).reshape(8, 16)).max()) < 0.16
    ((2, 32), True)
    """
    _check("quantise_nf4", weights)
    flat = weights.astype(jnp.float32).reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    largest = jnp.max(jnp.abs(blocks), 1)
    mean = jnp.mean(largest)
    centred = jnp.pad(largest - mean, (0, -largest.size % GROUP)).reshape(-1, GROUP)
    group = jnp.max(jnp.abs(centred), 1) / 127
    codes = jnp.round(centred / jnp.where(group == 0, 1.0, group)[:, None]).astype(jnp.int8).reshape(-1)[: largest.size]
    scale = _block_scales(codes, group, mean)
    levels = jnp.asarray((NORMAL_FLOAT[1:] + NORMAL_FLOAT[:-1]) / 2)
    nearest = jnp.searchsorted(levels, blocks / jnp.where(scale == 0, 1.0, scale)[:, None]).astype(jnp.uint8)
    packed = nearest[:, ::2] << 4 | nearest[:, 1::2]
    return NF4(packed, codes, group, mean, tuple(weights.shape), weights.dtype.name)


def _block_scales(codes: Any, group: Any, mean: Any) -> jax.Array:
    return mean + codes * jnp.repeat(group, GROUP)[: codes.shape[0]]


def _check(name: str, weights: Any) -> None:
    if getattr(weights, "ndim", 0) < 1 or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise SelectionError(
            f"{name}() expects a floating-point array with axes, got {describe(weights)}. Narrow the selector, for "
            "example to '**/kernel'."
        )
