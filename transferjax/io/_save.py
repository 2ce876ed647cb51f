"""save: a tree into a file or directory, with digests, all or nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from transferjax._errors import CheckpointError, SelectionError, describe
from transferjax._report import Report
from transferjax._types import Model
from transferjax.io import _npz, _safetensors
from transferjax.io._beside import beside, sync
from transferjax.io._host import kind_of, to_host
from transferjax.io._manifest import Manifest, encode, leaf_facts
from transferjax.surgery import leaves
from transferjax.tree import paths

FORMATS = ("orbax", "safetensors", "npz")
ENDINGS = {".safetensors": "safetensors", ".npz": "npz"}
"""What the ending of a path says about its format."""


def save(
    path: str | os.PathLike[str],
    tree: Any,
    format: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Report:
    """Saves every leaf of a tree by its path, with a sha256 for each block of at most 16 MiB.

    It is written beside (``.tmp-...`` in the same directory) and renamed, so that ``path`` never holds a half. Typed
    PRNG keys, Python numbers and numpy scalars are kept and come back as such from :func:`transferjax.io.load`.

    Args:
      path: the file, or for Orbax the directory; missing parents are made.
      tree: any pytree of arrays and numbers, or a ``Model`` (params and extra in one namespace).
      format: ``"orbax"`` (a directory that ``ocp.load`` reads; uncompressed), ``"safetensors"`` or ``"npz"`` (there
        bfloat16 and float8 are stored as integers of the same bits and come back as they were). ``None``: what the
        ending of the path says (``.safetensors``, ``.npz``), else Orbax.
      metadata: facts to keep, as JSON.
      overwrite: whether an existing path is replaced.

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
    where = os.path.abspath(os.fspath(path))
    format = _format(where, format)
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
        else:
            _write_file(new, format, arrays, shapes, manifest, facts)
    return _report(where, format, shapes, Manifest(manifest, f"'{where}'").fingerprint())


def _format(where: str, format: str | None) -> str:
    """The format that was asked for, or that of the path's ending; both must agree."""
    ending = os.path.splitext(where)[1].lower()
    said = ENDINGS.get(ending)
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


def _write_file(new: str, format: str, arrays: Any, shapes: Any, manifest: str, facts: dict[str, Any]) -> None:
    with open(new, "wb") as file:
        if format == "npz":
            _npz.write_npz(file, arrays, manifest)
        else:
            texts = {key: value for key, value in facts.items() if isinstance(value, str)}
            _safetensors.write_safetensors(file, arrays, shapes, {**texts, _safetensors.KEY: manifest})
    sync(new)


def _leaves(tree: Any) -> dict[str, Any]:
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


def _check_leaf(name: str, array: np.ndarray, format: str) -> None:
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
    return format == "npz" or dtype in _safetensors.NAMES


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
