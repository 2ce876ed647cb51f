"""How an array of one shape becomes one of another, under a layout that holds for the whole file."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from transferjax.surgery._align_names import WEIGHT, is_embedding, read
from transferjax.surgery._ops import Op, Spec, castable

TORCH, SAME = "torch", "same"
LAYOUTS = (TORCH, SAME)
"""Kernels as in torch, (out, in, ...), or axis by axis as in the target."""

AXES = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
KERNELS = frozenset(("kernel", "weight", "weights", "w"))


class Leaf(NamedTuple):
    """A leaf of either side."""

    name: str
    spec: Spec


def is_kernel(source: Leaf, target: Leaf) -> bool:
    """Whether a leaf is the matrix or filter of a layer, which layouts turn, rather than rows, a scale or a token."""
    rank = len(source.spec.shape)
    came, to = read(source.name), read(target.name)
    if not 2 <= rank <= 5 or to.role != WEIGHT or to.said in ("embedding", "embeddings", "scale", "gamma"):
        return False
    if to.said == "kernel":
        return True
    if came.said not in KERNELS:
        return False
    return rank > 2 or not is_embedding(came.module)


def route(source: Leaf, target: Leaf, layout: str) -> tuple[Op, ...] | None:
    """The operations that make the target's shape under a layout; ``None`` when there are none."""
    if not _castable(source.spec.dtype, target.spec.dtype):
        return None
    turn = layout == TORCH and is_kernel(source, target)
    return _route(source.spec.shape, target.spec.shape, turn)


def parts(source: Leaf, targets: Sequence[Leaf], layout: str) -> tuple[int, tuple[int, ...]] | None:
    """The axis and the sizes by which a fused leaf is cut into several; ``None`` when it does not fit."""
    shape = source.spec.shape
    sizes = [math.prod(leaf.spec.shape) for leaf in targets]
    if not shape or math.prod(shape) != sum(sizes) or not sum(sizes):
        return None
    axis = len(shape) - 1 if len(shape) > 1 and layout == SAME and is_kernel(source, targets[0]) else 0
    cut = [size * shape[axis] / sum(sizes) for size in sizes]
    if any(n != int(n) for n in cut):
        return None
    for n, leaf in zip(cut, targets, strict=True):
        part = Spec((*shape[:axis], int(n), *shape[axis + 1 :]), source.spec.dtype)
        if route(Leaf(source.name, part), leaf, layout) is None:
            return None
    return axis, tuple(int(n) for n in cut)


def turned(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape of a kernel of the file with its axes in the target's order."""
    return tuple(shape[axis] for axis in AXES[len(shape)]) if layout == TORCH and len(shape) in AXES else shape


_castable = functools.cache(castable)


@functools.lru_cache(maxsize=4096)
def _route(came: tuple[int, ...], wanted: tuple[int, ...], turn: bool) -> tuple[Op, ...] | None:
    ops: list[Op] = []
    if turn:
        ops.append(("permute", AXES[len(came)]))
        came = tuple(came[axis] for axis in AXES[len(came)])
    if came == wanted:
        return tuple(ops)
    if math.prod(came) == math.prod(wanted) and (_grouped(came, wanted) or _grouped(wanted, came)):
        return (*ops, ("reshape", wanted))
    return None


def _grouped(fine: tuple[int, ...], coarse: tuple[int, ...]) -> bool:
    """Whether each axis of one shape is a run of neighbouring axes of the other; axes of size 1 aside."""
    left = [n for n in fine if n != 1]
    for size in (n for n in coarse if n != 1):
        product = 1
        while left and product < size:
            product *= left.pop(0)
        if product != size:
            return False
    return not left
