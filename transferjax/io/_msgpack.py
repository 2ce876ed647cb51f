"""Flax's msgpack files (``flax.serialization``), read lazily and written one array at a time, without either."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from transferjax._errors import CheckpointError
from transferjax.io._boxes import raw
from transferjax.io._bytes import FileBytes, Joined, Paged, Window
from transferjax.io._host import is_numbers
from transferjax.io._manifest import dtype_of
from transferjax.io._msgpack_stream import Cursor, Extension, header, pack
from transferjax.io._reader import Entry, Reader, Strided, is_count, strided
from transferjax.tree import nest

MARK = "__msgpack_chunked_array__"
KEY = "transferjax"
"""Where the manifest stands: beside the chunks of the last array, where Flax does not look."""
_CHUNK = 1 << 30
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3


def looks_like(head: bytes) -> bool:
    """Whether a file begins as a mapping from text does."""
    wide = {b"\xde": 3, b"\xdf": 5}
    first, second = head[:1], head[wide.get(head[:1], 1) :][:1]
    known = first in wide or b"\x81" <= first <= b"\x8f"
    return known and (b"\xa0" <= second <= b"\xbf" or second in (b"\xd9", b"\xda"))


def read_msgpack(file: FileBytes) -> Reader:
    """Opens a file by walking over its names and headers; the arrays are jumped over.

    Raises:
      CheckpointError: damage, or something that Flax does not write.
    """
    cursor = Cursor(file, Paged(file))
    value = cursor.value()
    if cursor.position != file.size:
        raise cursor.damaged(f"{file.size - cursor.position} bytes follow its end")
    if not isinstance(value, dict):
        raise cursor.damaged("it holds no mapping of names")
    found = _Found(cursor)
    found.walk("", value)
    if not found.entries:
        raise CheckpointError(f"{file.where} holds no arrays.")
    return Reader("msgpack", found.entries, found.metadata, found.manifest, False, file.sha256, found.kinds)


@dataclasses.dataclass(frozen=True)
class _Number:
    """A number that stands among the names."""

    value: np.ndarray
    shape: tuple[int, ...] = ()

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype

    def box(self, low: tuple[int, ...], high: tuple[int, ...]) -> np.ndarray:
        return self.value.copy()


class _Found:
    """What a walk over the parsed values finds."""

    def __init__(self, cursor: Cursor):
        self._cursor = cursor
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}
        self.manifest: str | None = None

    def walk(self, path: str, value: Any) -> None:
        if isinstance(value, dict) and MARK not in value:
            for key, item in value.items():
                self.walk(f"{path}/{key}" if path else key, item)
        elif isinstance(value, list):
            for number, item in enumerate(value):
                self.walk(f"{path}/{number}" if path else str(number), item)
        elif path in self.entries or path in self.metadata:
            raise self._cursor.damaged(f"two values are called '{path}'")
        elif isinstance(value, str) and path.rpartition("/")[2] == KEY:
            raise self._cursor.damaged(f"the digests at '{path}' stand beside no array in chunks")
        elif isinstance(value, str | None):
            self.metadata[path] = value
        else:
            self.entries[path] = self._leaf(path, value)

    def _leaf(self, path: str, value: Any) -> Entry:
        if isinstance(value, dict):
            return self._chunked(path, value)
        if isinstance(value, Window) or (isinstance(value, Extension) and not _ARRAY <= value.code <= _SCALAR):
            kind = "raw bytes" if isinstance(value, Window) else f"an extension of type {value.code}"
            raise self._cursor.damaged(f"'{path}' is {kind}, which Flax does not write")
        if isinstance(value, Extension) and value.code != _COMPLEX:
            out = self._array(path, value)
            if value.code == _SCALAR and out.shape:
                raise self._cursor.damaged(f"'{path}' is a single number with a shape")
            return out
        number = self._complex(path, value.data) if isinstance(value, Extension) else value
        if isinstance(number, int) and number >= 1 << 63:
            raise self._cursor.damaged(f"'{path}' is an integer beyond 63 bits")
        self.kinds[path] = type(number).__name__
        return _Number(np.array(number))

    def _complex(self, path: str, data: Window) -> complex:
        parts = Cursor(data).value()
        if not isinstance(parts, list) or len(parts) != 2 or not all(type(part) in (int, float) for part in parts):
            raise self._cursor.damaged(f"'{path}' is no complex number")
        return complex(*parts)

    def _array(self, path: str, value: Extension) -> Strided:
        cursor, data = Cursor(value.data, value.head), value.data
        parts = cursor.value()
        if cursor.position != data.size or not isinstance(parts, list) or len(parts) != 3:
            raise self._cursor.damaged(f"'{path}' is no array: expected its shape, dtype and bytes")
        shape, name, content = parts
        if not _is_shape(shape) or not isinstance(name, str) or not isinstance(content, Window):
            raise self._cursor.damaged(f"'{path}' is no array: expected its shape, dtype and bytes")
        dtype = dtype_of(name, f"'{path}' in {self._cursor.where}")
        if not is_numbers(dtype) or dtype.char in "gG":
            raise self._cursor.damaged(f"'{path}' holds {name[:40]}. Expected numbers")
        if math.prod(shape) * dtype.itemsize != content.size:
            raise self._cursor.damaged(f"'{path}' is {tuple(shape)} {dtype}, but {content.size} bytes are stored")
        return strided(content, 0, tuple(shape), dtype, None, path, content.size)

    def _chunked(self, path: str, value: dict[str, Any]) -> Strided:
        if set(value) - {KEY} != {MARK, "shape", "chunks"} or not isinstance(value.get(KEY, ""), str):
            raise self._cursor.damaged(f"'{path}' is no array in chunks: expected its shape and chunks")
        if KEY in value and self.manifest is not None:
            raise self._cursor.damaged(f"'{path}' is the second to carry digests")
        self.manifest = value.get(KEY, self.manifest)
        shape, chunks = _listed(value["shape"]), _listed(value["chunks"])
        if not _is_shape(shape) or not chunks:
            raise self._cursor.damaged(f"'{path}' is no array in chunks: expected its shape and chunks")
        parts: list[Strided] = []
        for chunk in chunks:
            if not isinstance(chunk, Extension) or chunk.code != _ARRAY:
                raise self._cursor.damaged(f"a chunk of '{path}' is no array")
            parts.append(self._array(path, chunk))
        dtype = parts[0].dtype
        source = Joined([part.source for part in parts], self._cursor.where)
        if (
            any(p.dtype != dtype or len(p.shape) != 1 for p in parts)
            or math.prod(shape) * dtype.itemsize != source.size
        ):
            raise self._cursor.damaged(f"the chunks of '{path}' do not make up {tuple(shape)} {dtype}")
        return strided(source, 0, tuple(shape), dtype, None, path, source.size)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_count, value)) and len(value) <= 64


def _listed(value: Any) -> Any:
    """``{"0": a, "1": b}`` as ``[a, b]``: Flax's form of tuples."""
    if not isinstance(value, dict) or any(str(i) not in value for i in range(len(value))):
        return None
    return [value[str(i)] for i in range(len(value))]


def write_msgpack(
    file: BinaryIO,
    arrays: Mapping[str, Callable[[], np.ndarray]],
    shapes: Mapping[str, Any],
    manifest: Callable[[], str],
) -> None:
    """Writes one array after another into a file that ``flax.serialization.msgpack_restore`` reads as nested dicts.

    Args:
      file: open for writing.
      arrays: functions that give each array, C-contiguous, when its turn comes.
      shapes: what those arrays will be.
      manifest: gives the text that stands beside the last array's chunks; asked when all arrays are written.
    """
    order = list(shapes)

    def write(node: Any) -> None:
        if not isinstance(node, str):
            file.write(header("mapping", len(node)))
            for key, inner in node.items():
                file.write(pack(key))
                write(inner)
            return
        last, size = node == order[-1], math.prod(shapes[node].shape) * shapes[node].dtype.itemsize
        if last or size > _CHUNK:
            _write_chunks(file, arrays[node](), manifest if last else None)
        else:
            _write_array(file, arrays[node]())

    tree = nest({name: name for name in order})
    order.sort(key=_order(tree).index)
    write(tree)


def _order(node: Any) -> list[str]:
    """The leaves of nested dicts in the order in which they are written."""
    return [node] if isinstance(node, str) else [name for inner in node.values() for name in _order(inner)]


def _write_chunks(file: BinaryIO, array: np.ndarray, manifest: Callable[[], str] | None) -> None:
    flat, step = array.reshape(-1), max(1, _CHUNK // array.dtype.itemsize)
    starts = range(0, max(1, flat.size), step)
    file.write(header("mapping", 3 if manifest is None else 4))
    file.write(pack(MARK) + pack(True) + pack("shape") + header("mapping", array.ndim))
    for axis, size in enumerate(array.shape):
        file.write(pack(str(axis)) + pack(size))
    file.write(pack("chunks") + header("mapping", len(starts)))
    for number, start in enumerate(starts):
        file.write(pack(str(number)))
        _write_array(file, flat[start : start + step])
    if manifest is not None:
        file.write(pack(KEY) + pack(manifest()))


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    data = raw(array)
    facts = b"\x93" + pack(list(array.shape)) + pack(array.dtype.name) + header("bytes", len(data))
    file.write(header("extension", len(facts) + len(data)) + struct.pack(">b", _ARRAY) + facts)
    file.write(data)
