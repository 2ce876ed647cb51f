"""FeatureCache: arrays computed once per example, kept by example id, never served for another base."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from transferjax._errors import CheckpointError, DataError, describe, is_whole, listing
from transferjax._report import Report
from transferjax.io._feature_shards import Layout, Shards, difference, pack, row_bytes, unpack
from transferjax.io._host import kind_of, to_host
from transferjax.io._replace import absolute
from transferjax.io._state import fingerprint as tree_fingerprint

SHARD_BYTES = 1 << 26
"""Bytes of rows that are written at once: what a kill can cost at most, and what waits in memory."""
OVERHEAD = 150
"""Bytes that a row in memory costs beside its own."""


class FeatureCache:
    """Arrays computed once per example, kept by example id: in memory while they fit, and in a folder if one is given.

    A row is what one example has of each array. Rows are written in shards of 64 MiB, each whole or not at all, so a
    run that was killed goes on from the finished ones. Every process writes its own shards and reads those of all; a
    row that another process has not written yet counts as missing, and of two rows of one id the first shard's is
    used. A row read from disk is compared with its digest.

    Args:
      path: of a folder: new, empty, or written by a cache of the same fingerprint. ``None`` keeps rows in memory only.
      fingerprint: says what rows are computed by: text, best from :meth:`fingerprint_of`. A folder of another
        fingerprint raises.
      memory_bytes: of rows in memory, 150 bytes more for each row counted too. With a path the first rows that fit
        stay there, and the others are read from disk each time; the shard that is being filled comes on top.

    Raises:
      CheckpointError: the folder is of another fingerprint (the error names the part that differs), damaged, something
        else, or cannot be written; or an argument does not fit.

    >>> import numpy as np
    >>> cache = FeatureCache(fingerprint="weights:ab12")
    >>> cache.add([7, 9], {"pooled": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)})
    >>> cache.missing([9, 8, 7]).tolist(), cache.read([9, 7])["pooled"].tolist()
    ([8], [[3.0, 4.0], [1.0, 2.0]])
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, fingerprint: str, memory_bytes: int = 1 << 30
    ) -> None:
        if not isinstance(fingerprint, str) or not fingerprint.strip():
            raise CheckpointError(
                f"FeatureCache() expects a fingerprint of text, got {fingerprint!r:.60}: "
                "write FeatureCache.fingerprint_of(frozen, preprocess, program)."
            )
        if not is_whole(memory_bytes, 0):
            raise CheckpointError(f"memory_bytes is {memory_bytes!r}; expected a whole number of bytes, 0 or more.")
        self.fingerprint = fingerprint
        self.options: dict[str, Any] = {}  # of what computes the rows
        self.path = None if path is None else pathlib.Path(absolute(path, "FeatureCache", "FeatureCache(path, ...)"))
        self._budget = int(memory_bytes)
        self._shards = None if self.path is None else Shards(self.path, fingerprint)
        self._layout: Layout = {} if self._shards is None else self._shards.layout
        self._memory: dict[int, bytes] = {}
        self._waiting: dict[int, bytes] = {}

    @staticmethod
    def fingerprint_of(frozen: Any, preprocess: Any, program: str) -> str:
        """A fingerprint in three parts, so that an error can say which one differs.

        Args:
          frozen: pytree of every array that a row depends on beside the example: frozen weights, statistics, the
            constants of the program.
          preprocess: text, or a value whose ``repr`` says everything: a ``Preprocess``, ``None``.
          program: the jaxpr as text; addresses in it do not count.

        Returns:
          ``"weights:<sha256> preprocessing:<sha256> program:<sha256>"``.

        Raises:
          CheckpointError: ``frozen`` has no leaf, ``preprocess`` prints an address, or ``program`` is no text.

        >>> import numpy as np
        >>> made = FeatureCache.fingerprint_of({"w": np.ones(2)}, None, "{ lambda ; a:f32[]. let in (a,) }")
        >>> [part.split(":")[0] for part in made.split()]
        ['weights', 'preprocessing', 'program']
        """
        text = preprocess if isinstance(preprocess, str) else repr(preprocess)
        if ADDRESS.search(text):
            raise CheckpointError(
                f"the preprocessing prints as {text:.80}: an address says nothing about what it does. "
                "Give text that names it and its version."
            )
        if not isinstance(program, str):
            raise CheckpointError(f"the program is {type(program).__name__}; expected its jaxpr as text: str(jaxpr).")
        sha256 = lambda text: hashlib.sha256(text.encode()).hexdigest()
        parts = (tree_fingerprint(frozen), sha256(text), sha256(ADDRESS.sub("", program)))
        return "weights:{} preprocessing:{} program:{}".format(*parts)

    def check(self, frozen: Any, program: str) -> None:
        """Raises unless the rows were computed by this program from these weights.

        Args:
          frozen: as for :meth:`fingerprint_of`.
          program: as for :meth:`fingerprint_of`.

        Raises:
          CheckpointError: the weights or the program differ.
        """
        wanted, own = (dict(part.split(":", 1) for part in text.split()) for text in (
            self.fingerprint_of(frozen, None, program), self.fingerprint if ":" in self.fingerprint else ""
        ))  # fmt: skip
        other = [name for name in ("weights", "program") if own.get(name) != wanted[name]]
        if other:
            raise CheckpointError(
                f"the rows of {self!r} were computed by another run: its {' and '.join(other)} differ. Make one for "
                "this run: transferjax.io.residual_cache(hoisted, state, frozen)."
            )

    def __len__(self) -> int:
        disk = 0 if self._shards is None else self._shards.ids.size
        return disk + len(self._waiting) + (len(self._memory) if self._shards is None else 0)

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else f"at '{self.path}'"
        return f"FeatureCache({len(self):,} examples of {row_bytes(self._layout):,} bytes {where})"

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype by name of one row, without the batch axis; empty while nothing is stored."""
        return dict(self._layout)

    @property
    def bytes(self) -> int:
        """Bytes of the arrays of all rows, wherever they are."""
        return len(self) * row_bytes(self._layout)

    def missing(self, ids: Any) -> np.ndarray:
        """Those of ``ids`` that are not stored, each once, in their order.

        Args:
          ids: integers ``[B]``.

        Returns:
          int64 ``[M]``.
        """
        ids = _integers(ids)
        absent = self._absent(ids)
        if absent.size and self._shards is not None and self._shards.refresh():
            self._refreshed()
            absent = self._absent(ids)
        return absent

    def holds(self, ids: Any) -> bool:
        """Whether every one of ``ids`` is stored; shards that other processes have just written do not count.

        Args:
          ids: integers ``[B]``.
        """
        return not self._absent(_integers(ids)).size

    def add(self, ids: Any, arrays: Mapping[str, Any]) -> None:
        """Stores one row for each id: all of them, or none.

        Args:
          ids: integers ``[B]``; none of them stored yet, none twice.
          arrays: ``[B, ...]`` by name, of numbers, from numpy or jax; the names, shapes and dtypes of the first call
            are those of all.

        Raises:
          DataError: an id is stored already, arrays do not fit the ids or the rows before, or the memory does not
            suffice and there is no folder.
          CheckpointError: a shard was full and could not be written; the rows stay in memory, so that :meth:`flush`
            can be tried again.
        """
        ids = _integers(ids)
        columns = _columns(arrays, ids.size)
        layout = {name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in columns.items()}
        if self._layout and layout != self._layout:
            raise DataError(f"the arrays of a row differ from those stored: {difference(layout, self._layout)}.")
        absent = self._absent(ids)
        if absent.size < ids.size:
            twice = _first_other(ids, absent)
            raise DataError(
                f"example {twice} is stored already, or stands in the ids twice. Add the rows of missing(ids) only."
            )
        if self._shards is None:
            self._check_memory(ids.size, row_bytes(layout))
        self._layout = layout
        target = self._memory if self._shards is None else self._waiting
        target.update(zip(ids.tolist(), pack(columns, ids.size), strict=True))
        if len(self._waiting) * row_bytes(layout) >= SHARD_BYTES:
            self.flush()

    def read(self, ids: Any) -> dict[str, np.ndarray]:
        """The stored rows of some examples, bit for bit, in new arrays.

        Args:
          ids: integers ``[B]``, in any order; an id may stand there several times.

        Returns:
          ``[B, ...]`` by name.

        Raises:
          DataError: an id is not stored.
          CheckpointError: the row's file is damaged.
        """
        ids = _integers(ids)
        absent = self.missing(ids)
        if absent.size:
            raise DataError(
                f"{absent.size} of {ids.size} examples are not stored: ids {listing([str(i) for i in absent])}. "
                "Add the rows of missing(ids) first."
            )
        rows = [self._memory.get(id_, self._waiting.get(id_)) for id_ in ids.tolist()]
        away = [at for at, row in enumerate(rows) if row is None]
        if away and self._shards is not None:
            for at, row in zip(away, self._shards.read(self._shards.find(ids[away])), strict=True):
                rows[at] = row
                self._keep(int(ids[at]), row)
        return unpack([row for row in rows if row is not None], self._layout)

    def flush(self) -> None:
        """Writes the rows that wait for their shard to be full; without a folder there is nothing to do.

        Raises:
          CheckpointError: the system refuses (read-only, disk full). The rows stay in memory.
        """
        if self._shards is None or not self._waiting:
            return
        if self._shards.refresh():
            self._refreshed()
        if self._waiting:
            self._shards.write(self._waiting, self._layout)
        for id_, row in self._waiting.items():
            self._keep(id_, row)
        self._waiting = {}

    def cached(
        self, batches: Iterable[Mapping[str, Any]], compute: Callable[[Any], Mapping[str, Any]]
    ) -> Generator[dict[str, Any], None, None]:
        """The rows of each batch; what is missing is computed and stored on the way, so later epochs only read.

        Args:
          batches: dicts with ``id`` (integers ``[B]``), of this process only. An id may stand in a batch twice, as in
            one that is filled up.
          compute: ``batch -> {name: [B, ...]}``, called with the whole batch when a row of it is missing. It must not
            wait for other processes, which may miss nothing.

        Yields:
          ``{name: [B, ...]}`` from the store, and ``id`` and ``weight`` as the batch has them. At the end of the
          batches, or when the iterator is closed, the last shard is written.

        Raises:
          DataError: ``compute`` is no function, a batch has no ``id``, or what ``compute`` returns does not fit.

        >>> import numpy as np
        >>> cache, batch = FeatureCache(fingerprint="program:v1"), {"id": np.array([4, 5]), "inputs": np.ones((2, 3))}
        >>> calls = []
        >>> compute = lambda batch: calls.append(1) or {"total": batch["inputs"].sum(axis=1)}
        >>> [out["total"].tolist() for out in cache.cached([batch, batch], compute)], len(calls)
        ([[3.0, 3.0], [3.0, 3.0]], 1)
        """
        if not callable(compute):
            raise DataError(f"cached() expects a function of a batch second, got {type(compute).__name__}.")
        return self._cached(batches, compute)

    def report(self) -> Report:
        """One row per array of an example; the totals are in the metadata."""
        rows = [
            (name, str(array.shape), array.dtype.name, array.size * array.dtype.itemsize)
            for name, array in self._layout.items()
        ]
        facts: dict[str, Any] = {
            "examples": len(self),
            "bytes": self.bytes,
            "examples in memory": len(self._memory) + len(self._waiting),
        }
        if self._shards is not None:
            facts |= {
                "path": str(self.path),
                "shards": self._shards.count,
                "bytes on disk": self._shards.file_bytes,
                "rows stored twice": self._shards.repeated,
            }
        facts["fingerprint"] = self.fingerprint
        return Report("Feature cache", ("array", "shape", "dtype", "bytes per example"), tuple(rows), facts)

    def _cached(self, batches: Any, compute: Any) -> Generator[dict[str, Any], None, None]:
        try:
            for batch in batches:
                if not isinstance(batch, Mapping) or "id" not in batch:
                    raise DataError(f"a batch is {_kind(batch)}; expected a dict with 'id', one integer per example.")
                ids = _integers(batch["id"])
                absent = self.missing(ids)
                if absent.size:
                    self._fill(ids, absent, compute(batch))
                yield {**self.read(ids), **{name: batch[name] for name in ("id", "weight") if name in batch}}
        finally:
            self.flush()

    def _fill(self, ids: np.ndarray, absent: np.ndarray, arrays: Any) -> None:
        if not isinstance(arrays, Mapping) or {"id", "weight"} & set(arrays):
            raise DataError(
                f"compute() returned {_kind(arrays)}; expected a dict of arrays without 'id' and 'weight', which come "
                "from the batch."
            )
        first = {id_: at for at, id_ in reversed(list(enumerate(ids.tolist())))}
        rows = [first[id_] for id_ in absent.tolist()]
        self.add(absent, {name: array[rows] for name, array in _columns(arrays, ids.size).items()})

    def _absent(self, ids: np.ndarray) -> np.ndarray:
        unique = np.array(list(dict.fromkeys(ids.tolist())), np.int64)
        here = np.array([id_ in self._memory or id_ in self._waiting for id_ in unique.tolist()], bool)
        if self._shards is not None:
            here |= self._shards.find(unique) >= 0
        return unique[~here]

    def _refreshed(self) -> None:
        """Other processes have written shards: a row that waits here and is there now is not written again."""
        assert self._shards is not None
        if self._layout and self._shards.layout != self._layout:
            raise CheckpointError(
                f"another process wrote other arrays into '{self.path}': "
                f"{difference(self._shards.layout, self._layout)}. Delete it, or give another folder."
            )
        self._layout = self._shards.layout
        waiting = np.fromiter(self._waiting, np.int64, len(self._waiting))
        for id_ in waiting[self._shards.find(waiting) >= 0].tolist():
            del self._waiting[id_]

    def _keep(self, id_: int, row: bytes) -> None:
        if (len(self._memory) + 1) * (len(row) + OVERHEAD) <= self._budget:
            self._memory[id_] = row

    def _check_memory(self, count: int, size: int) -> None:
        needed = (len(self) + count) * (size + OVERHEAD)
        if needed > self._budget:
            raise DataError(
                f"{len(self) + count:,} examples need {needed:,} bytes of memory, and memory_bytes is "
                f"{self._budget:,}. Give FeatureCache a path, or more memory_bytes."
            )


ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def _integers(ids: Any) -> np.ndarray:
    """Ids as int64 ``[B]``."""
    try:
        array = to_host("id", ids) if isinstance(ids, jax.Array) else np.asarray(ids)
    except ValueError as error:
        raise DataError(f"ids are no integers of shape [B], one per example: {error}") from None
    if array.shape == (0,):
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"ids are {describe(array)}; expected integers of shape [B], one per example.")
    if array.dtype == np.uint64 and array.max() >= 1 << 63:
        raise DataError(f"an id is {array.max()}; expected ids below 2**63.")
    return array.astype(np.int64)


def _host(name: Any, array: Any, count: int) -> np.ndarray:
    if not isinstance(name, str):
        raise DataError(f"an array has the name {name!r:.60}; expected text.")
    if isinstance(array, list | tuple) or kind_of(array) is not None:
        raise DataError(f"'{name}' is {_kind(array)}; expected an array of numbers of shape [B, ...].")
    found = to_host(name, array)
    if found.ndim < 1 or found.shape[0] != count:
        raise DataError(f"'{name}' is {describe(found)}; expected {count} rows, one per id.")
    return found


def _columns(arrays: Any, count: int) -> dict[str, np.ndarray]:
    """The arrays on the host, sorted by name, each with ``count`` rows."""
    if not isinstance(arrays, Mapping) or not arrays:
        raise DataError(f"the arrays to store are {_kind(arrays)}; expected a dict of name: array [B, ...].")
    return {name: _host(name, arrays[name], count) for name in sorted(arrays, key=str)}


def _first_other(ids: np.ndarray, absent: np.ndarray) -> int:
    """The first id that is not among the absent ones, or is there for the second time."""
    left = set(absent.tolist())
    for id_ in ids.tolist():
        if id_ not in left:
            return id_
        left.remove(id_)
    return int(ids[0])


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {listing([str(name) for name in value]) or 'nothing'}"
    return describe(value)
