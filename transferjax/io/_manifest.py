"""What ``save`` writes beside the arrays: shapes, dtypes, digests of every block, and the caller's metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from transferjax._errors import CheckpointError
from transferjax.io._boxes import Corner, block_count, block_shape, blocks, raw
from transferjax.io._reader import Entry, is_count
from transferjax.io._safetensors import parse_json

VERSION = 1
BLOCK = 1 << 24
"""Bytes per digest at most (16 MiB)."""


def leaf_facts(array: np.ndarray, kind: str | None) -> dict[str, Any]:
    """The manifest's entry of one leaf.

    Args:
      array: C-contiguous.
      kind: how a leaf that was no array comes back: ``"int"``, ``"float"``, ``"bool"``, ``"complex"`` or
        ``"key:<implementation>"``.
    """
    block = block_shape(array.shape, array.dtype.itemsize, BLOCK)
    digests = [digest(array[_slices(a, b)]) for _, a, b in blocks(array.shape, block, (0,) * array.ndim, array.shape)]
    return facts_of(array, digests, kind)


def facts_of(leaf: Any, digests: list[str], kind: str | None) -> dict[str, Any]:
    """The manifest's entry of a leaf whose blocks have these digests; anything with shape and dtype."""
    facts: dict[str, Any] = {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "sha256": digests}
    return {**facts, "kind": kind} if kind else facts


def encode(leaves: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """The manifest as text, with a digest over itself."""
    body = {"version": VERSION, "block": BLOCK, "leaves": dict(leaves), "metadata": dict(metadata)}
    return json.dumps({**body, "sha256": _text_digest(body)}, separators=(",", ":"))


def identity(leaves: Mapping[str, Any]) -> str:
    """The fingerprint of a tree, from the facts of its leaves by path; their order does not matter."""
    return _text_digest(dict(leaves))


class Manifest:
    """A checked manifest.

    Attributes:
      leaves: the facts of each leaf by path.
      metadata: the caller's metadata.
    """

    def __init__(self, data: str | bytes, where: str):
        self._where = where
        body = parse_json(data.encode() if isinstance(data, str) else data, f"the manifest of {where}")
        digest = body.pop("sha256", None) if isinstance(body, dict) else None
        if digest is None or digest != _text_digest(body):
            raise CheckpointError(f"the manifest of {where} does not match its own digest. The file is damaged.")
        if body.get("version") != VERSION:
            raise CheckpointError(
                f"{where} was written by a newer version (manifest {body.get('version')}); this one reads {VERSION}."
            )
        self.leaves: dict[str, Any] = body["leaves"]
        self.metadata: dict[str, Any] = body["metadata"]
        self._limit: int = body["block"]
        if not is_count(self._limit) or self._limit < 1:
            raise CheckpointError(f"the manifest of {where} has blocks of {self._limit} bytes. The file is damaged.")

    def fingerprint(self) -> str:
        """The identity of names, shapes, dtypes and contents; the same for the same tree in every format."""
        return identity(self.leaves)

    def check(self, entries: Mapping[str, Entry]) -> None:
        """Raises ``CheckpointError`` unless exactly these leaves, shapes and storable dtypes are in the file."""
        different = sorted(set(entries) ^ set(self.leaves))
        if different:
            raise CheckpointError(
                f"{self._where} is damaged: '{different[0]}' is only in one of the file and its manifest."
            )
        for path, entry in entries.items():
            facts = self.leaves[path]
            found = (list(entry.shape), entry.dtype.itemsize)
            expected = (facts["shape"], dtype_of(facts["dtype"], self._where).itemsize)
            block = block_shape(entry.shape, entry.dtype.itemsize, self._limit)
            if found != expected or len(facts["sha256"]) != block_count(entry.shape, block):
                raise CheckpointError(
                    f"'{path}' in {self._where} is damaged: the manifest says {tuple(expected[0])} {facts['dtype']}, "
                    f"the file {entry.shape} {entry.dtype}."
                )

    def read(self, path: str, entry: Entry, low: Corner, high: Corner, out: np.ndarray | None = None) -> np.ndarray:
        """The box of a leaf; every block that it touches is read whole and verified.

        Args:
          out: a C-contiguous array of the box's shape and the leaf's dtype that is filled; ``None``: a new one.
        """
        facts = self.leaves[path]
        dtype = dtype_of(facts["dtype"], self._where)
        block = block_shape(entry.shape, dtype.itemsize, self._limit)
        out = np.empty(tuple(b - a for a, b in zip(low, high)), dtype) if out is None else out
        for number, first, last in blocks(entry.shape, block, low, high):
            part = entry.box(first, last).view(dtype)
            if digest(part) != facts["sha256"][number]:
                raise CheckpointError(
                    f"'{path}' in {self._where} is damaged: block {number} of {len(facts['sha256'])} does not match "
                    "its digest."
                )
            from_, to = tuple(map(max, first, low)), tuple(map(min, last, high))
            out[_slices(from_, to, low)] = part[_slices(from_, to, first)]
        return out


def dtype_of(name: str, where: str) -> np.dtype:
    """A dtype by name, those of ``ml_dtypes`` included."""
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise CheckpointError(f"{where} names the dtype '{name[:40]}', which is not known here.") from None


def _slices(low: Corner, high: Corner, origin: Corner | None = None) -> tuple[slice, ...]:
    origin = origin or (0,) * len(low)
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin))


def digest(array: np.ndarray) -> str:
    """The sha256 of an array's bytes in C order, as hexadecimal digits."""
    return hashlib.sha256(raw(np.ascontiguousarray(array))).hexdigest()


def _text_digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
