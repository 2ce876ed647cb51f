"""The leaves of a plan one at a time, and of each only the part that is asked for where its operations allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from transferjax._errors import CheckpointError
from transferjax.io._boxes import Corner, block_shape, blocks, normalise
from transferjax.io._manifest import BLOCK
from transferjax.surgery import Move, Plan

Box = tuple[Corner, Corner]


def whole(checkpoint: Any, plan: Plan, move: Move, init: Any = None) -> Any:
    """The array of one target leaf, checked against the plan; only its sources are read.

    Args:
      init: ``path -> array`` for fresh leaves, as in ``Plan.apply``.
    """
    ((_, value),) = dataclasses.replace(plan, moves=(move,)).leaves(checkpoint.read, init)
    return value


def in_parts(checkpoint: Any, plan: Plan, move: Move) -> bool:
    """Whether parts of a leaf can be read alone: one source, as the plan says, only copied, cast, cut or turned."""
    if not isinstance(move.source, str) or not all(op[0] in _LOCAL for op in move.ops):
        return False
    found, expected = getattr(checkpoint, "shapes", {}).get(move.source), plan.sources[move.source]
    if found is None or (tuple(found.shape), str(found.dtype)) != tuple(expected):
        return False
    return getattr(checkpoint, "sliceable", lambda name: True)(move.source)


def part(checkpoint: Any, plan: Plan, move: Move, box: Box) -> np.ndarray:
    """The elements ``[low, high)`` of a leaf for which :func:`in_parts` holds; nothing else is read.

    Raises:
      PlanError: a cast loses values, or the plan promises another shape or dtype.
    """
    source, ops = backwards(move.ops, box)
    array = checkpoint.read(move.source, tuple(map(slice, *source)))
    out = np.asarray(dataclasses.replace(move, ops=ops).run([array]))
    if out.shape != _size(box) or str(out.dtype) != plan.shapes[move.target].dtype:
        whole(checkpoint, plan, move)  # a plan that contradicts itself: this says where
    return out


def gathered(checkpoint: Any, plan: Plan, move: Move, box: Box | None = None) -> np.ndarray:
    """As :func:`part`, a new C-contiguous array; the source is read 16 MiB at a time, and each piece put in place.

    Args:
      box: ``None``: all of the leaf.
    """
    spec = plan.shapes[move.target]
    low, high = box or ((0,) * len(spec.shape), tuple(spec.shape))
    out = np.empty(_size((low, high)), jax.numpy.dtype(spec.dtype))
    for _, first, last in blocks(tuple(spec.shape), _piece(plan, move), low, high):
        first, last = tuple(map(max, first, low)), tuple(map(min, last, high))
        found = part(checkpoint, plan, move, (first, last))
        if found.shape == out.shape and found.flags.c_contiguous:
            return found
        _put(out[tuple(slice(a - o, b - o) for a, b, o in zip(first, last, low))], found)
    return out


def _piece(plan: Plan, move: Move) -> Corner:
    """The shape that a block of the source's digests takes in the target."""
    source = plan.sources[move.sources[0]]
    piece = block_shape(tuple(source.shape), jax.numpy.dtype(source.dtype).itemsize, BLOCK)
    for op in move.ops:
        if op[0] == "permute":
            piece = tuple(piece[axis] for axis in op[1])
        elif op[0] == "take":
            piece = (*piece[: op[1]], *piece[op[1] + 1 :])
    return piece


def copied(array: np.ndarray) -> np.ndarray:
    """A new C-contiguous array of the same elements."""
    out = np.empty(array.shape, array.dtype)
    _put(out, array)
    return out


def _put(out: np.ndarray, array: np.ndarray) -> None:
    """``out[...] = array``, a few columns at a time where the columns of ``array`` lie far apart: numpy would fetch a
    cache line for each element, and fetch it again for the next row."""
    step = max(16, 64 // out.itemsize)
    if array.ndim > 1 and array.strides[-1] >= 512 and array.size > 64 * array.shape[-1]:
        for start in range(0, array.shape[-1], step):
            out[..., start : start + step] = array[..., start : start + step]
    else:
        out[...] = array


def backwards(ops: Sequence[tuple[Any, ...]], box: Box) -> tuple[Box, tuple[Any, ...]]:
    """The part of the source that a part of the target comes from, and the operations between the two.

    >>> backwards((("slice", 0, 4, 8), ("permute", (1, 0))), ((0, 1), (5, 3)))
    (((5, 0), (7, 5)), (('permute', (1, 0)),))
    """
    kept = []
    for op in reversed(ops):
        box, op = _LOCAL[op[0]](box, op)
        kept += [op] if op else []
    return box, tuple(reversed(kept))


def _uncut(box: Box, op: Any) -> tuple[Box, Any]:
    _, axis, start, _ = op
    low, high = ((*c[:axis], c[axis] + start, *c[axis + 1 :]) for c in box)
    return (low, high), None


def _untake(box: Box, op: Any) -> tuple[Box, Any]:
    _, axis, index = op
    low, high = ((*c[:axis], at, *c[axis:]) for c, at in zip(box, (index, index + 1)))
    return (low, high), ("take", axis, 0)


def _unturn(box: Box, op: Any) -> tuple[Box, Any]:
    order = np.argsort(op[1]).tolist()
    low, high = (tuple(c[axis] for axis in order) for c in box)
    return (low, high), op


_LOCAL: dict[str, Callable[[Box, Any], tuple[Box, Any]]] = {
    "cast": lambda box, op: (box, op),
    "permute": _unturn,
    "slice": _uncut,
    "take": _untake,
}


def spread(checkpoint: Any, plan: Plan, move: Move, sharding: jax.sharding.Sharding) -> jax.Array:
    """A leaf placed part by part: no device ever holds more than its own, and no process reads more than it must.

    A process reads the smallest box around its parts at once, or each part alone where that is less; a leaf whose
    operations need all of it is made whole in host memory first.

    Raises:
      CheckpointError: the sharding does not fit the leaf's shape.
    """
    spec = plan.shapes[move.target]
    shape, dtype = tuple(spec.shape), jax.numpy.dtype(spec.dtype)
    try:
        indices = sharding.addressable_devices_indices_map(shape).values()
    except ValueError as error:
        raise CheckpointError(f"'{move.target}' {spec} cannot be placed in {sharding}: {error}") from None
    boxes = {normalise(index, shape, move.target)[:2] for index in indices if index is not None}
    cut = _reader(checkpoint, plan, move, boxes)
    callback = lambda index: cut(normalise(index, shape, move.target)[:2])
    return jax.make_array_from_callback(shape, sharding, callback, dtype=dtype)


def _reader(checkpoint: Any, plan: Plan, move: Move, boxes: set[Box]) -> Callable[[Box], np.ndarray]:
    shape = tuple(plan.shapes[move.target].shape)
    held: Box = ((0,) * len(shape), shape)
    if in_parts(checkpoint, plan, move):
        low = tuple(map(min, zip(*(low for low, _ in boxes)))) if boxes else held[0]
        high = tuple(map(max, zip(*(high for _, high in boxes)))) if boxes else held[0]
        held = (low, high)
        if np.prod(_size(held)) > sum(np.prod(_size(box)) for box in boxes):
            return lambda box: gathered(checkpoint, plan, move, box)
        array = gathered(checkpoint, plan, move, held)
    else:
        array = np.asarray(whole(checkpoint, plan, move))
    return lambda box: array[tuple(slice(a - o, b - o) for a, b, o in zip(*box, held[0]))]


def _size(box: Box) -> Corner:
    return tuple(b - a for a, b in zip(*box))
