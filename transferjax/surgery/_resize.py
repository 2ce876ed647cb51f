"""Leaves of another size: position and patch embeddings, input channels, rows of tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp
import numpy as np

from transferjax._errors import PlanError, describe
from transferjax.surgery._interpolation import along, interpolation, module_of, widened

METHODS = ("bicubic", "bilinear", "align_corners")
FILLS = ("mean", "zeros")

Grid = tuple[int, int]
Shape = tuple[int, ...]
Rows = Mapping[int, int] | Sequence[int | None]


class Resizer(NamedTuple):
    """One resizing operation: its arguments checked, the shape it makes, the array it makes."""

    check: Callable[..., tuple[Any, ...]]
    shape: Callable[..., Shape]
    run: Callable[..., Any]


def resize_position_embedding(
    array: Any, grid: Grid, *, old_grid: Grid | None = None, prefix: int = 1, method: str = "bicubic"
) -> Any:
    """Learned position embeddings of a grid of patches, interpolated to another grid.

    Args:
      array: [prefix + h * w, d] or [1, prefix + h * w, d], floating; numpy or JAX.
      grid: (h, w) of the new grid, in patches.
      old_grid: (h, w) of the grid that comes; default: a square.
      prefix: number of leading tokens that are no patches (class, registers); they pass through.
      method: ``"bicubic"``, antialiased, as ``jax.image.resize`` and timm; ``"bilinear"``, antialiased;
        ``"align_corners"``, linear with the corners in place, as the original ViT code and ``scipy.ndimage.zoom``
        of order 1. On unit-normal values the first and the last differ by up to about a half.

    Returns:
      The same with h * w of the new grid, of the same kind and dtype, computed in float32 at least; the array itself
      when the grid stays.

    Raises:
      PlanError: the array has other axes or no floats, the tokens do not fill ``old_grid`` or no square, or an
        argument is malformed.

    >>> import numpy as np
    >>> resize_position_embedding(np.zeros((1, 1 + 14 * 14, 8), np.float32), (7, 10)).shape
    (1, 71, 8)

    Source: A. Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, section 3.2.
    """
    _need_floats(array, "resize_position_embedding")
    if old_grid is None:
        _, _, prefix, _ = _check_position((1, 1), (1, 1), prefix, method)
        old_grid = square_grid(array.shape, prefix, "old_grid")
    old, new, prefix, method = _check_position(old_grid, grid, prefix, method)
    _shape_position(array.shape, old, new, prefix, method)
    return _run_position(array, old, new, prefix, method)


def resize_patch_embedding(kernel: Any, size: Grid) -> Any:
    """The kernel of a patch embedding for patches of another size (FlexiViT's pseudo-inverse resize).

    With B the antialiased bicubic resize of a patch from the old to the new size, the new kernel is
    ``pinv(B^T) w``: on a patch that was enlarged by B it gives what the old kernel gives on the patch, and the
    closest to it, for random patches, when patches become smaller.

    Args:
      kernel: [h, w, in, out], floating; numpy or JAX.
      size: (h, w) of the new patches, in pixels.

    Returns:
      [*size, in, out], of the same kind and dtype, computed in float32 at least; the kernel itself at the same size.

    Raises:
      PlanError: the kernel has other axes or no floats, or the size is malformed.

    >>> import numpy as np
    >>> resize_patch_embedding(np.ones((16, 16, 3, 8), np.float32), (8, 8)).shape
    (8, 8, 3, 8)

    Source: L. Beyer et al., "FlexiViT: One Model for All Patch Sizes", 2023, section 3.4.
    """
    _need_floats(kernel, "resize_patch_embedding")
    (size,) = _check_patch(size)
    _shape_patch(kernel.shape, size)
    return _run_patch(kernel, size)


def adapt_input_channels(kernel: Any, n: int) -> Any:
    """The kernel of a network's first convolution for another number of input channels.

    One channel: the sum over the three channels, which is exact for a grey image copied to all three. More or fewer:
    the channels repeat in order, and are scaled by ``3 / n`` so that the response to equal channels stays.

    Args:
      kernel: [h, w, 3, out] (any number of spatial axes), floating; numpy or JAX. A kernel with one or two input
        channels can be summed to one.
      n: number of input channels.

    Returns:
      [h, w, n, out], of the same kind and dtype, computed in float32 at least; the kernel itself when ``n`` is its
      own number.

    Raises:
      PlanError: the kernel has fewer than three axes or no floats, its channels are not those of an RGB image (it is
        grouped, depthwise or folds pixels into channels), or ``n`` is malformed.

    >>> import numpy as np
    >>> adapt_input_channels(np.ones((3, 3, 3, 8), np.float32), 1)[0, 0, 0, 0]
    np.float32(3.0)
    """
    _need_floats(kernel, "adapt_input_channels")
    (n,) = _check_channels(n)
    _shape_channels(kernel.shape, n)
    return _run_channels(kernel, n)


def resize_rows(array: Any, n: int, fill: Any = "mean", mapping: Rows | None = None, *, axis: int = 0) -> Any:
    """A table with another number of rows: a vocabulary, or the classes of a head.

    Args:
      array: [rows, ...], floating; numpy or JAX.
      n: number of rows to make.
      fill: of rows without an old one: ``"mean"`` of all old rows, ``"zeros"``, or an array with ``n`` rows (initial
        values, of which the new rows are taken) or with as many rows as are new.
      mapping: ``{new row: old row}``, or for each new row its old row, with ``None`` or -1 for a row without one;
        rows that a dict does not name are filled. Default: the old rows keep their numbers, and ``n`` must not be
        smaller; to keep the first n write ``mapping=range(n)``.
      axis: the axis of the rows: 0 of an embedding or a bias, 1 of a head's kernel [in, classes].

    Returns:
      The same with ``n`` along ``axis``, of the same kind and dtype, computed in float32 at least; the array itself
      when every row stays.

    Raises:
      PlanError: rows would be dropped without a mapping, the mapping or the fill does not fit, or the array has no
        such axis or no floats.

    >>> import numpy as np
    >>> resize_rows(np.array([[1.0, 2.0], [3.0, 4.0]]), 3).tolist()
    [[1.0, 2.0], [3.0, 4.0], [2.0, 3.0]]
    >>> resize_rows(np.array([1.0, 2.0, 3.0]), 2, mapping=[2, 0]).tolist()
    [3.0, 1.0]
    """
    _need_floats(array, "resize_rows")
    n = _number(n, 1, "number of rows")
    named = fill if isinstance(fill, str) else "zeros"
    ndim = len(array.shape)
    rank = axis + ndim if isinstance(axis, int) and axis < 0 else axis
    _, named, rows, rank = _check_rows(n, named, None if mapping is None else row_numbers(mapping, n), rank)
    _shape_rows(array.shape, n, named, rows, rank)
    return _run_rows(array, n, fill, rows, rank)


def row_numbers(mapping: Any, n: int) -> tuple[int, ...]:
    """For each of ``n`` new rows its old row, -1 for none, from a dict ``{new: old}`` or a list."""
    if isinstance(mapping, Mapping):
        outside = [new for new in mapping if not (whole(new) and 0 <= new < n)]
        if outside:
            raise PlanError(f"the mapping names the new row {outside[0]!r}; expected whole numbers from 0 to {n - 1}.")
        return tuple(mapping.get(row, -1) for row in range(n))
    if isinstance(mapping, (str, bytes)) or not hasattr(mapping, "__iter__"):
        raise PlanError(
            f"the mapping is {type(mapping).__name__}; expected {{new row: old row}} or a list of old rows."
        )
    return tuple(-1 if row is None else row for row in mapping)


def square_grid(shape: Shape, prefix: int, argument: str) -> Grid:
    """The square grid of the tokens after the prefix."""
    tokens = _tokens(shape) - prefix
    side = math.isqrt(max(tokens, 0))
    if side == 0 or side * side != tokens:
        raise PlanError(
            f"{tokens} tokens after {prefix} prefix tokens form no square grid: {tuple(shape)} came. "
            f"Write {argument}=(h, w), and the right prefix."
        )
    return side, side


def whole(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _need_floats(array: Any, name: str) -> None:
    if not (hasattr(array, "shape") and hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)):
        raise PlanError(f"{name}() expects an array of floats, numpy or JAX; {describe(array)} came.")


def _pair(value: Any, what: str) -> Grid:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(whole(n) and n > 0 for n in value):
        raise PlanError(f"{what} {value!r} is malformed. Expected (height, width), two whole numbers of at least 1.")
    return int(value[0]), int(value[1])


def _number(value: Any, least: int, what: str) -> int:
    if not whole(value) or value < least:
        raise PlanError(f"{what} {value!r} is malformed. Expected a whole number of at least {least}.")
    return int(value)


def _one_of(value: Any, names: Sequence[str], what: str) -> str:
    if not isinstance(value, str) or value not in names:
        given = repr(value) if isinstance(value, str) else type(value).__name__
        raise PlanError(f"{what} {given} is unknown. Expected one of {', '.join(map(repr, names))}.")
    return value


# Position embeddings -------------------------------------------------------------------------------------------------


def _check_position(old: Any, new: Any, prefix: Any, method: Any) -> tuple[Grid, Grid, int, str]:
    return (
        _pair(old, "old_grid"), _pair(new, "grid"), _number(prefix, 0, "prefix"), _one_of(method, METHODS, "method"),
    )  # fmt: skip


def _tokens(shape: Shape) -> int:
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise PlanError(f"position embeddings are [tokens, d] or [1, tokens, d]; {tuple(shape)} came.")
    return shape[-2]


def _shape_position(shape: Shape, old: Grid, new: Grid, prefix: int, method: str) -> Shape:
    if _tokens(shape) != prefix + old[0] * old[1]:
        raise PlanError(
            f"{_tokens(shape)} tokens came; the grid {old} and {prefix} prefix tokens are {prefix + old[0] * old[1]}."
        )
    return (*shape[:-2], prefix + new[0] * new[1], shape[-1])


def _run_position(array: Any, old: Grid, new: Grid, prefix: int, method: str) -> Any:
    if old == new:
        return array
    patches = widened(array[..., prefix:, :]).reshape(*old, array.shape[-1])
    for axis in (0, 1):
        patches = along(interpolation(old[axis], new[axis], method), patches, axis)
    patches = patches.reshape(*array.shape[:-2], -1, array.shape[-1]).astype(array.dtype)
    return module_of(array).concatenate([array[..., :prefix, :], patches], axis=-2)


# Patch embeddings ----------------------------------------------------------------------------------------------------


def _check_patch(size: Any) -> tuple[Grid]:
    return (_pair(size, "size"),)


def _shape_patch(shape: Shape, size: Grid) -> Shape:
    if len(shape) != 4 or 0 in shape[:2]:
        raise PlanError(f"the kernel of a patch embedding is [h, w, in, out]; {tuple(shape)} came.")
    return (*size, *shape[2:])


def _run_patch(kernel: Any, size: Grid) -> Any:
    if tuple(kernel.shape[:2]) == size:
        return kernel
    out = widened(kernel)
    for axis in (0, 1):
        # The resize is a Kronecker product of its two axes, and so is its pseudo-inverse.
        forward = interpolation(kernel.shape[axis], size[axis], "bicubic")
        out = along(np.linalg.pinv(forward.T), out, axis)
    return out.astype(kernel.dtype)


# Input channels ------------------------------------------------------------------------------------------------------


def _check_channels(n: Any) -> tuple[int]:
    return (_number(n, 1, "number of input channels"),)


def _shape_channels(shape: Shape, n: int) -> Shape:
    if len(shape) < 3:
        raise PlanError(f"the kernel of a convolution is [h, w, in, out]; {tuple(shape)} came.")
    came = shape[-2]
    if came != n and came != 3 and not (n == 1 and came == 2):
        raise PlanError(
            f"a kernel of {came} input channels is not made into one of {n}: expected 3, those of an RGB image; "
            f"{tuple(shape)} came. A grouped, depthwise or folded kernel needs a choice of yours: "
            "keep the initial values with fresh(...), or change the array before the plan."
        )
    return (*shape[:-2], n, shape[-1])


def _run_channels(kernel: Any, n: int) -> Any:
    if kernel.shape[-2] == n:
        return kernel
    values = widened(kernel)
    if n == 1:
        return values.sum(axis=-2, keepdims=True).astype(kernel.dtype)
    return (values[..., np.arange(n) % 3, :] * (3.0 / n)).astype(kernel.dtype)


# Rows ----------------------------------------------------------------------------------------------------------------


def _check_rows(n: Any, fill: Any, mapping: Any, axis: Any) -> tuple[int, str, tuple[int, ...] | None, int]:
    n, fill, axis = _number(n, 1, "number of rows"), _one_of(fill, FILLS, "fill"), _number(axis, 0, "axis")
    if mapping is None:
        return n, fill, None, axis
    if not isinstance(mapping, (list, tuple)) or not all(whole(row) and row >= -1 for row in mapping):
        raise PlanError("the mapping is malformed. Expected for each new row its old row, or -1 for none.")
    if len(mapping) != n:
        raise PlanError(f"the mapping has {len(mapping)} entries; expected {n}, one old row for each new row.")
    return n, fill, tuple(int(row) for row in mapping), axis


def _shape_rows(shape: Shape, n: int, fill: str, mapping: tuple[int, ...] | None, axis: int) -> Shape:
    if axis >= len(shape) or not shape[axis]:
        raise PlanError(f"rows along axis {axis} are expected; {tuple(shape)} came.")
    if mapping is None and n < shape[axis]:
        raise PlanError(
            f"{shape[axis]} rows do not fit into {n}. Write mapping= with the old row of each new row; "
            f"range({n}) keeps the first."
        )
    if mapping is not None and max(mapping) >= shape[axis]:
        raise PlanError(f"the mapping names the old row {max(mapping)}; {shape[axis]} rows came.")
    return (*shape[:axis], n, *shape[axis + 1 :])


def _run_rows(array: Any, n: int, fill: Any, mapping: tuple[int, ...] | None, axis: int) -> Any:
    count, module = array.shape[axis], module_of(array)
    sources = np.array(mapping if mapping is not None else [*range(count), *[-1] * (n - count)], dtype=np.int64)
    if np.array_equal(sources, np.arange(count)):
        return array
    new = np.flatnonzero(sources < 0)
    kept = module.take(array, np.maximum(sources, 0), axis=axis)
    if not new.size:
        return kept
    if isinstance(fill, str) and fill == "zeros":
        rows = module.zeros((), array.dtype)
    elif isinstance(fill, str):
        rows = widened(array).mean(axis=axis, keepdims=True).astype(array.dtype)
    else:
        rows = _initial_rows(array, fill, new, n, axis)
    is_new = (sources < 0).reshape([-1 if a == axis else 1 for a in range(array.ndim)])
    return module.where(is_new, rows, kept)


def _initial_rows(array: Any, fill: Any, new: np.ndarray, n: int, axis: int) -> Any:
    """The rows of ``fill``, each at the place of its row among ``n``."""
    module = module_of(array)
    expected = (*array.shape[:axis], n, *array.shape[axis + 1 :])
    shorter = (*expected[:axis], len(new), *expected[axis + 1 :])
    rows = module.asarray(fill)
    if rows.shape not in (expected, shorter):
        raise PlanError(f"fill has the shape {rows.shape}; expected {expected}, or {shorter} for the new rows alone.")
    if rows.shape[axis] != n:
        order = np.zeros(n, dtype=np.int64)
        order[new] = np.arange(len(new))
        rows = module.take(rows, order, axis=axis)
    return rows.astype(array.dtype)


RESIZERS: dict[str, Resizer] = {
    "resize_position_embedding": Resizer(_check_position, _shape_position, _run_position),
    "resize_patch_embedding": Resizer(_check_patch, _shape_patch, _run_patch),
    "adapt_input_channels": Resizer(_check_channels, _shape_channels, _run_channels),
    "resize_rows": Resizer(_check_rows, _shape_rows, _run_rows),
}
"""The resizing operations of a plan, by name."""
