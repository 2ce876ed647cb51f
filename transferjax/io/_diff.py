"""diff: what tells two checkpoints apart, name by name and number by number."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from transferjax._errors import CheckpointError, SelectionError, describe
from transferjax._report import Report
from transferjax.io._open import open
from transferjax.surgery import leaves
from transferjax.tree import natural

COLUMNS = ("path", "state", "shape", "other shape", "dtype", "other dtype", "max |a - b|", "relative")
CHUNK = 1 << 24  # values that are compared at a time


def diff(a: Any, b: Any, *, values: bool = True) -> Report:
    """Compares two checkpoints by structure, shapes, dtypes and numbers, one leaf in memory at a time.

    Args:
      a: a :class:`Checkpoint` or a path, which is opened; or a pytree or ``Model``, nested or ``{path: array}``.
      b: the other.
      values: whether to read the arrays; ``False`` compares headers only.

    Returns:
      A ``Report`` with one row per path of either. The state is ``equal`` (bit for bit), ``values`` (same form, other
      numbers), ``dtype``, ``shape``, ``only in a``, ``only in b``, or ``same form`` where numbers were not read.
      ``max |a - b|`` is the largest difference and ``relative`` is ``|a - b| / |a|`` in the L2 norm, both computed in
      float64 and given where shapes agree. The metadata count the states; ``equal`` says whether all leaves are.

    Raises:
      CheckpointError: a file is damaged or unknown, or something is neither a checkpoint nor a tree of arrays.

    >>> import numpy as np
    >>> report = diff({"w": np.zeros(2), "b": np.ones(1)}, {"w": np.array([0.0, 3.0]), "b": np.ones(1)})
    >>> [(row[0], row[1], row[6]) for row in report.rows], report.metadata["equal"]
    ([('b', 'equal', 0.0), ('w', 'values', 3.0)], False)
    """
    left, right = _Side(a, values), _Side(b, values)
    rows = [_row(path, left, right, values) for path in sorted({*left.shapes, *right.shapes}, key=_natural)]
    counts: dict[str, Any] = {}
    for row in rows:
        state = "equal leaves" if row[1] == "equal" else row[1]
        counts[state] = counts.get(state, 0) + 1
    facts = {"equal": set(counts) <= {"equal leaves"}, **dict(sorted(counts.items()))}
    return Report(f"{len(left.shapes):,} leaves against {len(right.shapes):,}", COLUMNS, tuple(rows), facts)


class _Side:
    """A checkpoint or a tree: the form of each leaf, and its array."""

    def __init__(self, source: Any, values: bool):
        source = open(source) if isinstance(source, str | os.PathLike) else source
        if hasattr(source, "shapes") and hasattr(source, "__getitem__"):
            self.shapes, self.read = source.shapes, source.__getitem__
            return
        self.shapes = _leaves(source, values)
        self.read = self.shapes.__getitem__

    def form(self, path: str) -> tuple[tuple[int, ...], str]:
        leaf = self.shapes[path] if hasattr(self.shapes[path], "dtype") else np.asarray(self.shapes[path])
        return tuple(leaf.shape), str(leaf.dtype)


def _leaves(tree: Any, values: bool) -> Mapping[str, Any]:
    try:
        found = leaves(tree)
    except SelectionError as error:
        raise CheckpointError(str(error)) from None
    wrong = [path for path, leaf in found.items() if not path or _no_array(leaf, values)]
    if wrong or not found:
        what = f"'{wrong[0]}' is {describe(found[wrong[0]])} in it" if wrong and wrong[0] else "it has no named leaf"
        raise CheckpointError(
            f"diff() cannot compare {type(tree).__name__}: {what}. Expected a checkpoint, its path, or a tree of "
            "arrays; of shapes alone with values=False."
        )
    return found


def _no_array(leaf: Any, values: bool) -> bool:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return values
    return not hasattr(leaf, "dtype") and np.asarray(leaf).dtype == object


def _row(path: str, a: _Side, b: _Side, values: bool) -> tuple[Any, ...]:
    if path not in b.shapes:
        shape, dtype = a.form(path)
        return (path, "only in a", str(shape), None, dtype, None, None, None)
    if path not in a.shapes:
        shape, dtype = b.form(path)
        return (path, "only in b", None, str(shape), None, dtype, None, None)
    (shape, dtype), (other_shape, other_dtype) = a.form(path), b.form(path)
    cells = (str(shape), str(other_shape), dtype, other_dtype)
    if shape != other_shape:
        return (path, "shape", *cells, None, None)
    same = dtype == other_dtype
    if not values:
        return (path, "same form" if same else "dtype", *cells, None, None)
    left, right = np.asarray(a.read(path)), np.asarray(b.read(path))
    gap, relative = _distance(left, right)
    equal = same and left.tobytes() == right.tobytes()
    return (path, "equal" if equal else "values" if same else "dtype", *cells, gap, relative)


def _distance(a: np.ndarray, b: np.ndarray) -> tuple[float | None, float | None]:
    """The largest difference and the relative one; ``None`` for what are no numbers."""
    wide = np.complex128 if any(np.issubdtype(x.dtype, np.complexfloating) for x in (a, b)) else np.float64
    largest, squares, norm = 0.0, 0.0, 0.0
    left, right = a.reshape(-1), b.reshape(-1)
    for start in range(0, left.size, CHUNK):
        try:
            one = left[start : start + CHUNK].astype(wide)
            other = right[start : start + CHUNK].astype(wide)
        except (TypeError, ValueError):
            return None, None
        with np.errstate(invalid="ignore", over="ignore"):
            gap = np.abs(one - other)
        gap = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0.0, gap)  # inf - inf, NaN beside NaN
        largest = float(np.maximum(largest, gap.max()))
        squares += float((gap**2).sum())
        norm += float(np.nansum(np.abs(one) ** 2))
    return largest, float(np.sqrt(squares / norm)) if norm else (0.0 if not squares else float("inf"))


def _natural(path: str) -> Any:
    return natural(path.replace(".", "/"))
