"""Weights in several files, found through an index ``{"weight_map": {name: file}}``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

from transferjax._errors import CheckpointError, listing
from transferjax.io._bytes import FileBytes, read
from transferjax.io._reader import Entry, Reader
from transferjax.io._safetensors import KEY, parse_json

_LONGEST_INDEX = 1 << 28


def read_sharded(file: FileBytes, open_file: Callable[[str], Reader]) -> Reader:
    """Opens all shards of an index.

    Args:
      file: the index.
      open_file: opens one shard.

    Raises:
      CheckpointError: the index is damaged; a shard is missing, lies elsewhere, or lacks its arrays; a shard holds an
        array that the index does not know or gives to another shard.
    """
    where, manifest = _places(file)
    folder = os.path.dirname(file.path)
    entries: dict[str, Entry] = {}
    shards: dict[str, Reader] = {}
    for shard in sorted(set(where.values())):
        path = os.path.join(folder, shard)
        if not os.path.isfile(path):
            count = sum(s == shard for s in where.values())
            raise CheckpointError(f"{file.where} names the shard '{shard}' for {count} arrays, but it is missing.")
        shards[shard] = open_file(path)
        _same_names(file, shard, shards[shard], where)
        entries.update(shards[shard].entries)
    facts = [reader.metadata for reader in shards.values()]
    metadata = {key: value for fact in facts for key, value in fact.items()}

    def digest() -> str:
        lines = [f"{shard}\0{shards[shard].digest()}\n" for shard in sorted(shards)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    formats = sorted({reader.format for reader in shards.values()})
    ordered = {name: entries[name] for name in where}
    return Reader(formats[0], ordered, metadata, manifest, all(r.checked for r in shards.values()), digest)


def _places(file: FileBytes) -> tuple[dict[str, str], str | None]:
    """Which file each array is in, and what ``save`` wrote beside them."""
    if file.size > _LONGEST_INDEX:
        raise CheckpointError(f"{file.where} has {file.size} bytes; an index has at most {_LONGEST_INDEX}.")
    value: Any = parse_json(bytes(read(file, 0, file.size)), file.where)
    if isinstance(value, dict) and value.get("format") == "transferjax.plan":
        raise CheckpointError(
            f"{file.where} is a plan of transferjax and holds no arrays. Read it with Plan.from_json(text), and open "
            "the checkpoint that it is for."
        )
    places = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{file.where} is no index of shards. Expected {{'weight_map': {{name: file}}}}.")
    for name, shard in places.items():
        if shard in ("", ".", "..") or any(c in shard for c in "/\\\0:"):
            raise CheckpointError(
                f"{file.where} places '{name}' in {shard[:100]!r}. Expected the name of a file in the same folder."
            )
    facts = value.get("metadata")
    manifest = facts.get(KEY) if isinstance(facts, dict) else None
    if not isinstance(manifest, str | None):
        raise CheckpointError(f"{file.where} is damaged: its digests are no text.")
    return places, manifest


def _same_names(file: FileBytes, shard: str, reader: Reader, places: dict[str, str]) -> None:
    expected = {name for name, place in places.items() if place == shard}
    missing = sorted(expected - set(reader.entries))
    surplus = sorted(set(reader.entries) - expected)
    if missing:
        raise CheckpointError(f"shard '{shard}' of {file.where} lacks {listing(missing)}.")
    if surplus:
        raise CheckpointError(f"shard '{shard}' of {file.where} also holds {listing(surplus)}, placed elsewhere.")
