"""Permutations as data: which axes of which leaves a group permutes, and what a tree is after that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from transferjax._errors import SelectionError, TransferError, describe, nearest_hint
from transferjax._types import Model
from transferjax.tree import flatten, glob, paths

Entry = tuple[str, int] | tuple[str, int, tuple[int, int]]
Spec = Mapping[str, Sequence[Entry]]
"""``{group: [(glob of paths, axis), ...]}``; ``(glob, axis, (outer, inner))`` where units are not the whole axis."""

Permutations = Mapping[str, Any]
"""``{group: integers [units]}``: unit ``i`` of the result is unit ``permutation[i]`` of what is permuted."""

T = TypeVar("T")


class Place(NamedTuple):
    """Where a group's units lie: ``axis`` of the leaf at ``path`` is ``outer`` times all units of ``inner`` entries."""

    path: str
    axis: int
    outer: int
    inner: int


class Group(NamedTuple):
    """A group of a spec, matched with the leaves of a tree."""

    size: int
    places: tuple[Place, ...]


def as_tree(source: Any) -> Any:
    """The params of a Model with ``extra`` below them, where there is one; any other tree as it is."""
    if not isinstance(source, Model):
        return source
    if not jax.tree.leaves(source.extra):
        return source.params
    if not isinstance(source.params, Mapping) or "extra" in source.params:
        raise TransferError(
            "a Model whose params are no dict, or have an entry 'extra' of their own, cannot be told from its extra. "
            "Pass a tree of params instead of the Model."
        )
    return {**source.params, "extra": source.extra}


def as_source(tree: Any, source: T) -> T:
    """The inverse of :func:`as_tree`: the same kind as ``source``, with the leaves of ``tree``."""
    if not isinstance(source, Model):
        return tree
    if not jax.tree.leaves(source.extra):
        return source._replace(params=tree)
    return source._replace(params={name: tree[name] for name in source.params}, extra=tree["extra"])


def apply_permutations(params: T, spec: Spec, permutations: Permutations) -> T:
    """A network with its hidden units in another order: the same values at other places, bit for bit.

    Args:
      params: a tree, or a Model (params and extra); arrays of any dtype. A tree that holds statistics too is
        ``{**params, "extra": extra}``.
      spec: from :func:`permutation_spec`, or written by hand: ``{group: [(glob of paths, axis), ...]}``.
      permutations: ``{group: integers [units]}``; unit ``i`` of the result is unit ``permutation[i]`` of ``params``.
        Groups that are left out stay as they are.

    Returns:
      As ``params``.

    Raises:
      SelectionError: the spec does not fit the tree: a path that matches nothing, an axis out of range, units that
        differ in number within a group, or an axis that two entries permute; or a permutation's group is not in it.
      TransferError: a permutation is none, or has the wrong length.

    >>> params = {"dense1": np.array([[1.0, 2.0]]), "dense2": np.array([[3.0], [4.0]])}
    >>> spec = {"P0": [("dense1", 1), ("dense2", 0)]}
    >>> moved = apply_permutations(params, spec, {"P0": [1, 0]})
    >>> moved["dense1"].tolist(), moved["dense2"].tolist()
    ([[2.0, 1.0]], [[4.0], [3.0]])
    """
    tree = as_tree(params)
    flat, treedef = flatten(tree)
    groups = resolve(spec, dict(flat))
    checked = {name: _checked(name, order, groups) for name, order in permutations.items()}
    indices: dict[tuple[str, int], np.ndarray] = {}
    leaves = dict(flat)
    for name, order in checked.items():
        for place in groups[name].places:
            at = place.path, place.axis
            index = indices.setdefault(at, np.arange(leaves[place.path].shape[place.axis]))
            blocks = index.reshape(place.outer, len(order), place.inner)
            indices[at] = blocks[:, order].reshape(-1)
    for (path, axis), index in indices.items():
        leaves[path] = _take(leaves[path], index, axis)
    return as_source(jax.tree.unflatten(treedef, [leaves[path] for path, _ in flat]), params)


def _take(leaf: Any, index: np.ndarray, axis: int) -> Any:
    """Indexed on the host where that can be done: on a device each shape would be a program of its own."""
    if isinstance(leaf, Tracer) or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jnp.take(leaf, index, axis=axis)
    moved = np.take(np.asarray(leaf), index, axis=axis)
    if not isinstance(leaf, jax.Array):
        return moved
    return jax.device_put(moved, leaf.sharding if leaf.committed else None)


def _checked(name: str, order: Any, groups: Mapping[str, Group]) -> np.ndarray:
    if name not in groups:
        raise SelectionError(f"permutation '{name}' is of no group of the spec.{nearest_hint(name, groups)}")
    size, found = groups[name].size, np.asarray(order)
    if found.shape != (size,) or found.dtype.kind not in "iu" or not np.array_equal(np.sort(found), np.arange(size)):
        raise TransferError(
            f"permutation '{name}' is {describe(found)}. Expected the numbers 0 to {size - 1}, each once: "
            f"its group has {size} units."
        )
    return found


def resolve(spec: Spec, leaves: Mapping[str, Any]) -> dict[str, Group]:
    """The groups of a spec with every glob replaced by the leaves that it matches.

    Args:
      spec: the spec.
      leaves: ``{path: leaf}``, arrays or shapes.

    Returns:
      ``{group: Group}``, in the order of the spec.

    Raises:
      SelectionError: see :func:`apply_permutations`.

    >>> leaves = {"dense1": np.ones((4, 8)), "dense2": np.ones((8, 3))}
    >>> resolve({"P0": [("dense1", 1), ("dense2", 0)]}, leaves)["P0"].size
    8
    """
    if not isinstance(spec, Mapping) or not spec or not all(spec.values()):
        raise SelectionError(
            "the spec names no group, or one without entries. Expected {group: [(path, axis), ...]}, for example "
            "{'P0': [('dense1/kernel', 1), ('dense1/bias', 0), ('dense2/kernel', 0)]}."
        )
    groups = {}
    for name, entries in spec.items():
        found = [(place, size) for entry in entries for place, size in _places(name, entry, leaves)]
        first, units = found[0]
        for place, size in found:
            if size != units:
                raise SelectionError(
                    f"group '{name}' has {units} units in axis {first.axis} of '{first.path}' and {size} in axis "
                    f"{place.axis} of '{place.path}'. Expected one number of units in every entry of a group."
                )
        groups[name] = Group(units, tuple(place for place, _ in found))
    _check_apart(groups)
    return groups


def _places(name: str, entry: Entry, leaves: Mapping[str, Any]) -> list[tuple[Place, int]]:
    """The places of one entry, and how many units each has."""
    match entry:
        case [str(pattern), int(axis)]:
            outer, inner = 1, 1
        case [str(pattern), int(axis), [int(outer), int(inner)]] if outer > 0 and inner > 0:
            pass
        case _:
            raise SelectionError(
                f"group '{name}' has the entry {entry!r}. Expected (path, axis), or (path, axis, (outer, inner)) with "
                "outer and inner above 0."
            )
    chosen = glob(pattern)
    matched = [pattern] if pattern in leaves else [path for path in leaves if chosen(path)]
    if not matched:
        hint = " Statistics are there in a Model, or in {**params, 'extra': extra}." * pattern.startswith("extra/")
        raise SelectionError(
            f"group '{name}': path '{pattern}' matched none of {len(leaves)} leaves."
            f"{nearest_hint(pattern, leaves)}{hint}"
        )
    return [_place(name, path, axis, outer, inner, leaves[path]) for path in matched]


def _place(name: str, path: str, axis: int, outer: int, inner: int, leaf: Any) -> tuple[Place, int]:
    shape = tuple(np.shape(leaf))
    if not -len(shape) <= axis < len(shape):
        raise SelectionError(
            f"group '{name}': axis {axis} is out of range for '{path}', which is {describe(leaf)}. "
            f"Expected an axis from 0 to {len(shape) - 1}."
        )
    axis %= len(shape)
    if shape[axis] % (outer * inner):
        raise SelectionError(
            f"group '{name}': axis {axis} of '{path}' has {shape[axis]} entries, which ({outer}, {inner}) does not "
            "divide. Expected (outer, inner) whose product divides the axis."
        )
    return Place(path, axis, outer, inner), shape[axis] // (outer * inner)


def _check_apart(groups: Mapping[str, Group]) -> None:
    """No two entries move the same units; else the order in which they are applied would matter."""
    seen: dict[tuple[str, int], list[tuple[str, int, int]]] = {}
    for name, group in groups.items():
        for place in group.places:
            span = place.inner, place.inner * group.size
            for other, low, high in seen.setdefault((place.path, place.axis), []):
                if span[0] % high and low % span[1]:  # neither lies within one unit of the other
                    raise SelectionError(
                        f"axis {place.axis} of '{place.path}' is permuted by '{other}' and by '{name}'. "
                        "Expected one entry per axis, or parts of it that lie within each other."
                    )
            seen[place.path, place.axis].append((name, *span))


def leaves_of(tree: Any) -> dict[str, Any]:
    """Every leaf of a tree or Model by its path.

    >>> leaves_of({"dense": {"bias": 1.0}})
    {'dense/bias': 1.0}
    """
    return paths(as_tree(tree))
