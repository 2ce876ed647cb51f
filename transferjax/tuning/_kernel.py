"""What adapters ask of a kernel, and what they share."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import SelectionError, describe, is_whole
from transferjax._types import is_hole
from transferjax.tree import Selector, as_selector, flatten

FORMS = {2: "[in, out]", 4: "[h, w, in, out]"}
HEADS = ("query", "key", "value", "out")


def all_linear(head: Selector | str) -> Selector:
    """Selects the kernels of all dense layers but the output layer.

    A dense layer's kernel is a floating-point leaf called ``kernel`` with two axes, ``[in, out]``, or with three, one
    of them heads, in a module called ``query``, ``key``, ``value`` or ``out``. Convolutions (more axes), embedding
    tables (called ``embedding``) and the stacked layers of a scanned model are not selected: add them with ``|``.

    Args:
      head: the output layer, which is left out: a ``Selector`` or a glob. A tree does not say which layer is the last
        one, so there is no default.

    Returns:
      A ``Selector``.

    Raises:
      SelectionError: ``head`` is no selector.

    >>> import jax.numpy as jnp
    >>> params = {"fc": {"kernel": jnp.ones((4, 4))}, "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
    >>> from transferjax.tree import matches
    >>> matches(params, all_linear("head/**"))
    ['fc/kernel']
    """
    return Selector("dense kernels", _is_dense_kernel) & ~as_selector(head)


def _is_dense_kernel(path: str, leaf: Any) -> bool:
    *_, module, name = ("", *path.split("/"))
    axes = len(getattr(leaf, "shape", ()))
    return name == "kernel" and is_float(leaf) and (axes == 2 or (axes == 3 and module in HEADS))


def is_float(leaf: Any) -> bool:
    """Whether a leaf is a floating-point array.

    >>> import numpy as np
    >>> is_float(np.ones(2)), is_float(np.ones(2, int)), is_float(1.0)
    (True, False, False)
    """
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def positions(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """``([(path, leaf), ...], treedef)``, where a leaf is an array, a ``Hole``, or what stands for an array.

    >>> from transferjax._types import Hole
    >>> positions({"head": 1.0, "stem": Hole()})[0]
    [('head', 1.0), ('stem', Hole)]
    """
    from transferjax.program import is_lifted

    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: is_hole(x) or is_lifted(x))
    numbered, _ = flatten(jax.tree.unflatten(treedef, range(len(leaves))))
    return [(path, leaves[number]) for path, number in numbered], treedef


def widths(name: str, path: str, leaf: Any, axes: tuple[int, ...] = (2, 4)) -> tuple[tuple[int, ...], int]:
    """``(all axes but the last, the last)`` of a kernel; ``name`` is the adapter that asks.

    Raises:
      SelectionError: the leaf is no floating-point kernel with one of these numbers of axes.

    >>> import jax.numpy as jnp
    >>> widths("dora", "fc/kernel", jnp.ones((3, 2)))
    ((3,), 2)
    """
    shape = tuple(int(size) for size in getattr(leaf, "shape", ()))
    if len(shape) not in axes or not is_float(leaf):
        forms = " or ".join(FORMS[number] for number in axes)
        raise SelectionError(
            f"{name}() expects floating-point kernels {forms}; '{path}' is {describe(leaf)}. "
            "Narrow the selector, for example to '**/kernel'."
        )
    return shape[:-1], shape[-1]


def check_whole(name: str, argument: str, value: Any) -> None:
    """Whether an argument is a whole number of at least 1.

    Raises:
      SelectionError: it is not.

    >>> check_whole("dora", "rank", 4)
    """
    if not is_whole(value):
        raise SelectionError(f"{name}() expects {argument} to be a whole number of at least 1, got {value!r}.")


def check_rank(name: str, path: str, leaf: Any, rank: int, limit: int, what: str) -> None:
    """Whether a rank fits a kernel.

    Raises:
      SelectionError: it is above ``limit``.

    >>> import jax.numpy as jnp
    >>> check_rank("dora", "fc/kernel", jnp.ones((3, 2)), 2, 2, "the smaller of its widths")
    """
    if rank > limit:
        raise SelectionError(
            f"{name}() got rank {rank} for the kernel '{path}' {describe(leaf)}: expected at most {limit}, {what}."
        )


def low_rank(name: str, key: jax.Array, path: str, leaf: Any, rank: int) -> tuple[jax.Array, jax.Array]:
    """``A`` (``[..., in, r]``, Kaiming-uniform with a = sqrt 5) and ``B`` (``[r, out]``, zeros) for a kernel.

    Raises:
      SelectionError: the leaf is no kernel, or the rank exceeds its widths.

    >>> import jax, jax.numpy as jnp
    >>> a, b = low_rank("dora", jax.random.key(0), "fc/kernel", jnp.ones((3, 4)), 2)
    >>> a.shape, b.shape
    ((3, 2), (2, 4))
    """
    inner, out = widths(name, path, leaf)
    fan_in = math.prod(inner)
    check_rank(name, path, leaf, rank, min(fan_in, out), "the smaller of its input and output widths")
    return kaiming(key, (*inner, rank), fan_in), jnp.zeros((rank, out), jnp.float32)


def kaiming(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Kaiming-uniform with a = sqrt 5: uniform within ``1 / sqrt(fan_in)``.

    >>> import jax
    >>> kaiming(jax.random.key(0), (4, 2), 4).shape
    (4, 2)
    """
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def strength(name: str, rank: int, alpha: Any, rank_stabilised: bool = False) -> Any:
    """``alpha / r``, or ``alpha / sqrt(r)``; ``alpha`` is ``r`` when it is ``None``. It may be an array.

    Raises:
      SelectionError: ``alpha`` is no number above 0.

    >>> strength("dora", 4, None), strength("dora", 4, 8.0), strength("dora", 4, 8.0, True)
    (1.0, 2.0, 4.0)
    """
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and alpha > 0
    if alpha is not None and not number and getattr(alpha, "shape", None) != ():
        raise SelectionError(f"{name}() expects alpha as a number above 0, or None for the rank; got {alpha!r}.")
    return (rank if alpha is None else alpha) / (math.sqrt(rank) if rank_stabilised else rank)
