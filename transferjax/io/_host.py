"""Leaves as arrays in host memory, and back: typed keys, Python numbers, numpy scalars."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np

from transferjax._errors import CheckpointError, describe

_EXTRA = {
    np.dtype(getattr(ml_dtypes, name))
    for name in dir(ml_dtypes)
    if name.startswith(("bfloat", "float", "int", "uint")) and isinstance(getattr(ml_dtypes, name), type)
}
_PYTHON: dict[type, Any] = {bool: np.bool_, int: np.int64, float: np.float64, complex: np.complex128}


def kind_of(leaf: Any) -> str | None:
    """How a leaf that is no array must come back: a Python type's name, or ``"key:<implementation>"``."""
    if is_key(leaf):
        return f"key:{jax.random.key_impl(leaf)}"
    return type(leaf).__name__ if type(leaf) in _PYTHON else None


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys."""
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_host(path: str, leaf: Any) -> np.ndarray:
    """A leaf as a C-contiguous, native numpy array; typed keys as their data.

    Args:
      path: for errors.
      leaf: an array, numpy scalar, typed key, or Python number.

    Raises:
      CheckpointError: it is something else, was donated, or lies on other processes.
    """
    if type(leaf) in _PYTHON:
        try:
            return np.array(leaf, _PYTHON[type(leaf)])
        except OverflowError:
            raise CheckpointError(f"'{path}' is an integer beyond 64 bits. Put it into metadata as text.") from None
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            raise CheckpointError(f"'{path}' {describe(leaf)} was donated and is gone. Copy it with transferjax.copy.")
        if not leaf.is_fully_addressable:
            raise CheckpointError(
                f"'{path}' {describe(leaf)} lies on several processes. Gather it first: "
                "jax.experimental.multihost_utils.process_allgather(tree, tiled=True)."
            )
        leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
    elif not isinstance(leaf, np.ndarray | np.generic):
        raise CheckpointError(f"'{path}' is {describe(leaf)}. Expected an array or a number; text goes into metadata.")
    array = np.asarray(leaf)
    if not is_numbers(array.dtype):
        raise CheckpointError(f"'{path}' is {describe(array)}. Expected an array of numbers.")
    if (array.dtype == np.longdouble and array.dtype.itemsize > 8) or array.dtype.itemsize > 16:
        raise CheckpointError(f"'{path}' is {describe(array)}, which no format here holds. Cast it to float64.")
    # ascontiguousarray alone would make a 0-d array 1-d.
    return np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)


def is_numbers(dtype: np.dtype) -> bool:
    """Whether a dtype is one of numbers, those of ``ml_dtypes`` included."""
    return dtype in _EXTRA or dtype.kind in "biufc"


def from_host(array: np.ndarray, kind: str | None) -> Any:
    """The inverse of :func:`to_host`: numbers and typed keys from their arrays; arrays as they are."""
    if kind is None:
        return array
    if kind.startswith("key:"):
        return jax.random.wrap_key_data(jax.numpy.array(array), impl=kind[4:])
    return array.item()
