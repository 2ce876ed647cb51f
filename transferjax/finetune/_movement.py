"""What moved: how far fine-tuning took every weight from where it began."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import SelectionError, TransferError, describe, listing, nearest_hint
from transferjax._report import Report
from transferjax.numerics._covariance import gram, scatter
from transferjax.surgery import leaves
from transferjax.tree import Selector, matches, natural

EQUAL, MOVED, DTYPE, SHAPE, ONLY_BASE, ONLY_TUNED = "equal", "moved", "dtype", "shape", "only in base", "only in tuned"
KEPT, MOVED_FROZEN, MISSING = "kept", "moved!", "missing!"
CHUNK = 1 << 22  # values that are compared at a time
MOVERS = 5


class _Row(NamedTuple):
    """What became of one leaf."""

    path: str
    state: str
    shape: str
    norm: float | None = None
    change: float | None = None
    relative: float | None = None
    cosine: float | None = None
    largest: float | None = None
    rank: float | None = None
    counted: bool = False  # whether it is part of the overall change


COLUMNS = (
    "path", "state", "shape", "norm", "change", "relative change", "cosine", "largest change", "effective rank",
)  # fmt: skip


def movement(base: Any, tuned: Any, *, frozen: Selector | str | None = None, axis: int | None = -1) -> Report:
    """How far every leaf lies from where it began, one leaf of each side in memory at a time.

    All is computed in float64. The effective rank of a change, as a matrix of ``axis`` against all other axes, is the
    exponential of the entropy of its squared singular values, divided by their sum: 1 for a change of rank one, ``r``
    for ``r`` equal singular values. They are the eigenvalues of the smaller of its two Gram matrices.

    Args:
      base: the weights before: a pytree of arrays, a ``Model`` (params and extra), or an opened checkpoint, of which
        one array is read at a time.
      tuned: the weights after; its kind may be another.
      frozen: a selector or glob of leaves of ``base`` that should not have moved.
      axis: of the outputs: -1, or 0 as torch stores kernels. ``None`` leaves effective ranks out, and saves an
        eigenvalue problem per leaf, of the size of its smaller side.

    Returns:
      A ``Report`` with one row per path of either side, in natural order. The state is ``equal`` (bit for bit),
      ``moved``, ``dtype`` (the same numbers in another type), ``shape``, ``only in base`` or ``only in tuned``. Where
      shapes agree: ``norm`` is ``|base|`` and ``change`` ``|tuned - base|`` in the L2 norm, ``relative change`` their
      ratio and ``cosine`` that of both as vectors (``None`` where it would divide by zero; entries that are not finite
      count in the change alone), ``largest change`` that of one entry, and ``effective rank`` that of the change, of
      real leaves with at least two axes. With ``frozen`` a column of that name holds ``kept`` (bit for bit),
      ``moved!`` or ``missing!``. The metadata hold the share of leaves that moved of those with one shape, their
      overall relative change (floating-point leaves), those with the largest, and the numbers of all other states.

    Raises:
      SelectionError: no leaf is in both, or ``frozen`` matches nothing.
      TransferError: a side is a path, a leaf is no array of numbers, or abstract, or ``axis`` is another.

    Source: Roy & Vetterli, The effective rank, EUSIPCO 2007 (there with singular values that are not squared).

    >>> import numpy as np
    >>> base = {"head": {"bias": np.zeros(2), "kernel": np.eye(2)}, "stem": np.ones(2)}
    >>> tuned = {"head": {"bias": np.ones(2), "kernel": 1.5 * np.eye(2)}, "stem": np.ones(2)}
    >>> report = movement(base, tuned, frozen="stem")
    >>> for row in report.to_dicts():
    ...     print(row["path"], row["state"], row["relative change"], row["effective rank"], row["frozen"])
    head/bias moved None None None
    head/kernel moved 0.5 2.0 None
    stem equal 0.0 None kept
    """
    if axis not in (-1, 0, None):
        raise TransferError(f"movement() got axis={axis!r}. Expected -1, 0, or None to leave effective ranks out.")
    sides = _Side(base, "base"), _Side(tuned, "tuned")
    both = [path for path in sides[0].shapes if path in sides[1].shapes]
    if not both:
        raise SelectionError(_nothing_in_common(*(list(side.shapes) for side in sides)))
    held = frozenset() if frozen is None else frozenset(matches(dict(sides[0].shapes), frozen))
    names = sorted({*sides[0].shapes, *sides[1].shapes}, key=_order)
    rows = [_row(path, *sides, axis) for path in names]
    columns, cells = COLUMNS, [row[:-1] for row in rows]
    if frozen is not None:
        columns = (*COLUMNS, "frozen")
        cells = [(*row, _verdict(row[1]) if row[0] in held else None) for row in cells]
    moved = sum(row.state == MOVED for row in rows)
    compared = sum(row.change is not None for row in rows)
    title = f"Movement: {moved:,} of {compared:,} leaves moved"
    return Report(title, columns, tuple(cells), {**_facts(rows, moved, compared), **_frozen_facts(frozen, cells)})


class _Side:
    """A checkpoint or a tree: the form of each leaf, and its array."""

    def __init__(self, source: Any, name: str):
        self.name = name
        if isinstance(source, str | os.PathLike):
            raise TransferError(
                f"movement() got {describe(source)} as {name}. Expected a tree, a Model or an opened checkpoint: "
                "transferjax.io.open(path)."
            )
        if hasattr(source, "shapes") and hasattr(source, "__getitem__"):
            self.shapes: Mapping[str, Any] = source.shapes
            self._read = source.__getitem__
            return
        self.shapes = leaves(source)
        self._read = self.shapes.__getitem__

    def shape(self, path: str) -> tuple[int, ...]:
        return tuple(np.shape(self.shapes[path]))

    def read(self, path: str) -> np.ndarray:
        """The array of a leaf; of a random key, its data."""
        leaf = self._read(path)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TransferError(f"movement(): '{path}' of {self.name} is abstract, {describe(leaf)}. Restore it first.")
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        if array.dtype.kind in "OSUMm" or array.dtype.names:
            raise TransferError(
                f"movement(): '{path}' of {self.name} is {describe(leaf)}; expected an array of numbers."
            )
        return array


def _nothing_in_common(base: Sequence[str], tuned: Sequence[str]) -> str:
    hint = nearest_hint(tuned[0], base, 1) if tuned else ""
    return (
        f"movement() found no leaf in both: base has {listing(base, 3) or 'none'}; tuned has "
        f"{listing(tuned, 3) or 'none'}.{hint} Expected the same names: export a run, or restore one through a plan."
    )


def _row(path: str, base: _Side, tuned: _Side, axis: int | None) -> _Row:
    if path not in tuned.shapes:
        return _Row(path, ONLY_BASE, str(base.shape(path)))
    if path not in base.shapes:
        return _Row(path, ONLY_TUNED, str(tuned.shape(path)))
    shapes = base.shape(path), tuned.shape(path)
    if shapes[0] != shapes[1]:
        return _Row(path, SHAPE, f"{shapes[0]} and {shapes[1]}")
    one, other = base.read(path), tuned.read(path)
    found = _distance(one, other, axis if one.ndim >= 2 and one.size else None)
    state = EQUAL if found.same else DTYPE if one.dtype != other.dtype and found.change == 0 else MOVED
    return _Row(path, state, str(shapes[0]), *found[1:], counted=one.dtype.kind not in "iub")


class _Distance(NamedTuple):
    """How two arrays of one shape differ; ``same``: in no bit, nor in their types."""

    same: bool
    norm: float
    change: float
    relative: float | None
    cosine: float | None
    largest: float
    rank: float | None


def _distance(one: np.ndarray, other: np.ndarray, axis: int | None) -> _Distance:
    wide = np.complex128 if "c" in (one.dtype.kind, other.dtype.kind) else np.float64
    narrow = max(one.dtype.itemsize, other.dtype.itemsize) <= 4 and "i" not in (one.dtype.kind, other.dtype.kind)
    apart = (
        np.empty(one.size, np.float32 if narrow else np.float64) if axis is not None and wide is np.float64 else None
    )
    left, right = one.reshape(-1), other.reshape(-1)
    same, largest, sums = one.dtype == other.dtype, 0.0, np.zeros(4)
    for start in range(0, left.size, CHUNK):
        pair = left[start : start + CHUNK], right[start : start + CHUNK]
        same = same and pair[0].tobytes() == pair[1].tobytes()
        a, b = (part.astype(wide) for part in pair)
        with np.errstate(invalid="ignore", over="ignore"):
            gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, b - a)  # inf - inf, NaN beside NaN
            if apart is not None:
                apart[start : start + CHUNK] = gap
            size = np.abs(gap)
            largest = float(np.maximum(largest, size.max()))
            a, b = (np.where(np.isfinite(part), part, 0) for part in (a, b))
            sums += [float(np.square(size).sum()), *(float(np.vdot(x, y).real) for x, y in ((a, a), (b, b), (a, b)))]
    change, norm, length = (float(x) for x in np.sqrt(sums[:3]))
    cosine = None if not norm or not length else max(-1.0, min(1.0, float(sums[3]) / norm / length))
    relative = change / norm if norm else None
    matrix = None if apart is None else apart.reshape((-1, one.shape[-1]) if axis else (len(one), -1))
    spread = None if matrix is None else _effective_rank(matrix, change)
    return _Distance(same, norm, change, relative, 1.0 if same and norm else cosine, largest, spread)


def _effective_rank(change: np.ndarray, norm: float) -> float | None:
    """The exponential of the entropy of the squared singular values; 0 of no change, ``None`` where not finite.

    >>> round(_effective_rank(np.diag([1.0, 1.0, 0.0]), 2**0.5), 12)
    2.0
    """
    if not norm:
        return 0.0
    scale = np.abs(change).max()
    if not np.isfinite(scale):
        return None
    scaled = change / scale
    values = np.linalg.eigvalsh(gram(scaled) if len(scaled) < scaled.shape[1] else scatter(scaled))
    shares = values[values > 0] / values[values > 0].sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _verdict(state: str) -> str:
    return KEPT if state == EQUAL else MISSING if state == ONLY_BASE else MOVED_FROZEN


def _facts(rows: Sequence[_Row], moved: int, compared: int) -> dict[str, Any]:
    counted = [row for row in rows if row.change is not None and row.counted]
    change, norm = (math.hypot(*(getattr(row, name) for row in counted)) for name in ("change", "norm"))
    largest = lambda row: -math.inf if math.isnan(row.relative) else -row.relative
    movers = sorted((row for row in rows if row.state == MOVED and row.relative is not None), key=largest)
    strange = [row.path for row in rows if row.change is not None and not math.isfinite(row.change)]
    others = {state: sum(row.state == state for row in rows) for state in (DTYPE, SHAPE, ONLY_BASE, ONLY_TUNED)}
    return {
        "share of leaves moved": moved / compared if compared else None,
        "relative change": change / norm if norm else None,
        "largest movers": ", ".join(f"{row.path} {row.relative:.3g}" for row in movers[:MOVERS]) or None,
        **{state: count for state, count in others.items() if count},
        **({"change is not finite": listing(strange)} if strange else {}),
    }


def _frozen_facts(frozen: Selector | str | None, cells: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    if frozen is None:
        return {}
    found = {verdict: [row[0] for row in cells if row[-1] == verdict] for verdict in (KEPT, MOVED_FROZEN, MISSING)}
    facts = {"frozen leaves": sum(map(len, found.values())), "frozen leaves that moved": len(found[MOVED_FROZEN])}
    if found[MISSING]:
        facts["frozen leaves that are missing"] = len(found[MISSING])
    return facts


def _order(path: str) -> Any:
    return natural(path.replace(".", "/")), path
