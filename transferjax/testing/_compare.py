"""Comparing trees leaf by leaf, and saying which law broke and where."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import LawError, describe
from transferjax._types import is_hole
from transferjax.tree import flatten, natural


def broken(law: str, detail: str, path: str | None = None, cause: BaseException | None = None) -> NoReturn:
    """Raises ``LawError``: which law, at which path, what came."""
    place = "" if path is None else f" at '{path}'"
    raise LawError(f"the law '{law}' is broken{place}: {detail}") from cause


def require_same(
    law: str, expected: Any, found: Any, *, rtol: float = 0.0, atol: float = 0.0, promoted: bool = False
) -> None:
    """Two trees have one outline and equal leaves: bit for bit, or within a tolerance.

    Args:
      law: how the error calls what is broken.
      expected: a tree; leaves may be abstract, which compares shapes and dtypes only.
      found: a tree.
      rtol: relative tolerance.
      atol: absolute tolerance.
      promoted: whether a leaf of ``found`` may have a dtype to which that of ``expected`` promotes.

    Raises:
      LawError: they differ; the first path is named.
    """
    flat, treedef = flatten(expected, holes=True)
    flat_found, treedef_found = flatten(found, holes=True)
    if treedef != treedef_found:
        differing = sorted({p for p, _ in flat} ^ {p for p, _ in flat_found}, key=natural)
        detail = "only one of the two trees has this path." if differing else "their containers differ."
        broken(law, detail, differing[0] if differing else None)
    for (path, a), (_, b) in zip(flat, flat_found, strict=True):
        problem = difference(a, b, rtol, atol, promoted)
        if problem:
            broken(law, problem, path)


def difference(a: Any, b: Any, rtol: float = 0.0, atol: float = 0.0, promoted: bool = False) -> str:
    """How leaf ``b`` differs from the expected leaf ``a``; ``""`` when it does not."""
    if is_hole(a) or is_hole(b):
        return "" if is_hole(a) and is_hole(b) else f"expected {describe(a)}, got {describe(b)}."
    if not _is_numeric(a) or not _is_numeric(b):
        return "" if a is b or (type(a) is type(b) and a == b) else f"expected {describe(a)}, got {describe(b)}."
    if np.shape(a) != np.shape(b) or not _same_dtype(a, b, promoted):
        return f"expected {_described(a)}, got {_described(b)}."
    if isinstance(a, jax.ShapeDtypeStruct) or isinstance(b, jax.ShapeDtypeStruct):
        return ""
    x, y = _host(a), _host(b)
    if not rtol and not atol and x.dtype == y.dtype:
        return "" if x.tobytes() == y.tobytes() else f"{_described(a)} differs{_by(x, y)}; expected the same bits."
    if np.allclose(y.astype(np.float64), x.astype(np.float64), rtol, atol, equal_nan=True):
        return ""
    return f"{_described(a)} differs{_by(x, y)}; expected at most {atol:g} + {rtol:g} times the value."


def deleted(tree: Any) -> str | None:
    """The path of the first leaf whose buffer was donated, or ``None``."""
    for path, leaf in flatten(tree)[0]:
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            return path
    return None


def _is_numeric(leaf: Any) -> bool:
    return isinstance(leaf, (bool, int, float, complex)) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype)


def _described(leaf: Any) -> str:
    return f"{tuple(np.shape(leaf))} {_dtype(leaf)}"


def _same_dtype(a: Any, b: Any, promoted: bool) -> bool:
    if not hasattr(a, "dtype") or not hasattr(b, "dtype") or a.dtype == b.dtype:
        return True  # a Python number has no dtype of its own
    if not promoted or not jnp.issubdtype(a.dtype, jnp.number):
        return False
    return jnp.promote_types(a.dtype, b.dtype) == b.dtype


def _host(leaf: Any) -> np.ndarray:
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf, _dtype(leaf))
    return np.ascontiguousarray(np.asarray(leaf))


def _by(x: np.ndarray, y: np.ndarray) -> str:
    if not x.size or x.dtype.kind in "bSUO":
        return ""
    gap = np.abs(y.astype(np.float64) - x.astype(np.float64))
    return f" by up to {np.nanmax(gap):.3g}" if not np.all(np.isnan(gap)) else " (NaN)"
