"""Units of a layer: new ones as copies of old ones, along the axes of the leaves that make and that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import PlanError, describe
from transferjax._types import Model
from transferjax.surgery._checks import check_key
from transferjax.surgery._interpolation import module_of, widened
from transferjax.surgery._resize import whole
from transferjax.tree import Selector, as_selector, flatten, matches

Axes = Mapping[Any, Sequence[Any]]
Numbers = Sequence[Any] | np.ndarray
KINDS = ("outgoing", "incoming")
LAYOUTS = ("blocks", "interleaved")


class Axis(NamedTuple):
    """The axis of a leaf along which units lie, and how."""

    axis: int
    kind: str
    layout: str | None
    repeats: int  # entries of the axis per unit

    def spread(self, units: np.ndarray, count: int) -> np.ndarray:
        """Numbers of units as numbers of entries of the axis, of ``count`` units in all."""
        if self.layout == "interleaved":
            return (np.arange(self.repeats)[:, None] * count + units).reshape(-1)
        return (units[:, None] * self.repeats + np.arange(self.repeats)).reshape(-1)

    def per_entry(self, values: np.ndarray) -> np.ndarray:
        """One value per unit as one per entry of the axis."""
        return np.tile(values, self.repeats) if self.layout == "interleaved" else np.repeat(values, self.repeats)


def map_units(tree: Any, axes: Axes, units: Numbers, *, count: int | None = None, shares: Numbers | None = None) -> Any:
    """The tree of a network in which unit ``j`` of a layer is a copy of unit ``units[j]``; widens and narrows alike.

    The leaves that make the units are copied along their axis; the leaves that read them are copied too and
    multiplied by the share of each copy, so that copies together say what the one unit said. When every unit has a
    copy, the function is preserved up to rounding wherever units are read by sums (dense layers, convolutions, the
    heads of an attention). A normalisation *over* the units (LayerNorm, RMSNorm) is preserved only when all units
    have the same number of copies; one per unit (BatchNorm: scale, bias, mean and variance are outgoing) always is.
    A leaf that makes and reads the units at once, as an embedding tied to the output layer, cannot be preserved.

    Args:
      tree: any pytree of arrays; ``{"params": ..., "extra": ...}`` holds both.
      axes: ``{selector: (axis, kind)}`` with the kind ``"outgoing"`` of leaves that make the units (output axis of a
        kernel, its bias, a normalisation's leaves) or ``"incoming"`` of leaves that read them. Where the axis holds
        several entries per unit, ``(axis, kind, layout)`` with ``"blocks"`` when those of a unit stand together
        (heads of ``[d, heads * size]``) or ``"interleaved"`` when the units vary fastest (a dense layer that reads a
        flattened [h, w, channels]).
      units: for each new unit the old one; the length is the new width.
      count: number of old units; needed only when every axis has a layout.
      shares: of each new unit in what reads it; those of one old unit sum to 1. Default: equal shares.

    Returns:
      A tree of the same structure, numpy or JAX as it came and in its dtypes; only the shapes along ``axes`` change.

    Raises:
      PlanError: an axis, kind, layout, unit or share does not fit, a leaf is selected twice or abstract, or a leaf
        that reads units with shares holds integers.
      SelectionError: a selector matches nothing.

    >>> import numpy as np
    >>> tree = {"a": np.array([[1.0, 2.0]]), "b": np.array([[10.0], [20.0]])}
    >>> grown = map_units(tree, {"a": (1, "outgoing"), "b": (0, "incoming")}, [0, 1, 1])
    >>> grown["a"].tolist(), grown["b"].tolist()
    ([[1.0, 2.0, 2.0]], [[10.0], [10.0], [10.0]])

    Source: T. Chen et al., "Net2Net", 2016; for transformers C. Chen et al., "bert2BERT", 2022 (FPI).
    """
    flat, treedef = flatten(tree)
    found, count = resolved(tree, axes, count)
    chosen = checked_units(units, count)
    parts = _shares(shares, chosen, count)
    out = []
    for path, leaf in flat:
        if path in found:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise PlanError(
                    f"'{path}' is a jax.ShapeDtypeStruct, which holds no units. Pass arrays; for shapes only write "
                    "jax.eval_shape(lambda tree: widen(tree, axes, width), tree)."
                )
            at = found[path]
            made = module_of(leaf).take(leaf, at.spread(chosen, count), axis=at.axis)
            if at.kind == "incoming" and not np.all(parts == 1.0):
                _check_floats(path, leaf)
                shape = [-1 if axis == at.axis else 1 for axis in range(leaf.ndim)]
                wide = widened(made)
                made = (wide * at.per_entry(parts).reshape(shape).astype(wide.dtype)).astype(leaf.dtype)
            leaf = made
        out.append(leaf)
    return jax.tree.unflatten(treedef, out)


def unit_map(old: int, new: int, key: Any = None) -> np.ndarray:
    """For each of ``new`` units the old one that it copies; the first ``old`` copy themselves.

    Args:
      old: number of units.
      new: number of units to make, at least ``old``.
      key: PRNG key that draws the units to copy, as Net2Net does; default: in turn, so that the numbers of copies
        differ by at most one, and are equal when ``new`` is a multiple of ``old``.

    Returns:
      int64 [new].

    Raises:
      PlanError: ``new`` is smaller, or ``key`` is no PRNG key.

    >>> unit_map(3, 7).tolist()
    [0, 1, 2, 0, 1, 2, 0]
    """
    if not (whole(old) and whole(new) and 1 <= old <= new):
        raise PlanError(f"{old!r} units do not grow to {new!r}. Expected more; write narrow(...) for fewer.")
    check_key(key)
    if key is None:
        return np.arange(new) % old
    drawn = np.asarray(jax.random.randint(key, (new - old,), 0, old), dtype=np.int64)
    return np.concatenate([np.arange(old), drawn])


def resolved(tree: Any, axes: Axes, count: int | None) -> tuple[dict[str, Axis], int]:
    """The axis of units of each selected leaf, and the number of units."""
    if isinstance(tree, Model):
        raise PlanError(
            "a Model came; expected its arrays. Write widen({'params': model.params, 'extra': model.extra}, ...), with "
            "'params/...' and 'extra/...' in the mapping of axes."
        )
    if not isinstance(axes, Mapping) or not axes:
        came = "empty" if isinstance(axes, Mapping) else describe(axes)
        raise PlanError(
            f"the mapping of axes is {came}; expected {{selector: (axis, 'outgoing' or 'incoming')}} with an entry for "
            "each kernel, bias and normalisation that makes or reads the units."
        )
    flat = dict(flatten(tree)[0])
    entries: dict[str, tuple[Selector, int, str, str | None]] = {}
    for key, entry in axes.items():
        selector = as_selector(key)
        for path in matches(tree, selector):
            if path in entries:
                raise PlanError(
                    f"'{path}' is selected by {entries[path][0]!r} and by {selector!r}. Expected one axis per leaf and "
                    "call: narrow one of them; for a second axis call again."
                )
            entries[path] = (selector, *_entry(entry, selector, path, flat[path]))
    plain = {path: flat[path].shape[entry[1]] for path, entry in entries.items() if entry[3] is None}
    if count is None and not plain:
        raise PlanError("every axis has a layout, so the number of units is not known. Write count= with it.")
    total = next(iter(plain.values())) if count is None else count
    wrong = next((path for path, size in plain.items() if size != total), None)
    if wrong is not None:
        other = "count" if count is not None else f"'{next(iter(plain))}'"
        raise PlanError(
            f"'{wrong}' has {plain[wrong]} units along its axis, {other} says {total}. Where an axis holds several "
            "entries per unit, write (axis, kind, 'blocks') or (axis, kind, 'interleaved')."
        )
    found = {}
    for path, (_, axis, kind, layout) in entries.items():
        size = flat[path].shape[axis]
        if not total or size % total:
            raise PlanError(f"'{path}' has {size} entries along axis {axis}; expected a multiple of the {total} units.")
        found[path] = Axis(axis, kind, layout, size // total)
    return found, total


def _entry(entry: Any, selector: Selector, path: str, leaf: Any) -> tuple[int, str, str | None]:
    axis, kind, layout = (*entry, None)[:3] if isinstance(entry, (tuple, list)) and len(entry) in (2, 3) else [None] * 3
    if not whole(axis) or kind not in KINDS or layout not in (None, *LAYOUTS):
        raise PlanError(
            f"the axis of {selector!r} is {entry!r}; expected (axis, 'outgoing' or 'incoming'), with 'blocks' or "
            "'interleaved' as third where the axis holds several entries per unit."
        )
    shape = getattr(leaf, "shape", ())
    if not -len(shape) <= axis < len(shape):
        raise PlanError(f"'{path}' has no axis {axis}: it is {describe(leaf)}.")
    return int(axis) % len(shape), kind, layout


def checked_units(units: Any, count: int) -> np.ndarray:
    chosen = np.asarray(units)
    if chosen.ndim != 1 or not chosen.size or not np.issubdtype(chosen.dtype, np.integer):
        raise PlanError("units are malformed. Expected for each new unit the number of an old one.")
    if chosen.min() < 0 or chosen.max() >= count:
        raise PlanError(f"units go from {chosen.min()} to {chosen.max()}; expected 0 to {count - 1}.")
    return chosen.astype(np.int64)


def _check_floats(path: str, leaf: Any) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise PlanError(
            f"'{path}' is {describe(leaf)} and reads the units, so copies are to have a share of its numbers each; "
            "expected floats. Convert it first: leaf.astype('float32')."
        )


def _shares(shares: Any, units: np.ndarray, count: int) -> np.ndarray:
    if shares is None:
        return 1.0 / np.bincount(units, minlength=count)[units]
    parts = np.asarray(shares, np.float64)
    if parts.shape != units.shape:
        raise PlanError(f"shares have the shape {parts.shape}; expected one per new unit, {units.shape}.")
    sums = np.bincount(units, parts, minlength=count)[units]
    if not np.allclose(sums, 1.0, rtol=0, atol=1e-6):
        raise PlanError("shares of the copies of one unit do not sum to 1. Divide each by the sum over its unit.")
    return parts
