"""A few entries of a leaf learn: chosen at random, as slices of an axis, or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from transferjax._errors import SelectionError, describe
from transferjax._types import Tuning
from transferjax.tree import Selector
from transferjax.tuning._kernel import is_float
from transferjax.tuning._lora import adapter
from transferjax.tuning._vera import check_seed


def shira(selector: Selector | str, density: float, *, seed: int = 0) -> Tuning:
    """Sparse high-rank adaptation: a random part of the entries gets a learnt change, the others stay.

    Which entries follows from ``seed`` and the leaf's shape, by NumPy's ``RandomState``, whose stream is fixed for
    good; they are drawn whenever a program is traced. So they are in no tree and no file: what is saved is complete for
    whoever knows ``density`` and ``seed``. Leaves of one shape share their mask.

    Args:
      selector: floating-point leaves of any shape.
      density: the part of each leaf's entries that learn, in (0, 1]; at least one entry does.
      seed: of the mask, a whole number; another seed makes saved changes worthless.

    Returns:
      A ``Tuning``. ``shira`` has shape ``[entries]``, zeros, float32, in the order of the flattened leaf.

    Raises:
      SelectionError: density or seed is out of range; (at ``init``) a selected leaf is no floating-point array.

    Source: Bhardwaj et al., "Sparse High Rank Adapters", 2024, with a random mask.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = shira("fc/kernel", 0.25).init(jax.random.key(0), {"fc": {"kernel": jnp.ones((4, 3))}})
    >>> trainable["fc"]["kernel"]["shira"].shape
    (3,)
    """
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0.0 < density <= 1.0:
        raise SelectionError(f"shira() expects density as a part of the entries, in (0, 1], got {density!r}.")
    check_seed("shira", seed)
    count = lambda leaf: max(1, round(density * leaf.size))

    def create(key, path, leaf):
        _check_array("shira", path, leaf)
        return {"shira": jnp.zeros((count(leaf),), jnp.float32)}

    def combine(weights, leaf):
        change = weights["shira"]
        wide = jnp.asarray(leaf, jnp.promote_types(leaf.dtype, change.dtype)).reshape(-1)
        places = _places(seed, leaf.shape, change.size)
        return wide.at[places].add(change, indices_are_sorted=True, unique_indices=True).reshape(leaf.shape)

    return adapter(selector, create, combine)


def rows(selector: Selector | str, indices: Sequence[int], *, axis: int = 0) -> Tuning:
    """Some slices of a leaf learn: rows of an embedding, channels or heads of a kernel.

    Args:
      selector: floating-point leaves.
      indices: which slices; negative ones count from the end.
      axis: along which axis: 0 for the rows ``[vocabulary, dim]`` of an embedding, -1 for the out-features of a kernel.

    Returns:
      A ``Tuning``. ``rows`` holds the slices themselves, in the order of ``indices`` and in the leaf's dtype.

    Raises:
      SelectionError: there are no indices, or one is no whole number; (at ``init``) a selected leaf is no
        floating-point array or lacks the axis, or an index is out of range or comes twice.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = rows("embedding", [5, 7]).init(jax.random.key(0), {"embedding": jnp.ones((9, 4))})
    >>> trainable["embedding"]["rows"].shape
    (2, 4)
    """
    wanted = _whole_numbers("rows", indices, 1)

    def create(key, path, leaf):
        _check_array("rows", path, leaf)
        if not -leaf.ndim <= axis < leaf.ndim:
            raise SelectionError(f"rows() got axis {axis}, but '{path}' {describe(leaf)} has {leaf.ndim} axes.")
        _check_range("rows", path, leaf, wanted, leaf.shape[axis])
        return {"rows": jnp.take(jnp.asarray(leaf), wanted % leaf.shape[axis], axis=axis)}

    def combine(weights, leaf):
        ahead = (slice(None),) * (axis % leaf.ndim)
        return jnp.asarray(leaf).at[(*ahead, wanted % leaf.shape[axis])].set(weights["rows"], unique_indices=True)

    return adapter(selector, create, combine)


def entries(selector: Selector | str, coordinates: Sequence[Sequence[int]]) -> Tuning:
    """Single entries of a leaf learn.

    Args:
      selector: floating-point leaves.
      coordinates: ``[count, axes]``, one row of indices per entry; negative ones count from the end.

    Returns:
      A ``Tuning``. ``entries`` holds the entries themselves, ``[count]``, in the leaf's dtype.

    Raises:
      SelectionError: there are no coordinates, or they are no whole numbers; (at ``init``) a selected leaf is no
        floating-point array or has another number of axes, or an entry is out of range or comes twice.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = entries("fc", [(0, 1), (2, 2)]).init(jax.random.key(0), {"fc": jnp.ones((3, 3))})
    >>> trainable["fc"]["entries"].shape
    (2,)
    """
    wanted = _whole_numbers("entries", coordinates, 2)

    def create(key, path, leaf):
        _check_array("entries", path, leaf)
        if wanted.shape[1] != leaf.ndim:
            raise SelectionError(
                f"entries() got coordinates of {wanted.shape[1]} axes, but '{path}' {describe(leaf)} has {leaf.ndim}."
            )
        _check_range("entries", path, leaf, wanted, np.asarray(leaf.shape))
        return {"entries": jnp.asarray(leaf)[tuple((wanted % leaf.shape).T)]}

    def combine(weights, leaf):
        return jnp.asarray(leaf).at[tuple((wanted % leaf.shape).T)].set(weights["entries"], unique_indices=True)

    return adapter(selector, create, combine)


def _places(seed: int, shape: tuple[int, ...], count: int) -> np.ndarray:
    """``count`` different positions of a flattened array, sorted, in time proportional to ``count`` for small parts."""
    size = int(np.prod(shape))
    random = np.random.RandomState([seed, *shape])
    wanted = min(count, size - count)  # of more than half, the others are drawn
    found = np.zeros(0, np.int64)
    while found.size < wanted:
        found = np.unique(np.concatenate([found, random.randint(0, size, wanted - found.size, np.int64)]))
    return found if wanted == count else np.setdiff1d(np.arange(size), found)


def _whole_numbers(name: str, values: Any, axes: int) -> np.ndarray:
    found = np.asarray(values)
    if found.ndim != axes or not found.size or not np.issubdtype(found.dtype, np.integer):
        form = "a list of whole numbers, [5, 7]" if axes == 1 else "rows of whole numbers, [(0, 1), (2, 2)]"
        came = f"{found.shape} {found.dtype}" if found.size else "none"
        raise SelectionError(f"{name}() expects {form}; got {came}.")
    return found.astype(np.int64)


def _check_array(name: str, path: str, leaf: Any) -> None:
    if not is_float(leaf):
        raise SelectionError(
            f"{name}() expects floating-point arrays; '{path}' is {describe(leaf)}. Narrow the selector."
        )


def _check_range(name: str, path: str, leaf: Any, wanted: np.ndarray, sizes: Any) -> None:
    outside = wanted[(wanted < -sizes) | (wanted >= sizes)]
    if outside.size:
        raise SelectionError(
            f"{name}() got the index {outside[0]}, which is out of range for '{path}' {describe(leaf)}."
        )
    same = wanted % sizes
    if len(np.unique(same, axis=0)) != len(same):
        raise SelectionError(f"{name}() got an index of '{path}' twice. Expected each once.")
