"""save: a tree into a file or directory, with digests, all or nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from transferjax._errors import CheckpointError, SelectionError, describe, is_whole
from transferjax._report import Report
from transferjax._types import Model
from transferjax.io import _msgpack, _npz, _safetensors
from transferjax.io._beside import beside, sync
from transferjax.io._host import kind_of, to_host
from transferjax.io._manifest import Manifest, encode, leaf_facts
from transferjax.io._replace import absolute, check_replaceable
from transferjax.io._shards import shards, write_shards
from transferjax.surgery import leaves
from transferjax.tree import paths

FORMATS = ("orbax", "safetensors", "npz", "msgpack")
ENDINGS = {".safetensors": "safetensors", ".npz": "npz", ".msgpack": "msgpack"}
"""What the ending of a path says about its format."""
FOREIGN = frozenset({
    ".bin", ".ckpt", ".csv", ".gguf", ".ggml", ".gz", ".h5", ".hdf5", ".joblib", ".json", ".keras", ".mar", ".md",
    ".npy", ".onnx", ".parquet", ".pb", ".pdf", ".pickle", ".pkl", ".png", ".pt", ".pth", ".py", ".tar", ".tflite",
    ".txt", ".yaml", ".zip",
})  # fmt: skip
"""Endings of formats that are not written; any other, as in ``run.v2``, is a part of a directory's name."""


def save(
    path: str | os.PathLike[str],
    tree: Any,
    format: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    shard_bytes: int | None = None,
) -> Report:
    """Saves every leaf of a tree by its path, with a sha256 for each block of at most 16 MiB.

    It is written beside (``.partial-...`` in the same directory) and renamed, so that ``path`` never holds a half.
    Typed PRNG keys, Python numbers and numpy scalars are kept and come back as such from :func:`transferjax.io.load`.

    Args:
      path: the file, or for Orbax the directory; ``~`` is expanded, and missing parents are made.
      tree: any pytree of arrays and numbers, or a ``Model`` (params and extra in one namespace).
      format: ``"orbax"`` (a directory that ``ocp.load`` reads; uncompressed), ``"safetensors"`` or ``"npz"`` (there
        bfloat16 and float8 are stored as integers of the same bits and come back as they were), or ``"msgpack"`` (which
        ``flax.serialization.msgpack_restore`` reads). ``None``: what the ending of the path says (``.safetensors``,
        ``.npz``, ``.msgpack``), else Orbax. An ending of a format that is not written, such as ``.pth``, raises.
      metadata: facts to keep, as JSON.
      overwrite: whether an existing path is replaced: a file by a file, and by a directory only an empty directory or
        a checkpoint with nothing else in it; never the current directory or one that holds it.
      shard_bytes: for safetensors: ``path`` becomes a folder of files of at most so many bytes of arrays (a larger
        array has its own), named as Hugging Face does: ``model-00001-of-00003.safetensors`` and so on, and
        ``model.safetensors.index.json``; or ``model.safetensors`` alone where one is enough.

    Returns:
      A ``Report``: path, shape, dtype, bytes of every leaf; its metadata hold the absolute path, format, totals and
      the fingerprint.

    Raises:
      CheckpointError: the path exists or ends like another format, a leaf or dtype cannot be held (it is named), or
        the system refuses to write; what was there before is unchanged.

    >>> import tempfile, numpy as np
    >>> file = tempfile.mkdtemp() + "/head.safetensors"
    >>> save(file, {"head": {"bias": np.zeros(3, np.float32)}}).rows
    (('head/bias', '(3,)', 'float32', 12),)
    """
    where = absolute(path, "save", "write save(path, tree)")
    format = _format(where, format) if shard_bytes is None else _sharded(where, format, shard_bytes)
    check_replaceable(where, directory=format == "orbax" or shard_bytes is not None)
    found = _leaves(tree)
    facts = _json(metadata)
    arrays: dict[str, Callable[[], np.ndarray]] = {}
    entries: dict[str, dict[str, Any]] = {}
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for name, leaf in found.items():
        array = to_host(name, leaf)
        _check_leaf(name, array, format)
        entries[name] = leaf_facts(array, kind_of(leaf))
        shapes[name] = jax.ShapeDtypeStruct(array.shape, array.dtype)
        arrays[name] = lambda name=name, leaf=leaf: to_host(name, leaf)
    if format == "orbax":
        _check_dots(found)
    manifest = encode(entries, facts)
    with beside(where, overwrite=overwrite) as new:
        if format == "orbax":
            from transferjax.io import _orbax  # heavy: only where it is asked for

            _orbax.write_orbax(new, found, manifest, facts, where)
        elif shard_bytes is not None:
            write_shards(new, arrays, shapes, lambda: manifest, _texts(facts), shard_bytes)
        else:
            _write_file(new, format, arrays, shapes, lambda: manifest, facts)
    return _report(where, format, shapes, Manifest(manifest, f"'{where}'").fingerprint())


def _format(where: str, format: str | None) -> str:
    """The format that was asked for, or that of the path's ending; both must agree."""
    ending = os.path.splitext(where)[1].lower()
    said = ENDINGS.get(ending)
    if format is None and ending in FOREIGN:
        raise CheckpointError(
            f"'{where}' ends with {ending}, which is not written here. Expected .safetensors (torch users load it with "
            "safetensors.torch.load_file), .npz, .msgpack, or for an Orbax directory no ending or format='orbax'."
        )
    if format is None:
        return said or "orbax"
    if format not in FORMATS:
        raise CheckpointError(f"format '{format}' is not written here. Expected one of {', '.join(FORMATS)}.")
    if said is not None and said != format:
        raise CheckpointError(
            f"'{where}' ends with {ending}, but format='{format}' was asked for. Leave format out to write {said}, or "
            "choose a path with another ending."
        )
    return format


def _sharded(where: str, format: str | None, shard_bytes: int) -> str:
    if format not in (None, "safetensors") or os.path.splitext(where)[1].lower() in {*ENDINGS, *FOREIGN}:
        raise CheckpointError(
            f"shard_bytes writes a folder of safetensors, but '{where}' or format={format!r} says something else. "
            "Give a path without an ending, and leave format out."
        )
    if not is_whole(shard_bytes):
        raise CheckpointError(f"shard_bytes is {shard_bytes!r}. Expected a whole number of bytes, such as 5 * 10**9.")
    return "safetensors"


def in_order(format: str, shapes: Mapping[str, Any], shard_bytes: int | None) -> list[str]:
    """The names of leaves as they are written."""
    if shard_bytes is not None:
        return [n for part in shards(shapes, shard_bytes) for n in _safetensors.in_order({n: shapes[n] for n in part})]
    return _safetensors.in_order(shapes) if format == "safetensors" else list(shapes)


def _texts(facts: Mapping[str, Any]) -> dict[str, str]:
    return {key: value for key, value in facts.items() if isinstance(value, str)}


def _write_file(
    new: str, format: str, arrays: Any, shapes: Any, manifest: Callable[[], str], facts: dict[str, Any]
) -> None:
    """Writes a file; ``manifest`` is asked again after the arrays, when their digests may be known at last."""
    with open(new, "wb") as file:
        if format == "npz":
            _npz.write_npz(file, arrays, manifest)
        elif format == "msgpack":
            _msgpack.write_msgpack(file, arrays, shapes, manifest)
        else:
            header = lambda: {**_texts(facts), _safetensors.KEY: manifest()}
            _safetensors.write_safetensors(file, arrays, shapes, header)
    sync(new)


def _leaves(tree: Any) -> dict[str, Any]:
    if hasattr(tree, "shapes") and callable(getattr(tree, "read", None)):
        raise CheckpointError(
            "got an opened checkpoint or a merge of some. Expected a tree of arrays: to write it leaf by leaf, "
            "transferjax.io.transplant(source, transferjax.surgery.plan(source.shapes, dict(source.shapes)), path)."
        )
    try:
        found = leaves(tree) if isinstance(tree, Model) else paths(tree)
    except SelectionError as error:
        raise CheckpointError(str(error)) from None
    if not found:
        raise CheckpointError("the tree has no leaves, so there is nothing to save.")
    if "" in found:
        raise CheckpointError("the tree is a single leaf without a name. Write {'name': leaf}.")
    return found


def _json(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise CheckpointError(f"metadata is {type(metadata).__name__}. Expected a dict of facts: {{'note': 'text'}}.")
    facts = dict(metadata or {})
    for key, value in facts.items():
        try:
            same = isinstance(key, str) and bool(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            same = False
        if not same:
            raise CheckpointError(
                f"metadata {key!r} is {type(value).__name__}, which JSON cannot hold. Expected text, finite numbers, "
                "booleans, None, and lists and dicts of them under names that are text."
            )
    return json.loads(json.dumps(facts))


_UNSAFE = re.compile(r"(^|[\\/])\.\.?([\\/]|$)|^[\\/]|[\\/]$|//|^[A-Za-z]:|[\x00-\x1f\\]|[\ud800-\udfff]")


def _check_leaf(name: str, array: Any, format: str) -> None:
    if _UNSAFE.search(name) or name in (_npz.KEY, "__metadata__"):
        raise CheckpointError(f"{name!r} cannot be the name of a leaf in a file. Rename it in the tree.")
    if not _holds(format, array.dtype):
        raise CheckpointError(
            f"'{name}' is {describe(array)}, which {format} cannot hold. Save with format='npz' or cast it."
        )


def _holds(format: str, dtype: np.dtype) -> bool:
    if format == "orbax":
        from transferjax.io import _orbax

        return _orbax.holds(dtype)
    return format in ("npz", "msgpack") or dtype in _safetensors.NAMES


def _check_dots(found: Mapping[str, Any]) -> None:
    seen: dict[str, str] = {}
    for name in found:
        other = seen.setdefault(name.replace("/", "."), name)
        if other != name:
            raise CheckpointError(
                f"Orbax stores '{other}' and '{name}' under one name. Rename one of them, or use another format."
            )


def _report(where: str, format: str, shapes: Mapping[str, jax.ShapeDtypeStruct], fingerprint: str) -> Report:
    size = lambda s: s.size * s.dtype.itemsize
    rows = tuple((name, str(s.shape), str(s.dtype), size(s)) for name, s in shapes.items())
    facts = {
        "path": where, "format": format, "leaves": len(rows), "parameters": sum(s.size for s in shapes.values()),
        "bytes": sum(map(size, shapes.values())), "fingerprint": fingerprint, "verified": "verified",
    }  # fmt: skip
    return Report("Saved", ("path", "shape", "dtype", "bytes"), rows, facts)
