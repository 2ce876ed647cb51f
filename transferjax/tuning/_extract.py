"""A low-rank adapter from two sets of full weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import SelectionError, describe
from transferjax._report import Report
from transferjax._types import Hole, Params
from transferjax.tree import Selector, as_selector, flatten, matches, paths
from transferjax.tuning._kernel import check_rank, check_whole, widths


def extract_lora(base: Params, tuned: Params, selector: Selector | str, rank: int) -> tuple[Params, Report]:
    """The adapter of ``lora(selector, rank)`` that comes closest to what full fine-tuning changed.

    Each change ``tuned - base`` is cut to its ``rank`` largest singular values, half of each in ``lora_a`` and in
    ``lora_b``. No other adapter of that rank is closer in the Frobenius norm.

    Args:
      base: the weights before.
      tuned: the weights after: the same paths, shapes and dtypes.
      selector: kernels of shape ``[in, out]`` or ``[h, w, in, out]``.
      rank: of the adapter.

    Returns:
      ``(trainable, report)``: ``lora(selector, rank).merge(trainable, base)`` are the approximated weights. The report
      has a row per kernel: how large the change was relative to the kernel, and which part of its norm is not kept.
      Leaves that changed and are not selected are counted in its metadata.

    Raises:
      SelectionError: the trees differ, a selected leaf is no kernel, or the rank exceeds its dimensions.

    >>> import jax.numpy as jnp, transferjax as tj
    >>> base = {"fc": jnp.eye(3)}
    >>> trainable, report = extract_lora(base, {"fc": jnp.eye(3) + jnp.ones((3, 3))}, "fc", rank=1)
    >>> tj.lora("fc", rank=1).merge(trainable, base)["fc"].round(4).tolist()
    [[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]]
    >>> float(report.column("not kept")[0]) < 1e-6
    True

    Source: Eckart and Young, 1936; as LoRA extraction in common use.
    """
    check_whole("extract_lora", "rank", rank)
    selector = as_selector(selector)
    chosen = set(matches(base, selector))
    flat, treedef = flatten(base)
    after = paths(tuned)
    _check_same(dict(flat), after)
    out, rows, others = [], [], 0
    for path, leaf in flat:
        if path not in chosen:
            others += not np.array_equal(np.asarray(leaf), np.asarray(after[path]))
            out.append(Hole())
            continue
        inner, width = widths("extract_lora", path, leaf)
        check_rank("extract_lora", path, leaf, rank, min(math.prod(inner), width), "the smaller of its widths")
        weights, row = _cut(leaf, after[path], inner, rank)
        out.append(weights)
        rows.append((path, *row))
    facts = {"rank": rank, "changed leaves that are not selected": int(others)}
    report = Report("Extracted adapter", ("path", "relative change", "not kept"), tuple(rows), facts)
    return jax.tree.unflatten(treedef, out), report


def _cut(leaf: Any, after: Any, inner: tuple[int, ...], rank: int) -> tuple[dict[str, Any], tuple[float, float]]:
    """The two factors of one change, and how large the change and what is left of it are."""
    before = np.asarray(leaf, np.float64)
    change = (np.asarray(after, np.float64) - before).reshape(math.prod(inner), -1)
    left, values, right = np.linalg.svd(change, full_matrices=False)
    root = np.sqrt(values[:rank])
    weights = {
        "lora_a": jnp.asarray((left[:, :rank] * root).reshape(*inner, rank), jnp.float32),
        "lora_b": jnp.asarray(root[:, None] * right[:rank], jnp.float32),
    }
    size, kept = math.sqrt(np.sum(values**2)), math.sqrt(np.sum(values[rank:] ** 2))
    relative = size / max(float(np.linalg.norm(before)), 1e-30)
    return weights, (relative, kept / size if size else 0.0)


def _check_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for path in [*before, *after]:
        one, two = (describe(tree[path]) if path in tree else "no leaf" for tree in (before, after))
        if one != two:
            raise SelectionError(
                f"extract_lora() expects two versions of one tree; '{path}' is {one} in base and {two} in tuned."
            )
