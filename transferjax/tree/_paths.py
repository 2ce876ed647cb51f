"""Paths: the one name of a leaf, the same for NNX, Linen, equinox, dataclass and dict trees."""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

import jax

from transferjax._errors import SelectionError
from transferjax._types import is_hole

SEPARATOR = "/"


def _is_variable(value: Any) -> bool:
    """Whether ``value`` is an ``nnx.Variable``, found without importing flax."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Variable)


def flatten(tree: Any, *, holes: bool = False) -> tuple[list[tuple[str, Any]], Any]:
    """``([(path, leaf), ...], treedef)`` in the order of ``jax.tree.leaves``.

    Args:
      tree: any pytree.
      holes: whether a ``Hole`` counts as a leaf.

    Raises:
      SelectionError: two leaves have the same path.

    >>> flatten({"head": {"kernel": 1.0}, "stem": 2.0})[0]
    [('head/kernel', 1.0), ('stem', 2.0)]
    """
    is_leaf = is_hole if holes else None
    flat, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
    # A Variable is a node whose only child is reached by `.value`. That one key is no part of the name,
    # while a field `value` of an equinox module or dataclass is: so the node is looked at, not the key.
    names: list[str] = []
    for outer, value in jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: _is_variable(x) or (holes and is_hole(x))
    )[0]:
        if _is_variable(value):
            inner = jax.tree_util.tree_flatten_with_path(value, is_leaf=is_leaf)[0]
            names.extend(path_string((*outer, *keys[1:])) for keys, _ in inner)
        else:
            names.append(path_string(outer))
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SelectionError(
                f"two leaves have the path '{name}'. Expected one leaf per path; a dict key that contains "
                f"'{SEPARATOR}' collides with a nested one: rename one of the keys."
            )
        seen.add(name)
    return list(zip(names, flat, strict=True)), treedef


def path_string(keys: tuple[Any, ...]) -> str:
    """A JAX key path as ``"blocks/0/kernel"``.

    >>> import jax
    >>> path_string((jax.tree_util.DictKey("blocks"), jax.tree_util.SequenceKey(0)))
    'blocks/0'
    """
    return jax.tree_util.keystr(keys, simple=True, separator=SEPARATOR)


def natural(path: str) -> tuple[Any, ...]:
    """A sort key in which numbers sort as numbers.

    >>> sorted(["blocks/10/kernel", "blocks/2/kernel"], key=natural)
    ['blocks/2/kernel', 'blocks/10/kernel']
    """
    return tuple(map(_segment_key, path.split(SEPARATOR)))


@functools.lru_cache(4096)
def _segment_key(segment: str) -> tuple[Any, ...]:
    parts = filter(None, re.split(r"(\d+)", segment))
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)


def paths(tree: Any) -> dict[str, Any]:
    """Every leaf of a tree by its path, in natural order.

    Args:
      tree: any pytree: an NNX module or state, Linen variables, an equinox module, dicts, lists, dataclasses.

    Returns:
      ``{path: leaf}``; ``blocks/2`` comes before ``blocks/10``.

    Raises:
      SelectionError: two leaves have the same path.

    >>> paths({"head": {"kernel": 1.0, "bias": 2.0}, "blocks": [3.0, 4.0]})
    {'blocks/0': 3.0, 'blocks/1': 4.0, 'head/bias': 2.0, 'head/kernel': 1.0}
    """
    flat, _ = flatten(tree)
    return dict(sorted(flat, key=lambda item: natural(item[0])))


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts with string keys from ``{path: leaf}``; the inverse of :func:`paths` on such dicts.

    Raises:
      SelectionError: one path is a prefix of another.

    >>> nest({"head/bias": 1.0, "head/kernel": 2.0})
    {'head': {'bias': 1.0, 'kernel': 2.0}}
    """
    out: dict[str, Any] = {}
    inner = {id(out)}
    for path, leaf in flat.items():
        node, segments = out, path.split(SEPARATOR)
        for segment in segments[:-1]:
            node = node.setdefault(segment, {})
            if not isinstance(node, dict) or (node and id(node) not in inner):
                raise SelectionError(f"'{path}' lies below another leaf. Expected leaves only at the ends of paths.")
            inner.add(id(node))
        if segments[-1] in node:
            raise SelectionError(f"'{path}' is a leaf and a prefix of another path, or comes twice.")
        node[segments[-1]] = leaf
    return out
