"""HDF5 datasets in chunks, plain or compressed."""

from __future__ import annotations

import dataclasses
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from transferjax._errors import CheckpointError
from transferjax.io._boxes import Corner, blocks
from transferjax.io._bytes import Bytes, plain, read
from transferjax.io._reader import SMALL

_RATIO, _MOST = 1040, 1_000_000
_DEFLATE, _SHUFFLE = 1, 2


@dataclasses.dataclass(frozen=True)
class Chunked:
    """An array in blocks of one shape, each stored by itself; ``places`` are ``(offset, bytes)`` by block number."""

    source: Bytes
    shape: Corner
    dtype: np.dtype
    chunk: Corner
    places: Mapping[int, tuple[int, int]]
    filters: tuple[int, ...]
    where: str

    def box(self, low: Corner, high: Corner) -> np.ndarray:
        out = np.empty(tuple(b - a for a, b in zip(low, high)), self.dtype)
        source = plain(self.source)
        for number, first, last in blocks(self.shape, self.chunk, low, high):
            part = self._block(source, *self.places[number])
            from_, to = tuple(map(max, first, low)), tuple(map(min, last, high))
            out[_slices(from_, to, low)] = part[_slices(from_, to, first)]
        return out

    def _block(self, source: Bytes, offset: int, count: int) -> np.ndarray:
        size, data = math.prod(self.chunk) * self.dtype.itemsize, bytes(read(source, offset, count))
        for code in reversed(self.filters):
            data = _inflate(data, size) if code == _DEFLATE else _unshuffle(data, self.dtype.itemsize)
        if len(data) != size:
            raise CheckpointError(f"{self.where} is damaged: a chunk has {len(data)} of {size} bytes.")
        return np.frombuffer(data, self.dtype).reshape(self.chunk)


def _inflate(data: bytes, size: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        out = stream.decompress(data, size + 1)
    except zlib.error:
        return b""
    return out if stream.eof else b""  # its checksum was met


def _unshuffle(data: bytes, itemsize: int) -> bytes:
    if len(data) % itemsize:
        return b""
    return np.frombuffer(data, np.uint8).reshape(itemsize, -1).T.tobytes()


def chunked(
    source: Bytes, head: Bytes, path: str, shape: Corner, dtype: np.dtype, layout: bytes, pipeline: bytes | None,
    damaged: Callable[[str], Exception],
) -> Chunked:  # fmt: skip
    """Finds all chunks of a dataset.

    Raises:
      the error of ``damaged``: they do not cover the array, claim more than the file can hold, or are filtered by
      something other than deflate and shuffle.
    """
    rank = len(shape)
    if layout[2] != rank + 1 or len(layout) < 11 + 4 * (rank + 1) or not rank:
        raise damaged("its chunks have other dimensions than it")
    (tree,) = struct.unpack_from("<Q", layout, 3)
    *chunk, itemsize = struct.unpack_from(f"<{rank + 1}I", layout, 11)
    total, size = math.prod(shape) * dtype.itemsize, math.prod(chunk) * dtype.itemsize
    if itemsize != dtype.itemsize or not size or max(size, total) > max(SMALL, _RATIO * source.size):
        raise damaged(f"it claims chunks of {tuple(chunk)}, {total} bytes in all; that cannot be in this file")
    counts = [-(-n // c) for n, c in zip(shape, chunk)]
    if math.prod(counts) > _MOST:
        raise damaged(f"it claims {math.prod(counts)} chunks")
    filters = tuple(_filters(pipeline, damaged)) if pipeline else ()
    places: dict[int, tuple[int, int]] = {}
    for corner, place, count, skipped in _leaves(head, tree, rank, damaged) if total else ():
        cell = [a // c for a, c in zip(corner, chunk)]
        number = sum(c * math.prod(counts[i + 1 :]) for i, c in enumerate(cell))
        outside = any(a % c or k >= n for a, c, k, n in zip(corner, chunk, cell, counts))
        if outside or number in places or skipped or place + count > source.size:
            raise damaged("a chunk lies outside, comes twice, or was stored in another way than the others")
        places[number] = (place, count)
    if len(places) != (math.prod(counts) if total else 0):
        raise damaged(f"{len(places)} of its {math.prod(counts)} chunks were written")
    return Chunked(source, shape, dtype, tuple(chunk), places, filters, f"'{path}' in {source.where}")


def _leaves(head: Bytes, root: int, rank: int, damaged: Any) -> Iterator[tuple[Corner, int, int, int]]:
    """``(corner, offset, bytes, mask of skipped filters)`` of each chunk."""
    met: set[int] = set()
    waiting = [(root, -1)]
    step = 8 + 8 * (rank + 1)
    while waiting:
        address, level = waiting.pop()
        if address in met:
            raise damaged("its chunks are listed in a circle")
        met.add(address)
        magic, kind, depth, count = struct.unpack("<4sBBH", read(head, address, 8))
        if magic != b"TREE" or kind != 1 or (level != -1 and depth != level - 1):
            raise damaged(f"its list of chunks cannot be read at byte {address}")
        body = bytes(read(head, address + 24, count * (step + 8) + step))
        for at in range(0, count * (step + 8), step + 8):
            stored, skipped, *corner, _, child = struct.unpack_from(f"<II{rank + 2}Q", body, at)
            if depth:
                waiting.append((child, depth))
            else:
                yield tuple(corner), child, stored, skipped


def _filters(data: bytes, damaged: Any) -> Iterator[int]:
    at = 8
    for _ in range(data[1] if len(data) > 1 and data[0] == 1 else 255):
        if at + 8 > len(data):
            raise damaged("its filters cannot be read")
        code, name, _, values = struct.unpack_from("<4H", data, at)
        if code not in (_DEFLATE, _SHUFFLE):
            raise damaged(f"it is packed by filter {code}. Expected gzip and shuffle only")
        at += 8 + -(-name // 8) * 8 + 4 * (values + values % 2)
        yield code


def _slices(low: Corner, high: Corner, origin: Corner) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin))
