"""Trees that can be merged: alike in paths, shapes and dtypes; and one tree of many, leaf by leaf."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, describe, nearest_hint
from transferjax._types import Model
from transferjax.merging._leaf import Leaf, is_traced
from transferjax.tree import flatten


def numbered(method: str, models: Any, least: int = 1, what: str = "model") -> dict[str, Any]:
    """Trees by the names that errors call them: ``model 0``, ``model 1`` and so on.

    Raises:
      DataError: it is no list, or too short.
    """
    if not isinstance(models, Sequence) or isinstance(models, Model | str):
        raise DataError(f"{method}() expects a list of trees as {what}s, got {describe(models)}.")
    if len(models) < least:
        trees = "tree" if least == 1 else "trees"
        raise DataError(f"{method}() expects at least {least} {trees} as {what}s, got {len(models)}.")
    return {f"{what} {number}": tree for number, tree in enumerate(models)}


def leaves(method: str, name: str, tree: Any, *, empty: bool = False) -> dict[str, Any]:
    """The leaves of a tree by path.

    Args:
      empty: whether there may be none.

    Raises:
      DataError: a ``Model`` or an opened checkpoint was given, or there is no leaf, or one that is no array.
    """
    if isinstance(tree, Model):
        raise DataError(
            f"{method}() got a Model as {name}. Expected a tree of arrays: write model.params, or "
            "{'params': model.params, 'extra': model.extra}."
        )
    if hasattr(tree, "shapes") and callable(getattr(tree, "read", None)):
        raise DataError(
            f"{method}() got an opened checkpoint as {name}. Expected a tree of arrays: write "
            f"leafwise({method}, ...) to merge leaf by leaf, or transferjax.io.load(path) to read all of it."
        )
    if isinstance(tree, str | os.PathLike):
        raise DataError(
            f"{method}() got {describe(tree)} as {name}. Expected a tree of arrays: transferjax.io.load(path), or "
            f"leafwise({method}, ...) with transferjax.io.open(path) to merge leaf by leaf."
        )
    found = dict(flatten(tree)[0])
    if not found and not empty:
        raise DataError(f"{method}() got a tree without leaves as {name}. Expected a tree of arrays.")
    for path, leaf in found.items():
        if _kind(leaf) is None:
            raise DataError(f"'{path}' is {describe(leaf)} in {name}. Expected arrays of real numbers or truth values.")
    return found


def check_alike(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ``DataError`` unless the leaves of all trees have the same paths, shapes and dtypes.

    Args:
      found: ``{name: {path: leaf}}``; anything with shape and dtype is a leaf.
    """
    first, *others = found
    for other in others:
        check_paths(first, found[first], other, found[other])
        for path, leaf in found[first].items():
            if _form(leaf) != _form(found[other][path]):
                raise DataError(
                    f"'{path}' is {describe(leaf)} in {first} and {describe(found[other][path])} in {other}. Expected "
                    "equal shapes and dtypes: move one into the other's form with transferjax.surgery.plan."
                )


def check_paths(first: str, expected: Mapping[str, Any], other: str, found: Mapping[str, Any]) -> None:
    """Raises ``DataError`` unless both have the same paths; the nearest one is named."""
    for path in expected:
        if path not in found:
            hint = nearest_hint(path, [p for p in found if p not in expected])
            raise DataError(f"{other} lacks '{path}', which {first} has. Expected trees of equal structure.{hint}")
    for path in found:
        if path not in expected:
            hint = nearest_hint(path, [p for p in expected if p not in found])
            raise DataError(f"{other} has '{path}', which {first} lacks. Expected trees of equal structure.{hint}")


def alike(method: str, trees: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The leaves of trees that can be merged, by name and path.

    Raises:
      DataError: the trees are not alike, or no trees of arrays.
    """
    found = {name: leaves(method, name, tree) for name, tree in trees.items()}
    check_alike(found)
    return found


def merged(method: str, trees: Mapping[str, Any], rule: Callable[[Leaf], Any], coefficients: Any = ()) -> Any:
    """One tree of several, leaf by leaf.

    Args:
      method: the public function's name, for errors.
      trees: by the names that errors call them; the first gives structure and dtypes of the result.
      rule: makes the array of a leaf of floats.
      coefficients: whatever else may be traced.

    Returns:
      A tree like the first; where that has numpy arrays there are numpy arrays, where JAX arrays JAX arrays.

    Raises:
      DataError: the trees are not alike, or leaves of integers or truth values are not equal.
    """
    found = alike(method, trees)
    traced = is_traced(found, coefficients)
    flat, treedef = flatten(next(iter(trees.values())))
    out = []
    for path, leaf in flat:
        arrays = {name: _array(tree[path]) for name, tree in found.items()}
        if _kind(leaf) == "float":
            out.append(_like(leaf, rule(Leaf(path, arrays, traced)), traced))
        else:
            _check_equal(path, arrays)
            out.append(leaf)
    return jax.tree.unflatten(treedef, out)


def is_float(leaf: Any) -> bool:
    """Whether a leaf is merged by number; others must be equal."""
    return _kind(leaf) == "float"


def _kind(leaf: Any) -> str | None:
    """``"float"``, ``"exact"`` (integers, truth values and PRNG keys), or ``None`` for what cannot be merged."""
    if isinstance(leaf, bool | int):
        return "exact"
    if isinstance(leaf, float):
        return "float"
    if isinstance(leaf, jax.ShapeDtypeStruct) or not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return None
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return "float"
    exact = (jnp.integer, jnp.bool_, jax.dtypes.prng_key)
    return "exact" if any(jnp.issubdtype(leaf.dtype, kind) for kind in exact) else None


def _form(leaf: Any) -> tuple[Any, ...]:
    return (tuple(leaf.shape), str(leaf.dtype)) if hasattr(leaf, "dtype") else (type(leaf).__name__,)


def _array(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype"):
        return np.asarray(leaf)
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _check_equal(path: str, arrays: Mapping[str, Any]) -> None:
    first, *others = arrays
    for other in others:
        one, two = arrays[first], arrays[other]
        if not is_traced(one, two) and not np.array_equal(np.asarray(one), np.asarray(two)):
            raise DataError(
                f"'{path}' {describe(arrays[first])} differs between {first} and {other}, and integers and truth "
                "values are not merged. Expected equal ones: give all trees those of one, or leave the leaf out."
            )


def _like(leaf: Any, result: Any, traced: bool) -> Any:
    """The result as the kind of object that the first tree has."""
    if traced or isinstance(leaf, np.ndarray):
        return result
    if isinstance(leaf, jax.Array):
        return jax.device_put(result, leaf.sharding if leaf.committed else None)
    return type(leaf)(result) if isinstance(leaf, float) else result[()]
