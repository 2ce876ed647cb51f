"""A fine-tuning state as a directory: the arrays in an Orbax checkpoint, everything about them in a manifest."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import CheckpointError, describe, listing
from transferjax.io._beside import folder_beside, write_bytes
from transferjax.io._host import kind_of, to_host
from transferjax.io._manifest import digest, identity, leaf_facts
from transferjax.surgery import leaves
from transferjax.tree import flatten, natural

ARRAYS = "arrays"
MANIFEST = "manifest.json"
VERSION = 1


def fingerprint(tree: Any) -> str:
    """One sha256 over the paths, shapes, dtypes and bytes of all leaves; two trees are equal when theirs are.

    It is that of the checkpoint that :func:`transferjax.io.save` makes of the tree, in any format: what
    ``open(path).fingerprint()`` gives, and ``open(path, digest=...)`` and ``plan.with_source`` take.

    Args:
      tree: in memory: any pytree of arrays and numbers, or a ``Model`` (params and extra in one namespace); a ``Hole``
        has no leaf and does not count.

    Returns:
      64 hexadecimal digits. The order of dict keys does not matter.

    Raises:
      CheckpointError: there is neither a leaf nor a hole, a leaf is no array or number, or it lies on devices of other
        processes.

    >>> import numpy as np
    >>> fingerprint({"a": np.ones(2), "b": 1}) == fingerprint({"b": 1, "a": np.ones(2)})
    True
    >>> fingerprint({"a": np.ones(2)}) == fingerprint({"a": np.ones(2, np.float32)})
    False
    """
    if isinstance(tree, str | os.PathLike):
        raise CheckpointError(
            "fingerprint() is of a tree in memory, and got a path. Of a file write "
            "transferjax.io.open(path).fingerprint()."
        )
    found = leaves(tree)
    if not found and not flatten((tree,), holes=True)[0]:
        raise CheckpointError(f"fingerprint() expects a tree of arrays, got {type(tree).__name__} without a leaf.")
    facts = lambda item: leaf_facts(to_host(*item), kind_of(item[1]))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return identity(dict(zip(found, pool.map(facts, found.items()), strict=True)))


def leaf_digest(path: str, leaf: Any) -> tuple[tuple[int, ...], str, str]:
    """``(shape, dtype, sha256 of the bytes)`` of one leaf."""
    array = to_host(path, leaf)
    return tuple(array.shape), str(leaf.dtype), digest(array)


def write_state(path: pathlib.Path, state: Any, facts: Mapping[str, Any]) -> None:
    """Writes a state and JSON-able facts as the directory ``path``, beside and renamed.

    Raises:
      CheckpointError: it cannot be written, or a leaf is neither an array nor a number.
    """
    facts_of, arrays = {}, {}
    for name, leaf in flatten(state)[0]:
        if not _is_array(leaf):
            facts_of[name] = {"value": _scalar(name, leaf)}
            continue
        shape, dtype, sha256 = leaf_digest(name, leaf)
        facts_of[name] = {"shape": list(shape), "dtype": dtype, "sha256": sha256}
        data = jnp.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        if data.size:  # Orbax rejects arrays without elements.
            arrays[_escape(name)] = data
    body = {"version": VERSION, **facts, "leaves": facts_of}
    with folder_beside(path) as beside:
        if arrays:
            _save(beside / ARRAYS, arrays)
        text = json.dumps(body, sort_keys=True)
        write_bytes(beside / MANIFEST, json.dumps({"sha256": _text_digest(text), "body": body}).encode())


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """The facts that :func:`write_state` wrote, and ``leaves``.

    Raises:
      CheckpointError: it is missing, damaged, or of a newer version.
    """
    where = path / MANIFEST
    try:
        found = json.loads(where.read_bytes())
        body, digest = found["body"], found["sha256"]
    except OSError as error:
        raise CheckpointError(f"'{where}' cannot be read: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"'{where}' is damaged: it is no manifest of a checkpoint.") from None
    if _text_digest(json.dumps(body, sort_keys=True)) != digest:
        raise CheckpointError(f"'{where}' is damaged: its digest does not match. Remove '{path}' to use an older one.")
    if body["version"] > VERSION:
        raise CheckpointError(f"'{where}' has version {body['version']}; this transferjax reads up to {VERSION}.")
    return body


def read_state(path: pathlib.Path, manifest: Mapping[str, Any], like: Any) -> Any:
    """The arrays of a directory as a tree like ``like``, on its devices; every leaf is compared with its digest.

    ``like`` must have the leaves of the manifest (see :func:`difference`).

    Raises:
      CheckpointError: a leaf is missing or damaged.
    """
    flat, treedef = flatten(like)
    stored = manifest["leaves"]
    wanted = {
        _escape(name): _abstract(leaf)
        for name, leaf in flat
        if _is_array(leaf) and (_is_key(leaf) or 0 not in leaf.shape)
    }
    arrays = _load(path / ARRAYS, wanted) if wanted else {}
    out = []
    for name, leaf in flat:
        if not _is_array(leaf):
            out.append(stored[name]["value"])
            continue
        value = arrays.get(_escape(name))
        if value is None:
            value = jnp.zeros(leaf.shape, leaf.dtype) if 0 in leaf.shape else None
        if isinstance(value, jax.Array) and _is_key(leaf):
            value = jax.random.wrap_key_data(value, impl=_implementation(leaf))
        # Orbax hands over placeholders and casts without an error, and has no checksum over the data.
        if not isinstance(value, jax.Array) or leaf_digest(name, value)[1:] != (
            stored[name]["dtype"],
            stored[name]["sha256"],
        ):
            raise CheckpointError(f"'{name}' in '{path}' is damaged: its bytes do not match their sha256.")
        out.append(value)
    return jax.tree.unflatten(treedef, out)


def difference(manifest: Mapping[str, Any], like: Any, prefix: str) -> str | None:
    """How the leaves below ``prefix`` differ between a manifest and a tree, in words; ``None`` when they do not."""
    stored = {name: _spec(leaf) for name, leaf in manifest["leaves"].items() if _below(name, prefix)}
    now = {name: _spec_of(name, leaf) for name, leaf in flatten(like)[0] if _below(name, prefix)}
    lost = sorted(set(stored) - set(now), key=natural)
    new = sorted(set(now) - set(stored), key=natural)
    changed = sorted((name for name in set(stored) & set(now) if stored[name] != now[name]), key=natural)
    parts = [f"only in the checkpoint: {listing(lost, 3)}"] if lost else []
    parts += [f"only in this run: {listing(new, 3)}"] if new else []
    parts += [f"'{name}' was {stored[name]} and is {now[name]}" for name in changed[:3]]
    return "; ".join(parts) or None


def _save(path: pathlib.Path, arrays: dict[str, Any]) -> None:
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False  # Weights barely compress, and it is five times faster.
    try:
        with context:
            ocp.save(str(path.absolute()), arrays)
    except Exception as error:  # Orbax and tensorstore raise many kinds, disk full among them.
        raise CheckpointError(
            f"cannot write the checkpoint '{path.parent.parent}': {_first_line(error)} Nothing half-written was left "
            "behind. Expected a writable directory with enough free space."
        ) from error


def _load(path: pathlib.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    from orbax.checkpoint import v1 as ocp

    try:
        return dict(ocp.load(str(path.absolute()), wanted))
    except Exception as error:
        raise CheckpointError(f"'{path}' is damaged or incomplete: {_first_line(error)}") from error


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not _is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    words = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0]
    ))  # fmt: skip


def _implementation(leaf: Any) -> Any:
    return jax.random.key_impl(leaf) if isinstance(leaf, jax.Array) else leaf.dtype._impl.name


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_key(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _scalar(name: str, leaf: Any) -> bool | int | float | str:
    if isinstance(leaf, (bool, int, float, str)):
        return leaf
    raise CheckpointError(f"'{name}' is {describe(leaf)}, which a checkpoint cannot hold. Expected arrays and numbers.")


def _spec(leaf: Mapping[str, Any]) -> str:
    return type(leaf["value"]).__name__ if "value" in leaf else f"{tuple(leaf['shape'])} {leaf['dtype']}"


def _spec_of(name: str, leaf: Any) -> str:
    if not _is_array(leaf):
        return type(leaf).__name__
    shape = jax.eval_shape(jax.random.key_data, leaf).shape if _is_key(leaf) else leaf.shape
    return f"{tuple(shape)} {leaf.dtype}"


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}/")


def _escape(name: str) -> str:
    # Orbax joins keys by dots, so that two names which differ in dots only would become one.
    return name.replace("%", "%25").replace(".", "%2E")


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".") + "."
