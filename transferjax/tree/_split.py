"""Split a tree into two with holes, and fill them again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import SelectionError, describe
from transferjax._report import Report
from transferjax._types import Hole, Model, is_hole
from transferjax.tree._paths import flatten, natural
from transferjax.tree._select import Selector, matches


def split(tree: Any, selector: Selector | str) -> tuple[Any, Any]:
    """Two trees of the same outline: the selected leaves, and the rest; a ``Hole`` where a leaf is missing.

    The arrays are shared, not copied.

    Args:
      tree: any pytree.
      selector: a ``Selector`` or a glob.

    Returns:
      ``(selected, rest)`` with ``fill(selected, rest) == tree``.

    Raises:
      SelectionError: the selector matches nothing.

    >>> split({"head": 1.0, "stem": 2.0}, "head")
    ({'head': 1.0, 'stem': Hole}, {'head': Hole, 'stem': 2.0})
    """
    chosen = set(matches(tree, selector))
    flat, treedef = flatten(tree)
    return (
        jax.tree.unflatten(treedef, [leaf if path in chosen else Hole() for path, leaf in flat]),
        jax.tree.unflatten(treedef, [Hole() if path in chosen else leaf for path, leaf in flat]),
    )


def fill(a: Any, b: Any) -> Any:
    """One tree from two: each leaf from the side that has it; the inverse of :func:`split`.

    Args:
      a: a tree with holes.
      b: a tree of the same outline.

    Returns:
      The tree; where both sides have a ``Hole``, it stays.

    Raises:
      SelectionError: the outlines differ, or both sides have a leaf at the same path.

    >>> fill(*split({"head": 1.0, "stem": 2.0}, "head"))
    {'head': 1.0, 'stem': 2.0}
    """
    flat_a, treedef = flatten(a, holes=True)
    flat_b, treedef_b = flatten(b, holes=True)
    if treedef != treedef_b:
        only = sorted({p for p, _ in flat_a} ^ {p for p, _ in flat_b}, key=natural)
        where = f"the first path that only one of them has is '{only[0]}'" if only else "their containers differ"
        raise SelectionError(f"fill() expects two trees of one outline; {where}. Both must come from one split().")
    out = []
    for (path, x), (_, y) in zip(flat_a, flat_b, strict=True):
        if not is_hole(x) and not is_hole(y):
            raise SelectionError(
                f"fill() found a leaf on both sides at '{path}': {describe(x)} and {describe(y)}. "
                "Expected a Hole on one side."
            )
        out.append(y if is_hole(x) else x)
    return jax.tree.unflatten(treedef, out)


def copy(tree: Any) -> Any:
    """The same tree with every array copied, so that donating one leaves the other alone.

    Args:
      tree: any pytree; numpy arrays become JAX arrays.

    Returns:
      A tree of new buffers; leaves that are no arrays are kept.

    >>> import jax.numpy as jnp
    >>> kept = copy({"bias": jnp.zeros(2)})
    """

    def one(leaf):
        if isinstance(leaf, jax.Array):
            return leaf.copy()
        return jnp.array(leaf, copy=True) if hasattr(leaf, "__array__") else leaf

    return jax.tree.map(one, tree)


def summary(tree: Any, labels: Any = None) -> Report:
    """Shapes, dtypes, sizes and labels of every leaf.

    Args:
      tree: any pytree of arrays or ``jax.ShapeDtypeStruct``; of a ``Model`` the params, and the extra below them.
      labels: of the tree, or of a Model's params: a pytree of ``str`` from ``label``, or of ``bool`` from
        ``mask``.

    Returns:
      A ``Report``: one row per leaf in natural order; totals (parameters, bytes, and parameters per label).

    Raises:
      SelectionError: ``labels`` has another outline than ``tree``.

    >>> import numpy as np
    >>> summary({"head": np.zeros((2, 3), np.float32)}).metadata["parameters"]
    6
    """
    if isinstance(tree, Model):
        return _with_extra(summary(tree.params, labels), summary(tree.extra))
    flat, treedef = flatten(tree)
    names: list[Any] = [None] * len(flat)
    if labels is not None:
        names, found = jax.tree.flatten(labels)
        if found != treedef:
            raise SelectionError("summary() expects labels of the tree's outline: make them with label() or mask().")
    rows, per_label = [], {}
    for (path, leaf), name in zip(flat, names, strict=True):
        shape, dtype = tuple(getattr(leaf, "shape", ())), getattr(leaf, "dtype", type(leaf).__name__)
        count = int(getattr(leaf, "size", 1))
        rows.append((path, str(shape), str(dtype), count, count * getattr(dtype, "itemsize", 0), name))
        per_label[str(name)] = per_label.get(str(name), 0) + count
    rows.sort(key=lambda row: natural(row[0]))
    facts = {"leaves": len(rows), "parameters": sum(r[3] for r in rows), "bytes": sum(r[4] for r in rows)}
    columns = ("path", "shape", "dtype", "parameters", "bytes", "label")
    if labels is None:
        return Report("Parameters", columns[:5], tuple(r[:5] for r in rows), facts)
    return Report("Parameters", columns, tuple(rows), {**facts, **{f"label {k}": v for k, v in per_label.items()}})


def _with_extra(params: Report, extra: Report) -> Report:
    """The summary of a model: its params, then its extra as ``extra/<path>``; parameters are those of params only."""
    blank = (None,) * (len(params.columns) - len(extra.columns))
    rows = (*params.rows, *((f"extra/{row[0]}", *row[1:], *blank) for row in extra.rows))
    facts = {f"extra {name}": extra.metadata[name] for name in ("leaves", "bytes")}
    facts = {**params.metadata, **facts, "extra values": extra.metadata["parameters"]}
    return Report("Parameters and extra", params.columns, rows, facts)
