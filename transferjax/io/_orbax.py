"""Orbax directories (v1 and v0): read through tensorstore array by array, written through ``orbax.checkpoint.v1``.

With ``_orbax_stream`` the only module that knows Orbax. Reading needs tensorstore alone.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from transferjax._errors import CheckpointError, listing
from transferjax.io._boxes import Corner
from transferjax.io._bytes import FileBytes, folder_sha256, read
from transferjax.io._host import is_key
from transferjax.io._manifest import BLOCK, Manifest, dtype_of
from transferjax.io._reader import SMALL, Entry, Reader, is_count
from transferjax.io._safetensors import parse_json
from transferjax.tree import nest

SIDECAR = "transferjax.json"
_LONGEST = 1 << 28
_RATIO = 1 << 16
_INDEX = 1 << 24
"""Bytes of a directory's index that are kept: without them each array walks through it from the start."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of an Orbax directory, opened for each read; ``context`` keeps the directory's index in memory."""

    spec: Mapping[str, Any]
    context: Any
    shape: Corner
    dtype: np.dtype
    where: str

    def box(self, low: Corner, high: Corner) -> np.ndarray:
        import tensorstore as ts

        try:
            store = ts.open(dict(self.spec), open=True, read=True, context=self.context).result()
            if tuple(store.shape) != self.shape:
                raise ValueError("shape")
            array = store[tuple(slice(a, b) for a, b in zip(low, high))].read().result()
        except Exception as error:  # tensorstore reports damage as ValueError, KeyError and its own types
            raise CheckpointError(f"{self.where} is damaged or incomplete: {first_line(error)}") from None
        return np.ascontiguousarray(array).reshape(array.shape).view(self.dtype)


@dataclasses.dataclass(frozen=True)
class Nothing:
    """An array without elements, which Orbax itself does not store."""

    shape: Corner
    dtype: np.dtype

    def box(self, low: Corner, high: Corner) -> np.ndarray:
        return np.empty(tuple(b - a for a, b in zip(low, high)), self.dtype)


def read_orbax(path: str) -> Reader:
    """Opens a directory by reading its metadata; no array is read.

    Raises:
      CheckpointError: it is no Orbax checkpoint, unfinished, holds several, or is damaged.
    """
    folder = _item(path)
    tree = _json(os.path.join(folder, "_METADATA"))
    leaves, nested = _leaf_keys(tree, folder)
    entries = _entries(folder, tree, leaves)
    metadata = {**_custom(path), **_strings(folder, nested)}
    manifest = None
    if os.path.isfile(os.path.join(path, SIDECAR)):
        file = FileBytes(os.path.join(path, SIDECAR))
        manifest = bytes(read(file, 0, file.size))
        entries = {**entries, **_empty(Manifest(manifest, f"'{path}'"))}
    return Reader("orbax", entries, metadata, manifest, False, lambda: folder_sha256(path), _keys(folder, leaves))


def _item(path: str) -> str:
    if ".orbax-checkpoint-tmp" in os.path.basename(path):
        raise CheckpointError(f"'{path}' is an Orbax checkpoint that was never finished. Open an earlier one.")
    holds = lambda folder: os.path.isfile(os.path.join(folder, "_METADATA"))
    if holds(path):
        return path
    inner = [name for name in sorted(os.listdir(path)) if holds(os.path.join(path, name))]
    if len(inner) == 1:
        return os.path.join(path, inner[0])
    if inner:
        raise CheckpointError(f"'{path}' holds {len(inner)} checkpoints: {listing(inner)}. Open one of them.")
    raise CheckpointError(
        f"'{path}' is a directory, but no checkpoint. Expected an Orbax directory (with _METADATA in it or one level "
        "below), a folder with *.index.json, or one with a single .safetensors file."
    )


def _leaf_keys(tree: Any, folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """``({path: name on disk}, {path: name})`` of arrays and of strings."""
    arrays: dict[str, str] = {}
    strings: dict[str, str] = {}
    try:
        for fact in tree["tree_metadata"].values():
            keys = [str(part["key"]) for part in fact["key_metadata"]]
            kind = fact["value_metadata"]["value_type"]
            path, name = "/".join(keys), ".".join(keys)
            if path in arrays or path in strings:
                raise CheckpointError(f"'{folder}' names '{path}' twice. Expected each name once.")
            if kind == "string":
                strings[path] = name
            elif kind != "None" and not fact["value_metadata"].get("skip_deserialize"):
                arrays[path] = name
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"'{folder}/_METADATA' is damaged: it does not describe a tree.") from None
    return arrays, strings


def _entries(folder: str, tree: Any, leaves: Mapping[str, str]) -> dict[str, Entry]:
    import tensorstore as ts

    zarr3, ocdbt = bool(tree.get("use_zarr3", False)), bool(tree.get("use_ocdbt", True))
    if ocdbt and not os.path.isfile(os.path.join(folder, "manifest.ocdbt")):
        ocdbt = False
    base = {"driver": "file", "path": folder + "/"}
    root = {"driver": "ocdbt", "base": base} if ocdbt else base
    limit = max(SMALL, _RATIO * _size(folder))
    out: dict[str, Entry] = {}
    try:
        context = ts.Context({"cache_pool": {"total_bytes_limit": _INDEX}})
        store = ts.KvStore.open(root, context=context).result()
        header = "zarr.json" if zarr3 else ".zarray"
        waiting = {path: store.read(f"{name}/{header}") for path, name in leaves.items()}
        found = {path: future.result().value for path, future in waiting.items()}
    except Exception as error:  # tensorstore reports damage as ValueError, KeyError and its own types
        raise CheckpointError(f"'{folder}' is damaged or incomplete: {first_line(error)}") from None
    for path, name in leaves.items():
        where = f"'{path}' in '{folder}'"
        if not found[path]:
            raise CheckpointError(f"{where} is missing: there is no {name}/{header}. The directory is incomplete.")
        shape, dtype = _header(found[path], where, zarr3)
        if math.prod(shape) * dtype.itemsize > limit:
            raise CheckpointError(f"{where} claims {shape} {dtype}, more than the directory can hold. It is damaged.")
        place = {**root, "path": (f"{name}/" if ocdbt else f"{folder}/{name}/")}
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": place, "fill_missing_data_reads": False}
        out[path] = Stored(spec, context, shape, dtype, where)
    return out


def _header(data: bytes, where: str, zarr3: bool) -> tuple[Corner, np.dtype]:
    fact = parse_json(data, f"the header of {where}")
    shape = fact.get("shape") if isinstance(fact, dict) else None
    name = fact.get("data_type" if zarr3 else "dtype") if isinstance(fact, dict) else None
    if not isinstance(shape, list) or not all(map(is_count, shape)) or not isinstance(name, str):
        raise CheckpointError(f"the header of {where} is damaged: it gives no shape and dtype.")
    return tuple(shape), dtype_of(name, where)


def _strings(folder: str, names: Mapping[str, str]) -> dict[str, Any]:
    if not names:
        return {}
    texts = _json(os.path.join(folder, "_strings.json"))
    return {path: texts.get(name) if isinstance(texts, dict) else None for path, name in names.items()}


def _custom(path: str) -> dict[str, Any]:
    place = os.path.join(path, "_CHECKPOINT_METADATA")
    facts = _json(place) if os.path.isfile(place) else {}
    found = facts.get("custom_metadata") if isinstance(facts, dict) else None
    return dict(found) if isinstance(found, dict) else {}


def _keys(folder: str, leaves: Mapping[str, str]) -> dict[str, str]:
    """The implementation of arrays that are data of typed PRNG keys."""
    place = os.path.join(folder, "array_metadatas")
    out: dict[str, str] = {}
    if not os.path.isdir(place):
        return out
    paths = {name: path for path, name in leaves.items()}
    for name in sorted(os.listdir(place)):
        facts = _json(os.path.join(place, name))
        try:
            for fact in facts["array_metadatas"]:
                inner = fact["array_metadata"]
                implementation = (inner.get("ext_metadata") or {}).get("random_key_impl")
                if implementation and inner["param_name"] in paths:
                    out[paths[inner["param_name"]]] = f"key:{implementation}"
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"'{place}/{name}' is damaged: it does not describe arrays.") from None
    return out


def _empty(manifest: Manifest) -> dict[str, Entry]:
    facts = {path: fact for path, fact in manifest.leaves.items() if 0 in fact["shape"]}
    return {p: Nothing(tuple(f["shape"]), dtype_of(f["dtype"], p)) for p, f in facts.items()}


def _json(path: str) -> Any:
    file = FileBytes(path)
    if file.size > _LONGEST:
        raise CheckpointError(f"{file.where} has {file.size} bytes, more than any metadata.")
    return parse_json(bytes(read(file, 0, file.size)), file.where)


def _size(folder: str) -> int:
    return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(folder) for name in names)


def first_line(error: Exception) -> str:
    """What an error of tensorstore says, without its trail."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def holds(dtype: np.dtype) -> bool:
    """Whether tensorstore's zarr arrays know a dtype."""
    return dtype.name not in ("int1", "uint1", "uint2", "uint4", "float6_e2m3fn", "float6_e3m2fn", "float8_e4m3")


def write_orbax(path: str, leaves: Mapping[str, Any], manifest: str, metadata: Mapping[str, Any], where: str) -> None:
    """Writes a directory that ``ocp.load`` reads, uncompressed, in chunks of at most 16 MiB, and the digests beside.

    Args:
      path: does not exist yet.
      leaves: by path; those without elements are kept in the digests' file only.
      where: what errors call it.

    Raises:
      CheckpointError: no leaf has elements, or Orbax cannot hold one.
    """
    from orbax.checkpoint import v1 as ocp

    tree = nest({name: _plain(leaf) for name, leaf in leaves.items() if getattr(leaf, "size", 1)})
    if not tree:
        raise CheckpointError("no leaf has elements, which Orbax cannot hold. Save with format='npz'.")
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = BLOCK
    try:
        with context:
            ocp.save(path, tree, custom_metadata=dict(metadata) or None)
    except OSError:
        raise
    except Exception as error:  # Orbax and tensorstore raise their own types, a full disk among them
        raise CheckpointError(f"Orbax could not write '{where}': {first_line(error)}") from None
    with open(os.path.join(path, SIDECAR), "w") as file:
        file.write(manifest)
        file.flush()
        os.fsync(file.fileno())


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, np.generic):
        return np.asarray(leaf)
    return leaf if is_key(leaf) or not hasattr(leaf, "shape") else np.ascontiguousarray(leaf).reshape(leaf.shape)
