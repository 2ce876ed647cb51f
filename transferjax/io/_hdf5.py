"""HDF5 files without the HDF5 library, which can hang on damaged ones: the structures that h5py writes by default.

Keras and TensorFlow write nothing else. Newer structures (``libver="latest"``, ordered groups) are refused by name.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from transferjax._errors import CheckpointError
from transferjax.io._bytes import Bytes, Paged, read
from transferjax.io._hdf5_chunks import chunked
from transferjax.io._hdf5_types import UNDEFINED, UNNAMED, attribute, dataspace, element
from transferjax.io._reader import Entry, strided

MAGIC = b"\x89HDF\r\n\x1a\n"
_MOST, _DEEPEST, _LONGEST_HEADER, _LONGEST_HEAP = 1_000_000, 64, 1 << 24, 1 << 26
_NEWER = "Write it again with h5py.File(path, 'w', libver='earliest') and without track_order."


@dataclasses.dataclass(frozen=True)
class Tree:
    """What an HDF5 file holds.

    Attributes:
      entries: the datasets by path (``"layers/conv2d/vars/0"``).
      attributes: ``{path of a group: {name: value}}``; a value is a text, a list of texts, or an array.
    """

    entries: Mapping[str, Entry]
    attributes: Mapping[str, Mapping[str, Any]]


def read_tree(source: Bytes, head: Bytes | None = None) -> Tree:
    """Looks at every group and dataset; no array is read.

    Args:
      source: what the arrays are read from later.
      head: what the structure is read from, if not ``source``.

    Raises:
      CheckpointError: damage, links, groups in a circle, datasets that hold no numbers or that are stored elsewhere,
        and structures that h5py does not write by default.
    """
    file = _File(Paged(head or source))
    entries: dict[str, Entry] = {}
    attributes: dict[str, Mapping[str, Any]] = {}
    spans: list[tuple[int, int, str, int]] = []  # an array's bytes, its name, and which object it is
    waiting, met = [("", file.root())], set()
    while waiting:
        path, address = waiting.pop()
        messages = list(file.messages(path, address))
        table = [data for kind, data in messages if kind == 0x11]
        if not table:
            entries[path], span = _dataset(file, source, path, messages)
            spans += [(*span, path, address)] if span[1] > span[0] else []
            continue
        if address in met or path.count("/") > _DEEPEST:
            raise file.damaged(f"the group '{path}' is met twice, or lies too deep. Expected a tree of groups")
        met.add(address)
        attributes[path] = dict(file.attributes(path, messages))
        found = [(f"{path}/{name}" if path else name, at) for name, at in file.links(path, table[0])]
        waiting += reversed(found)
        if len(waiting) + len(entries) + len(met) > _MOST:
            raise file.damaged(f"it holds more than {_MOST} groups and datasets")
    _check_spans(file, sorted([*spans, *((*span, "the structure of the file", -1) for span in file.spans)]))
    return Tree(entries, attributes)


def _check_spans(file: _File, spans: list[tuple[int, int, str, int]]) -> None:
    for (_, end, one, at), (start, _, two, where) in itertools.pairwise(spans):
        if start < end and at != where:  # two names of one dataset are no damage
            raise file.damaged(f"'{one}' overlaps '{two}'")


def _dataset(file: _File, source: Bytes, path: str, messages: list[tuple[int, bytes]]) -> tuple[Entry, tuple[int, int]]:
    damaged = lambda why: file.damaged(f"'{path}': {why}")
    found: dict[int, bytes] = {}
    for kind, data in messages:
        if kind in (0x1, 0x3, 0x8, 0xB) and found.setdefault(kind, data) is not data:
            raise damaged("its header describes it twice")
    if 0x7 in dict(messages):
        raise damaged("it is stored in another file, which is not read. Expected the array itself")
    if not {0x1, 0x3, 0x8} <= set(found):
        raise damaged(f"it is neither a group nor a dataset that is known here. {_NEWER}")
    shape, dtype = dataspace(found[0x1], damaged), element(found[0x3], damaged)
    if dtype is not None and dtype.kind == "V":
        name = dict(file.attributes(path, messages)).get("dtype")
        named = UNNAMED.get(name) if isinstance(name, str) else None
        dtype = named if named is not None and named.itemsize == dtype.itemsize else None
    if dtype is None:
        raise damaged("it holds no numbers. Expected an array of numbers")
    layout, size = found[0x8], math.prod(shape) * dtype.itemsize
    if len(layout) < (4 if layout[1:2] == b"\0" else 18) or layout[0] != 3 or layout[1] > 2:
        raise damaged(f"its layout is not known here. {_NEWER}")
    if layout[1] == 2:
        return chunked(source, file.source, path, shape, dtype, layout, found.get(0xB), damaged), (0, 0)
    if 0xB in found:
        raise damaged("it is compressed, but not in chunks")
    if layout[1] == 0:
        return _Compact(shape, dtype, _compact(layout, size, damaged)), (0, 0)
    address, stored = struct.unpack_from("<QQ", layout, 2)
    if size and (address == UNDEFINED or stored != size):
        raise damaged(f"{shape} {dtype} takes {size} bytes, but {0 if address == UNDEFINED else stored} are stored")
    address = address if size else 0
    return strided(source, address, shape, dtype, None, path, source.size), (address, address + size)


@dataclasses.dataclass(frozen=True)
class _Compact:
    """An array that lies in its own header."""

    shape: tuple[int, ...]
    dtype: np.dtype
    data: bytes

    def box(self, low: tuple[int, ...], high: tuple[int, ...]) -> np.ndarray:
        whole = np.frombuffer(self.data, self.dtype).reshape(self.shape)
        return np.array(whole[tuple(slice(a, b) for a, b in zip(low, high))], order="C")


def _compact(layout: bytes, size: int, damaged: Any) -> bytes:
    (stored,) = struct.unpack_from("<H", layout, 2)
    if stored != size or len(layout) < 4 + size:
        raise damaged(f"it takes {size} bytes, but {stored} are stored")
    return layout[4 : 4 + size]


class _File:
    """The structures of one file by their addresses; whatever is read is bounded by the file's size."""

    def __init__(self, source: Bytes):
        self.source = source
        self._collections: dict[int, dict[int, bytes]] = {}
        self._nodes: set[int] = set()
        self.spans: set[tuple[int, int]] = set()

    def damaged(self, why: str) -> CheckpointError:
        why = why.removesuffix(".")
        return CheckpointError(f"{self.source.where} is damaged, or no HDF5 file as Keras writes it: {why}.")

    def _take(self, offset: int, count: int) -> bytes:
        """Bytes of the file's structure: no array may lie there."""
        out = bytes(read(self.source, offset, count))
        self.spans |= {(offset, offset + count)} if count else set()
        return out

    def root(self) -> int:
        """The address of the root group."""
        head = bytes(read(self.source, 0, 16))
        if head[8] not in (0, 1):
            raise self.damaged(f"it begins with version {head[8]}. Expected 0 or 1. {_NEWER}")
        if head[13:15] != b"\x08\x08" or head[9:13] != b"\0\0\0\0":
            raise self.damaged("its addresses do not have 8 bytes")
        start = 24 + 4 * head[8]
        base, _, end, _, _, root = struct.unpack("<6Q", read(self.source, start, 48))
        if base:
            raise self.damaged(f"it begins at byte {base}. Expected no user block")
        if end != self.source.size:
            raise self.damaged(f"it is truncated: it says that it has {end} bytes, but has {self.source.size}")
        return root

    def messages(self, path: str, address: int) -> Iterator[tuple[int, bytes]]:
        """``(kind, data)`` of each message of an object's header."""
        head = self._take(address, 16)
        if head[:4] == b"OHDR":
            raise self.damaged(f"'{path}' has a header of a newer kind. {_NEWER}")
        version, reserved, count, links, size, padding = struct.unpack("<BBHIII", head)
        if version != 1 or reserved or not links or padding or size > _LONGEST_HEADER:
            raise self.damaged(f"'{path}' has no header at byte {address}")
        blocks, met = [(address + 16, size)], set()
        while blocks:
            start, length = blocks.pop(0)
            if start in met or length > _LONGEST_HEADER:
                raise self.damaged(f"the header of '{path}' is continued in a circle")
            met.add(start)
            block, at = self._take(start, length), 0
            while at + 8 <= length and count:
                kind, long, flags = struct.unpack_from("<HHB", block, at)
                data = block[at + 8 : at + 8 + long]
                if len(data) != long or kind > 0x18 or (flags & 2 and kind in (0x1, 0x3, 0x8)):
                    raise self.damaged(f"the header of '{path}' holds a message that cannot be read")
                at, count = at + 8 + long, count - 1
                if kind == 0x10 and long >= 16:
                    blocks.append(struct.unpack_from("<QQ", data))
                elif kind in (0x2, 0x6, 0x15):
                    raise self.damaged(f"'{path}' has links or attributes of a newer kind. {_NEWER}")
                elif kind and not flags & 2:
                    yield kind, data
        if count:
            raise self.damaged(f"the header of '{path}' lacks {count} of its messages")

    def attributes(self, path: str, messages: list[tuple[int, bytes]]) -> Iterator[tuple[str, Any]]:
        """The attributes that hold texts or numbers."""
        damaged = lambda why: self.damaged(f"'{path}': {why}")
        for kind, data in messages:
            found = attribute(data, self._heap_object, damaged) if kind == 0xC else None
            if found is not None:
                yield found

    def links(self, path: str, table: bytes) -> Iterator[tuple[str, int]]:
        """``(name, address)`` of what a group holds, in the order of the names' bytes."""
        if len(table) < 16:
            raise self.damaged(f"the group '{path}' has no list of names")
        tree, heap = struct.unpack_from("<QQ", table)
        names = self._names(path, heap)
        before = b""
        for offset, address, kind in self._symbols(path, tree):
            name = names[offset : max(offset, names.find(b"\0", offset))]
            if kind > 1:
                raise self.damaged(f"'{path}/{name.decode('utf-8', 'replace')}' is a link, which is not followed")
            text = self._name(path, name)
            if name <= before:
                raise self.damaged(f"the names in '{path}' are not in order, or one comes twice")
            before = name
            yield text, address

    def _name(self, path: str, name: bytes) -> str:
        try:
            text = name.decode("utf-8")
        except UnicodeDecodeError:
            text = ""
        if text in ("", ".", "..") or any(c in "/\\" or c < " " for c in text):
            raise self.damaged(f"'{path}' holds {name[:60]!r}, which cannot be a name")
        return text

    def _names(self, path: str, address: int) -> bytes:
        magic, size, _, place = struct.unpack("<8sQQQ", self._take(address, 32))
        if magic != b"HEAP\0\0\0\0" or size > _LONGEST_HEAP:
            raise self.damaged(f"the names in '{path}' are not where they should be")
        return self._take(place, size)

    def _symbols(self, path: str, root: int) -> Iterator[tuple[int, int, int]]:
        """``(place of the name, address, kind)`` of each entry below a node, from left to right."""
        waiting = [(root, -1)]
        while waiting:
            address, level = waiting.pop()
            if address in self._nodes:
                raise self.damaged(f"the lists of names of '{path}' and another group are one")
            self._nodes.add(address)
            head = self._take(address, 8)
            if head[:4] == b"SNOD" and head[4:6] == b"\1\0" and level == 0:
                (count,) = struct.unpack_from("<H", head, 6)
                yield from struct.iter_unpack("<QQI20x", self._take(address + 8, 40 * count))
                continue
            magic, kind, depth, count = struct.unpack("<4sBBH", head)
            if magic != b"TREE" or kind or (level != -1 and depth != level - 1):
                raise self.damaged(f"the list of names of '{path}' cannot be read at byte {address}")
            rest = struct.unpack(f"<{2 * count + 1}Q", self._take(address + 24, 8 * (2 * count + 1)))
            waiting += [(child, depth) for child in reversed(rest[1::2])]

    def _heap_object(self, address: int, number: int) -> bytes:
        """The bytes of an object of a global heap."""
        if address not in self._collections:
            self._collections[address] = dict(self._collection(address))
        found = self._collections[address].get(number)
        if found is None:
            raise self.damaged(f"there is no text {number} at byte {address}")
        return found

    def _collection(self, address: int) -> Iterator[tuple[int, bytes]]:
        magic, size = struct.unpack("<8sQ", read(self.source, address, 16))
        if magic != b"GCOL\1\0\0\0" or not 16 <= size <= max(_LONGEST_HEAP, 16):
            raise self.damaged(f"there are no texts at byte {address}")
        data, at = self._take(address, size), 16
        while at + 16 <= size:
            number, _, long = struct.unpack_from("<HH4xQ", data, at)
            if not number:
                return
            if at + 16 + long > size:
                raise self.damaged(f"the texts at byte {address} are cut off")
            yield number, data[at + 16 : at + 16 + long]
            at += 16 + -(-long // 8) * 8
