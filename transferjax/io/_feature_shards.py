"""Shards of cached rows: a directory of ArrayRecord files with an index each, added to by several processes.

::

    cache.json           the fingerprint of what the rows were computed by
    part-00000-00003/    shard 3 of process 0, whole or not there
        rows.array_record    one record per row
        index.json           ids, a digest per row, the arrays of a row, the fingerprint; with a digest over itself
"""

from __future__ import annotations

import base64
import collections
import hashlib
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from transferjax._errors import CheckpointError, describe, listing
from transferjax.io._beside import TEMPORARY, folder_beside, write_bytes, writing
from transferjax.io._manifest import Manifest, dtype_of, encode

HEADER, ROWS, INDEX = "cache.json", "rows.array_record", "index.json"
CACHE, SHARD = "feature cache", "feature shard"
"""What the two kinds of JSON files say of themselves."""
GROUP = 1 << 14
"""Bytes of rows that ArrayRecord keeps together: small rows would cost more bytes than they have one by one."""
OPEN = 64
"""Readers, and so file handles, that stay open."""
_PART = re.compile(r"part-(\d{5})-(\d{5,})")

Layout = Mapping[str, jax.ShapeDtypeStruct]
"""The arrays of one row by name, sorted; a row's bytes are theirs, one after another."""


class Shards:
    """The rows of one directory by example id; what other processes have finished is found by :meth:`refresh`.

    Attributes:
      path: the directory.
      fingerprint: of every row.
      layout: the arrays of a row; empty while there is none.
      ids: int64 ``[N]``, sorted, of the rows that are there.
      repeated: how many rows are of an id that an earlier shard has; the first one is used.
    """

    def __init__(self, path: pathlib.Path, fingerprint: str):
        self.path, self.fingerprint = path, fingerprint
        self.layout: Layout = {}
        self.ids, self.repeated = np.empty(0, np.int64), 0
        self._shards: dict[str, _Shard] = {}
        self._numbers = np.empty((0, 2), np.int64)  # which shard, and which row of it
        self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._changed: int | None = None
        self._cleaned = False
        _open_folder(path, fingerprint)
        self.refresh()

    @property
    def count(self) -> int:
        """How many shards there are."""
        return len(self._shards)

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.file_bytes for shard in self._shards.values())

    def refresh(self) -> bool:
        """Looks for shards that were finished since; returns whether there are any.

        Raises:
          CheckpointError: a new shard is damaged, or of another base.
        """
        try:
            changed = os.stat(self.path).st_mtime_ns
            if changed == self._changed:
                return False
            names = sorted(name for name in os.listdir(self.path) if _PART.fullmatch(name))
        except OSError as error:
            raise CheckpointError(f"'{self.path}' cannot be read: {error.strerror or error}.") from None
        new = [name for name in names if name not in self._shards]
        self._add(new)
        self._changed = changed
        return bool(new)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The place of each id in ``ids``, or -1."""
        known = self.ids  # another thread may ask while a shard is added
        if not known.size:
            return np.full(ids.shape, -1)
        places = np.minimum(np.searchsorted(known, ids), known.size - 1)
        return np.where(known[places] == ids, places, -1)

    def read(self, places: np.ndarray) -> list[bytes]:
        """The rows at some places (from :meth:`find`), each compared with its digest.

        Raises:
          CheckpointError: a file is missing, truncated or damaged.
        """
        out: list[bytes] = [b""] * len(places)
        wanted: dict[int, list[int]] = {}
        for at, place in enumerate(places):
            wanted.setdefault(int(self._numbers[place, 0]), []).append(at)
        shards = list(self._shards.values())
        for number, positions in wanted.items():
            rows = [int(self._numbers[places[at], 1]) for at in positions]
            for at, row in zip(positions, self._read(shards[number], rows), strict=True):
                out[at] = row
        return out

    def write(self, rows: Mapping[int, bytes], layout: Layout) -> None:
        """Adds a shard of these rows by id: all of them, or none.

        Raises:
          CheckpointError: the system refuses (read-only, disk full); or another process has written other arrays.
        """
        process = jax.process_index()
        if not self._cleaned:
            for left in self.path.glob(f"{TEMPORARY}part-{process:05d}-*"):
                shutil.rmtree(left, ignore_errors=True)
            self._cleaned = True
        number = 0
        while os.path.lexists(self.path / (name := f"part-{process:05d}-{number:05d}")):
            number += 1
        with folder_beside(self.path / name) as folder:
            _write_shard(folder, rows, layout, self.fingerprint)
        self._add([name])

    def _add(self, names: Sequence[str]) -> None:
        ids, numbers = [self.ids], [self._numbers]
        for name in names:
            shard = _Shard(self.path / name, self.fingerprint)
            if self.layout and shard.layout != self.layout:
                raise CheckpointError(
                    f"'{shard.path}' holds other arrays than the shards before it: "
                    f"{difference(shard.layout, self.layout)}. Delete '{self.path}', or give another folder."
                )
            self.layout = shard.layout
            rows = np.arange(shard.ids.size)
            ids.append(shard.ids)
            numbers.append(np.stack([np.full_like(rows, len(self._shards)), rows], 1))
            self._shards[name] = shard
        self.ids, first = np.unique(np.concatenate(ids), return_index=True)
        self._numbers = np.concatenate(numbers)[first]
        self.repeated += sum(part.size for part in ids) - first.size

    def _read(self, shard: _Shard, rows: Sequence[int]) -> list[bytes]:
        try:
            found = self._reader(shard).read(rows)
        except RuntimeError as error:
            raise CheckpointError(f"'{shard.path / ROWS}' is damaged: {_first_line(error)} {shard.advice}") from None
        for row, data in zip(rows, found, strict=True):
            if _digest(int(shard.ids[row]), data) != shard.digests[row].tobytes():
                raise CheckpointError(
                    f"'{shard.path / ROWS}' is damaged: the row of example {shard.ids[row]} does not match its digest. "
                    f"{shard.advice}"
                )
        return found

    def _reader(self, shard: _Shard) -> Any:
        name = shard.path.name
        if name not in self._readers:
            shard.check_size()
            if len(self._readers) >= OPEN:
                self._readers.popitem(last=False)[1].close()
            options = "readahead_buffer_size:0,max_parallelism:0"
            self._readers[name] = _array_record().ArrayRecordReader(str(shard.path / ROWS), options)
        self._readers.move_to_end(name)
        return self._readers[name]


class _Shard:
    """The index of one shard."""

    def __init__(self, path: pathlib.Path, fingerprint: str):
        self.path = path
        self.advice = f"Delete '{path}': its rows are then computed again."
        where = path / INDEX
        facts, size = _read_facts(where, SHARD, fingerprint, self.advice)
        arrays = {name: (tuple(shape), dtype_of(dtype, f"'{where}'")) for name, dtype, shape in facts["arrays"]}
        self.layout: Layout = {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}
        self.ids = np.frombuffer(zlib.decompress(base64.b64decode(facts["ids"])), "<i8").astype(np.int64)
        self.digests = np.frombuffer(base64.b64decode(facts["digests"]), np.uint8).reshape(self.ids.size, -1)
        self._rows_bytes: int = facts["bytes"]
        self.file_bytes = size + self._rows_bytes
        self.check_size()

    def check_size(self) -> None:
        """Raises ``CheckpointError`` unless the file of the rows has its length."""
        where = self.path / ROWS
        try:
            size = os.stat(where).st_size
        except OSError as error:
            raise CheckpointError(f"'{where}' cannot be read: {error.strerror or error}. {self.advice}") from None
        if size != self._rows_bytes:
            raise CheckpointError(
                f"'{where}' is truncated or damaged: expected {self._rows_bytes} bytes, found {size}. {self.advice}"
            )


def row_bytes(layout: Layout) -> int:
    """Bytes of one row.

    >>> row_bytes({"a": jax.ShapeDtypeStruct((3,), "int8"), "b": jax.ShapeDtypeStruct((), "float32")})
    7
    """
    return sum(array.size * array.dtype.itemsize for array in layout.values())


def pack(arrays: Mapping[str, np.ndarray], count: int) -> list[bytes]:
    """Arrays ``[count, ...]``, in the order of a layout, as the bytes of their rows."""
    columns = [np.frombuffer(array.tobytes(), np.uint8).reshape(count, -1) for array in arrays.values() if array.size]
    return [row.tobytes() for row in np.concatenate([np.empty((count, 0), np.uint8), *columns], axis=1)]


def unpack(rows: Sequence[bytes], layout: Layout) -> dict[str, np.ndarray]:
    """The inverse of :func:`pack`, as new arrays.

    >>> import numpy as np
    >>> rows = pack({"a": np.arange(2, dtype=np.int8), "b": np.ones((2, 3), np.int16)}, 2)
    >>> rows[1]
    b'\\x01\\x01\\x00\\x01\\x00\\x01\\x00'
    >>> layout = {"a": jax.ShapeDtypeStruct((), "int8"), "b": jax.ShapeDtypeStruct((3,), "int16")}
    >>> unpack(rows, layout)["a"].tolist()
    [0, 1]
    """
    table = np.frombuffer(bytearray().join(rows), np.uint8).reshape(len(rows), row_bytes(layout))
    out, start = {}, 0
    for name, array in layout.items():
        stop = start + array.size * array.dtype.itemsize
        column = np.ascontiguousarray(table[:, start:stop])
        out[name] = column.reshape(-1).view(array.dtype).reshape(len(rows), *array.shape)
        start = stop
    return out


def difference(new: Layout, old: Layout) -> str:
    """The arrays that differ, for an error."""
    names = [name for name in sorted({*new, *old}) if new.get(name) != old.get(name)]
    one = lambda layout, name: describe(layout[name]) if name in layout else "nothing"
    return listing([f"'{name}' is {one(new, name)}, stored is {one(old, name)}" for name in names], 3)


def _open_folder(path: pathlib.Path, fingerprint: str) -> None:
    """Makes the directory and its header, or compares the header with the fingerprint."""
    where = path / HEADER
    try:
        found = [name for name in os.listdir(path) if not name.startswith(TEMPORARY)] if path.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    if HEADER in found:
        _read_facts(where, CACHE, fingerprint, "Give another folder.")
    elif found or (os.path.lexists(path) and not path.is_dir()):
        what = f"holds {listing(sorted(found), 3)}" if found else "is a file"
        raise CheckpointError(f"'{path}' is no feature cache: it {what}. Give a new or empty folder.")
    else:
        write_bytes(where, encode({}, {"kind": CACHE, "fingerprint": fingerprint}).encode())


def _read_facts(where: pathlib.Path, kind: str, fingerprint: str, advice: str) -> tuple[Any, int]:
    """What a header or an index says, after its digest and fingerprint were compared; and its bytes."""
    try:
        data = where.read_bytes()
    except OSError as error:
        raise CheckpointError(f"'{where}' cannot be read: {error.strerror or error}. {advice}") from None
    facts = Manifest(data, f"'{where}'").metadata
    if facts.get("kind") != kind:
        raise CheckpointError(f"'{where}' belongs to no {kind}. {advice}")
    stored, given = _parts(facts["fingerprint"]), _parts(fingerprint)
    if facts["fingerprint"] != fingerprint:
        names = [name for name in dict.fromkeys([*given, *stored]) if stored.get(name) != given.get(name)]
        one = lambda parts, name: f"'{parts[name][:16]}'" if name in parts else "none"
        other = [f"{name} (stored {one(stored, name)}, now {one(given, name)})" for name in names]
        raise CheckpointError(
            f"'{where}' is of rows that were computed with other {listing(other or ['fingerprint'])}. "
            f"Give another folder, or delete '{where.parent}'."
        )
    return facts, len(data)


def _parts(fingerprint: str) -> dict[str, str]:
    """``{name: digest}`` of a fingerprint ``"name:digest name:digest"``; any other text is one part."""
    pairs = [part.split(":", 1) for part in fingerprint.split(" ")]
    if all(len(pair) == 2 and all(pair) for pair in pairs):
        return {name: digest for name, digest in pairs}
    return {"fingerprint": fingerprint}


def _write_shard(folder: pathlib.Path, rows: Mapping[int, bytes], layout: Layout, fingerprint: str) -> None:
    group = max(1, GROUP // max(1, row_bytes(layout)))
    file = folder / ROWS
    with writing(folder):
        try:
            writer = _array_record().ArrayRecordWriter(str(file), f"group_size:{group},uncompressed")
            for row in rows.values():
                writer.write(row)
            writer.close()
        except RuntimeError as error:  # what ArrayRecord makes of every refusal of the system
            raise OSError(_first_line(error)) from None
        ids = np.fromiter(rows, "<i8", len(rows))
        facts = {
            "kind": SHARD,
            "fingerprint": fingerprint,
            "arrays": [[name, array.dtype.name, list(array.shape)] for name, array in layout.items()],
            "bytes": os.stat(file).st_size,
            "ids": base64.b64encode(zlib.compress(ids.tobytes())).decode(),
            "digests": base64.b64encode(b"".join(_digest(id_, row) for id_, row in rows.items())).decode(),
        }
        with open(folder / INDEX, "wb") as index:
            index.write(encode({}, facts).encode())


def _digest(id_: int, row: bytes) -> bytes:
    return hashlib.blake2b(row, digest_size=8, salt=id_.to_bytes(8, "little", signed=True)).digest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".") + "."


def _array_record() -> Any:
    try:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        raise CheckpointError(
            "a feature cache on disk needs the package array_record, which is not installed. Install it with "
            "`pip install array-record`, or keep the cache in memory: FeatureCache(fingerprint=...)."
        ) from None
    return array_record_module
