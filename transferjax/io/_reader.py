"""What every format's reader hands over: entries that can be read in part, and facts about the file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from transferjax._errors import CheckpointError
from transferjax.io._boxes import Corner, c_strides, read_box
from transferjax.io._bytes import Bytes, check_range, plain

SMALL = 1 << 24


class Entry(Protocol):
    """One array of a checkpoint."""

    @property
    def shape(self) -> Corner: ...

    @property
    def dtype(self) -> np.dtype: ...

    def box(self, low: Corner, high: Corner) -> np.ndarray:
        """A new C-contiguous array of the elements ``[low, high)``."""
        ...


@dataclasses.dataclass(frozen=True)
class Reader:
    """An opened checkpoint, before its digests are looked at.

    Attributes:
      format: the name of the format.
      entries: the arrays by their names in the file.
      metadata: everything that is no array.
      manifest: what ``save`` wrote beside the arrays, unchecked; ``None`` in foreign files.
      checked: whether the format's own checksums cover every byte that is served.
      digest: the sha256 of the file or directory, computed when called.
      kinds: which arrays stand for something else, where the format says so: ``"key:<implementation>"``.
      beside: facts from files beside the weights: ``config`` of a folder of Hugging Face.
    """

    format: str
    entries: Mapping[str, Entry]
    metadata: Mapping[str, Any]
    manifest: Any
    checked: bool
    digest: Callable[[], str]
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Strided:
    """An array that lies in bytes at constant strides."""

    source: Bytes
    offset: int
    shape: Corner
    dtype: np.dtype
    strides: Corner

    def box(self, low: Corner, high: Corner, out: np.ndarray | None = None) -> np.ndarray:
        return read_box(plain(self.source), self.dtype, self.offset, self.strides, low, high, out)


def box_into(entry: Entry, low: Corner, high: Corner, out: np.ndarray) -> None:
    """Puts the elements ``[low, high)`` into a C-contiguous array of their shape and dtype."""
    if isinstance(entry, Strided):
        entry.box(low, high, out)
    else:
        out[...] = entry.box(low, high)


def strided(
    source: Bytes, offset: int, shape: Corner, dtype: np.dtype, strides: Corner | None, name: str, limit: int
) -> Strided:
    """A :class:`Strided` whose bytes all exist.

    Args:
      strides: in bytes; ``None``: C order.
      name: of the array, for errors.
      limit: an array of more bytes than this and than 16 MiB raises (a repeated element may claim any size).

    Raises:
      CheckpointError: a size is no count, or the array reaches beyond its bytes.
    """
    strides = c_strides(shape, dtype.itemsize) if strides is None else strides
    numbers = (offset, *shape, *strides)
    if len(strides) != len(shape) or not all(is_count(n) for n in numbers) or len(shape) > 64:
        raise CheckpointError(f"'{name}' in {source.where} is damaged: its shape or position is no list of counts.")
    count = math.prod(shape)
    if count:
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides)) + dtype.itemsize
        if last > source.size:
            raise CheckpointError(
                f"'{name}' in {source.where} is damaged or truncated: {shape} {dtype} ends at byte {last}, "
                f"but there are {source.size}."
            )
        if count * dtype.itemsize > max(limit, SMALL):
            raise CheckpointError(
                f"'{name}' in {source.where} claims {count * dtype.itemsize} bytes, more than the whole file has "
                f"({limit}). Expected a materialised array: save tensor.contiguous()."
            )
        check_range(source, offset, last - offset)
    elif max(shape, default=0) >= 1 << 48:
        raise CheckpointError(f"'{name}' in {source.where} is damaged: shape {shape} is beyond any array.")
    return Strided(source, offset, shape, dtype, strides)


def is_count(value: Any) -> bool:
    """Whether a value from a file is a whole number from 0 on (``True`` is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
