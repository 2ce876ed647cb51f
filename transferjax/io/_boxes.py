"""Boxes: rectangular parts of an array, and where their bytes lie."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np

from transferjax._errors import CheckpointError
from transferjax.io._bytes import Bytes, check_range

Corner = tuple[int, ...]
NEAR = 1 << 16
"""Gaps up to this many bytes are read over rather than jumped: one read of 64 KiB costs less than two."""


def c_strides(shape: Corner, itemsize: int) -> Corner:
    """Byte strides of a C-contiguous array.

    >>> c_strides((2, 3, 4), 4)
    (48, 16, 4)
    """
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def normalise(index: Any, shape: Corner, path: str) -> tuple[Corner, Corner, tuple[Any, ...]]:
    """The smallest box that holds ``array[index]``, and the index inside that box.

    Args:
      index: integers, slices (any step) and one ``...``, as in numpy's basic indexing.
      shape: the array's shape.
      path: the leaf's name, for errors.

    Returns:
      ``(low, high, inner)`` with ``array[low:high][inner] == array[index]``.

    >>> normalise((slice(None, None, -2), 1), (5, 3), "w")
    ((0, 1), (5, 2), (slice(4, None, -2), 0))
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1 or len(parts) - len(dots) > len(shape):
        raise CheckpointError(f"index {index!r} has too many parts for '{path}', which has shape {shape}.")
    at = dots[0] if dots else len(parts)
    parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + len(dots))
    low, high, inner = [], [], []
    for part, size in zip(parts, shape, strict=True):
        first, last, rest = _along(part, size, path, shape)
        low.append(first)
        high.append(last)
        inner.append(rest)
    return tuple(low), tuple(high), tuple(inner)


def _along(part: Any, size: int, path: str, shape: Corner) -> tuple[int, int, Any]:
    if isinstance(part, slice):
        positions = range(size)[part]
        if not positions:
            return 0, 0, slice(0, 0)
        first, last = min(positions[0], positions[-1]), max(positions[0], positions[-1])
        step = positions.step
        return first, last + 1, slice(None, None, step) if step > 0 else slice(last - first, None, step)
    try:
        position = operator.index(part)
    except TypeError:
        raise CheckpointError(
            f"'{path}' cannot be indexed by {type(part).__name__}. Expected integers, slices and '...'."
        ) from None
    if isinstance(part, bool) or not -size <= position < size:
        raise CheckpointError(f"index {part} is outside '{path}', which has shape {shape}.")
    return position % size, position % size + 1, 0


def read_box(
    source: Bytes,
    dtype: np.dtype,
    offset: int,
    strides: Corner,
    low: Corner,
    high: Corner,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The box ``[low, high)`` of an array that lies in ``source``, C-contiguous.

    Args:
      source: the bytes.
      dtype: of the elements, little-endian.
      offset: position of the array's first element.
      strides: byte strides, none negative.
      out: a C-contiguous array of the box's shape and ``dtype`` that is filled; ``None``: a new one.
    """
    out = np.empty(tuple(b - a for a, b in zip(low, high)), dtype) if out is None else out
    if not out.size:
        return out
    last = offset + sum((b - 1) * s for b, s in zip(high, strides)) + dtype.itemsize
    check_range(source, offset, last - offset)
    _fill(source, out, offset + sum(a * s for a, s in zip(low, strides)), strides)
    return out


def _fill(source: Bytes, out: np.ndarray, offset: int, strides: Corner) -> None:
    span = sum((n - 1) * s for n, s in zip(out.shape, strides)) + out.itemsize
    natural = c_strides(out.shape, out.itemsize)
    if all(n == 1 or s == c for n, s, c in zip(out.shape, strides, natural)):
        source.read_into(offset, raw(out))
    elif span <= max(NEAR, 2 * out.nbytes):
        buffer = np.empty(span, np.uint8)
        source.read_into(offset, raw(buffer))
        if span % out.itemsize:
            raise CheckpointError(f"{source.where} is damaged: strides {strides} do not fit the element size.")
        out[...] = np.ndarray(out.shape, out.dtype, buffer, 0, strides)
    else:
        for row in range(out.shape[0]):
            _fill(source, out[row, ...], offset + row * strides[0], strides[1:])


def raw(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array, shared."""
    flat: Any = array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
    return memoryview(flat)


def block_shape(shape: Corner, itemsize: int, limit: int) -> Corner:
    """The largest C-contiguous block of at most ``limit`` bytes: ones, then one part, then whole axes.

    >>> block_shape((100, 50, 4), 4, 1600)
    (2, 50, 4)
    >>> block_shape((100, 50, 4), 4, 200)
    (1, 12, 4)
    """
    block = [max(1, n) for n in shape]
    inner = itemsize
    for axis in range(len(shape) - 1, -1, -1):
        if inner * shape[axis] > limit:
            block[axis] = max(1, limit // inner)
            block[:axis] = [1] * axis
            break
        inner *= shape[axis]
    return tuple(block)


def block_count(shape: Corner, block: Corner) -> int:
    """How many blocks cover an array; zero-size arrays have none."""
    return math.prod(-(-n // b) for n, b in zip(shape, block)) if all(shape) else 0


def blocks(shape: Corner, block: Corner, low: Corner, high: Corner) -> Iterator[tuple[int, Corner, Corner]]:
    """The blocks that a box touches: ``(number, low, high)`` in C order."""
    counts = [-(-n // b) for n, b in zip(shape, block)]
    touched = [range(a // k, -(-b // k)) if b > a else range(0) for a, b, k in zip(low, high, block)]
    for cell in itertools.product(*touched):
        number = 0
        for position, count in zip(cell, counts):
            number = number * count + position
        first = tuple(c * k for c, k in zip(cell, block))
        yield number, first, tuple(min(f + k, n) for f, k, n in zip(first, block, shape))
