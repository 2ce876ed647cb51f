"""load: the whole of an ordinary checkpoint as a tree."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from transferjax._errors import CheckpointError, SelectionError, describe, listing, nearest_hint
from transferjax.io._checkpoint import Checkpoint
from transferjax.io._host import from_host, is_key
from transferjax.io._open import open
from transferjax.surgery import assemble, leaves
from transferjax.tree import nest


def load(path: str | os.PathLike[str] | Checkpoint, like: Any = None) -> Any:
    """Reads all arrays of a checkpoint.

    Args:
      path: a file or directory, or an opened :class:`Checkpoint`.
      like: a tree (or ``Model``) of arrays, ``jax.ShapeDtypeStruct`` or numbers whose paths, shapes and dtypes the
        checkpoint must have; ``None``: whatever is there.

    Returns:
      With ``like``: the same structure; numpy where ``like`` is numpy, a Python number where it is one, otherwise JAX
      arrays in the sharding of ``like``. Without: nested dicts of numpy arrays, Python numbers and typed keys.

    Raises:
      CheckpointError: damage; or a leaf of ``like`` is missing, surplus, or of another shape or dtype.

    >>> import tempfile, numpy as np, transferjax.io as io
    >>> file = tempfile.mkdtemp() + "/state.npz"
    >>> _ = io.save(file, {"step": 3, "bias": np.ones(2)}, format="npz")
    >>> load(file)
    {'bias': array([1., 1.]), 'step': 3}
    """
    checkpoint = path if isinstance(path, Checkpoint) else open(path)
    if like is None:
        try:
            return nest({name: value(checkpoint, name) for name in checkpoint})
        except SelectionError as error:
            raise CheckpointError(f"'{checkpoint.path}' is no tree: {error}") from None
    expected = leaves(like)
    _same_names(checkpoint, expected)
    return assemble(like, {name: _like(checkpoint, name, leaf) for name, leaf in expected.items()})


def value(checkpoint: Checkpoint, name: str) -> Any:
    """One leaf as it was saved: a numpy array, a Python number, or typed keys."""
    return from_host(checkpoint[name], checkpoint.kinds.get(name))


def _same_names(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    missing = [name for name in expected if name not in checkpoint]
    if missing:
        raise CheckpointError(
            f"'{checkpoint.path}' lacks {len(missing)} of {len(expected)} leaves: {listing(missing)}."
            f"{nearest_hint(missing[0], checkpoint.shapes)}"
        )
    surplus = [name for name in checkpoint if name not in expected]
    if surplus:
        raise CheckpointError(
            f"'{checkpoint.path}' has {len(surplus)} leaves that the tree lacks: {listing(surplus)}. "
            "Read single ones with open(path)[name], or move them with a plan."
        )


def _like(checkpoint: Checkpoint, name: str, leaf: Any) -> Any:
    shape = checkpoint.shapes[name]
    kind = checkpoint.kinds.get(name)
    if is_key(leaf):
        found = value(checkpoint, name) if kind and kind.startswith("key:") else shape
    elif hasattr(leaf, "shape"):
        found = shape
    else:
        found = value(checkpoint, name)
        if type(found) is type(leaf):
            return found
    expected = (tuple(leaf.shape), leaf.dtype) if hasattr(leaf, "shape") else None
    if expected is None or (tuple(found.shape), found.dtype) != expected:
        raise CheckpointError(
            f"'{name}' in '{checkpoint.path}' is {describe(found)}; expected {describe(leaf)}. "
            "Nothing is cast here: read it with a plan that has a cast."
        )
    if isinstance(leaf, np.ndarray | np.generic):
        return checkpoint[name] if isinstance(leaf, np.ndarray) else checkpoint[name][()]
    return place(name, value(checkpoint, name) if is_key(leaf) else checkpoint[name], getattr(leaf, "sharding", None))


def place(name: str, array: Any, sharding: Any) -> jax.Array:
    """An array on devices, bit for bit.

    Raises:
      CheckpointError: the sharding does not fit its shape, or JAX would store another dtype (64 bits).
    """
    try:
        out = jax.device_put(array, sharding)
    except ValueError as error:
        raise CheckpointError(f"'{name}' {describe(array)} cannot be placed in {sharding}: {error}") from None
    if out.dtype != array.dtype:
        raise CheckpointError(
            f"'{name}' is {describe(array)}, but JAX made {out.dtype} of it. Enable 64 bits with "
            "jax.config.update('jax_enable_x64', True), or cast it in the plan."
        )
    return out
