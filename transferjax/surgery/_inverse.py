"""A plan turned round: from its targets back to the source's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from transferjax._errors import PlanError, nearest_hint
from transferjax.surgery._ops import Op, Spec, castable, check_op, infer, show
from transferjax.surgery._plan import Move, Plan
from transferjax.tree import Selector, as_selector, natural

LIMIT = 8  # problems told in full
CUTS = {"slice": "concat", "take": "stack"}
JOINS = frozenset(CUTS.values())


def invert(plan: Plan, moves: Sequence[Move], leave_out: Selector | str | None, lossy: bool) -> Plan:
    """See ``Plan.inverse``."""
    given = _given(plan, moves)
    left = _left_out(plan, leave_out)
    real: dict[str, list[Move]] = {}
    for move in (*plan.moves, *plan.replaced):
        for name in dict.fromkeys(move.sources):
            real.setdefault(name, []).append(move)
    problems: list[str] = []
    made = dict(given)
    for name in plan.sources:
        if name in made or name in left or name not in real:
            continue
        try:
            made[name] = _made(plan, name, real[name], lossy)
        except PlanError as error:
            problems.append(f"source '{name}' {error}")
    read = {path for move in made.values() for path in move.sources}
    if not problems:  # else what has no inverse would be told twice
        lost = [m.target for m in plan.moves if m.source is None and m.target not in read and m.target not in left]
        problems += [
            f"the fresh leaf '{path}' replaced no leaf of the source, so it has no name there" for path in lost
        ]
    if problems:
        told = "; ".join(problems[:LIMIT]) + (f"; and {len(problems) - LIMIT} more" if len(problems) > LIMIT else "")
        raise PlanError(
            f"the plan has no inverse: {told}. Leave leaves out, plan.inverse(leave_out=...), or say how they are "
            "made, plan.inverse(Move('name in the source', 'path', (('permute', (1, 0)),)))."
        )
    ordered = [made[name] for name in sorted(made, key=lambda name: (natural(name), name))]
    shapes = {move.target: infer(move.ops, [plan.shapes[path] for path in move.sources]) for move in ordered}
    waived = tuple(path for path in plan.shapes if path not in read)
    return Plan(tuple(ordered), waived, shapes, plan.shapes)


def _given(plan: Plan, moves: Sequence[Any]) -> dict[str, Move]:
    """The moves that the caller states, checked."""
    out: dict[str, Move] = {}
    for move in moves:
        if not isinstance(move, Move) or not move.sources:
            got = f"'{move.target}' without a source" if isinstance(move, Move) else type(move).__name__
            raise PlanError(f"inverse() expects moves, Move('name in the source', 'path', ops), got {got}.")
        for path in move.sources:
            if path not in plan.shapes:
                raise PlanError(
                    f"inverse() is to make '{move.target}' from '{path}', which is no target of the plan."
                    f"{nearest_hint(path, plan.shapes)}"
                )
        if move.target in out:
            raise PlanError(f"inverse() got two moves for '{move.target}'; expected one.")
        ops = tuple(map(check_op, move.ops))
        infer(ops, [plan.shapes[path] for path in move.sources])
        out[move.target] = Move(move.target, move.source, ops)
    return out


def _left_out(plan: Plan, leave_out: Selector | str | None) -> set[str]:
    if leave_out is None:
        return set()
    chosen = as_selector(leave_out)
    used = {name for move in (*plan.moves, *plan.replaced) for name in move.sources}
    fresh = [move.target for move in plan.moves if move.source is None]
    known = [name for name in plan.sources if name in used] + fresh
    found = {name for name in known if chosen(name)}
    if not found:
        raise PlanError(
            f"inverse(leave_out={chosen!r}) selects none of the {len(known)} source leaves that are made and fresh "
            f"target leaves.{nearest_hint(chosen.name.strip(chr(39)), known)}"
        )
    return found


class _Step(NamedTuple):
    """One operation of a move as one source leaf sees it: its shape before and after, and where it lies in a join."""

    op: Op
    before: Spec
    after: Spec
    start: int = 0


def _steps(move: Move, name: str, sources: Mapping[str, Spec]) -> list[_Step]:
    mine, specs = move.sources.index(name), tuple(sources[one] for one in move.sources)
    out = []
    for op in move.ops:
        if op[0] in JOINS:  # all arrays become one
            sizes = [spec.shape[op[1]] for spec in specs] if op[0] == "concat" else [1] * len(specs)
            after = infer([op], specs)
            out.append(_Step(op, specs[mine], after, sum(sizes[:mine])))
            specs, mine = (after,), 0
        else:
            after = tuple(infer([op], [spec]) for spec in specs)
            out.append(_Step(op, specs[mine], after[mine]))
            specs = after
    return out


class _Piece(NamedTuple):
    """What one target leaf holds of a source leaf: all of it, or the part that ``cut`` took."""

    target: str
    ops: tuple[Op, ...]  # from the target leaf to the piece
    spec: Spec  # of the piece
    cut: _Step | None
    above: tuple[_Step, ...]  # what happened to the whole before the cut


def _made(plan: Plan, name: str, moves: Sequence[Move], lossy: bool) -> Move:
    """The move that makes a source leaf again; the moves that read it are tried in order."""
    replaced = {id(move) for move in plan.replaced}
    pieces: list[_Piece] = []
    wrong: list[str] = []
    for move in moves:
        try:
            piece = _piece(plan, name, move, lossy or id(move) in replaced)
        except PlanError as error:
            wrong.append(f"is not made from '{move.target}': {error}")
            continue
        if piece.cut is None:
            return Move(name, piece.target, piece.ops)
        pieces.append(piece)
    if not pieces:
        raise PlanError(wrong[0])
    try:
        return _joined(name, pieces, lossy)
    except PlanError as error:
        raise PlanError(f"{error}; it {wrong[0]}" if wrong else str(error)) from None


def _piece(plan: Plan, name: str, move: Move, lossy: bool) -> _Piece:
    steps = _steps(move, name, plan.sources)
    cuts = [number for number, step in enumerate(steps) if step.op[0] in CUTS]
    if len(cuts) > 1 or (cuts and len(move.sources) > 1):
        raise PlanError(f"{show(steps[cuts[-1]].op)} cuts what was cut or joined before, which has no inverse")
    first = cuts[0] + 1 if cuts else 0
    ops, spec = _undone(steps[first:], plan.shapes[move.target], lossy)
    return _Piece(move.target, ops, spec, steps[cuts[0]] if cuts else None, tuple(steps[: cuts[0]] if cuts else ()))


def _undone(steps: Sequence[_Step], spec: Spec, lossy: bool) -> tuple[tuple[Op, ...], Spec]:
    """The operations that undo some, last first, from a leaf that comes as ``spec``."""
    ops: list[Op] = []
    for step in reversed(steps):
        op = _UNDO[step.op[0]](step, spec, lossy) if step.op[0] in _UNDO else None
        if op is None:
            raise PlanError(f"{show(step.op)} has no inverse")
        ops.append(op)
        spec = infer([op], [spec])
    return tuple(ops), spec


def _undo_permute(step: _Step, spec: Spec, lossy: bool) -> Op:
    return ("permute", tuple(int(axis) for axis in np.argsort(step.op[1])))


def _undo_reshape(step: _Step, spec: Spec, lossy: bool) -> Op:
    return ("reshape", _resized(step, spec))


def _resized(step: _Step, spec: Spec) -> tuple[int, ...]:
    """The shape before a reshape, with the one size changed that has changed in the leaf since."""
    before, after = step.before.shape, step.after.shape
    if spec.shape == after:
        return before
    changed = [axis for axis in range(len(after)) if spec.shape[axis] != after[axis]]
    if len(changed) == 1:
        axis = changed[0]
        outside = math.prod(after[:axis]), math.prod(after[axis + 1 :])
        for one in range(len(before)):
            if before[one] == after[axis] and (math.prod(before[:one]), math.prod(before[one + 1 :])) == outside:
                return (*before[:one], spec.shape[axis], *before[one + 1 :])
    raise PlanError(f"{show(step.op)} has no inverse for the size {spec.shape} in place of {after}")


def _undo_cast(step: _Step, spec: Spec, lossy: bool) -> Op:
    source, target = step.before.dtype, step.after.dtype
    if not castable(target, source):
        raise PlanError(f"{show(step.op)} of {source} has no inverse")
    if not lossy and not keeps(source, target):
        raise PlanError(
            f"{show(step.op)} of {source} has dropped digits; plan.inverse(lossy=True) gives the dtype back, not them"
        )
    return ("cast", source)


def _undo_join(step: _Step, spec: Spec, lossy: bool) -> Op:
    name, axis = step.op
    if spec.shape[axis] != step.after.shape[axis]:
        raise PlanError(f"{show(step.op)} has no inverse for the size {spec.shape} in place of {step.after.shape}")
    if name == "stack":
        return ("take", axis, step.start)
    return ("slice", axis, step.start, step.start + step.before.shape[axis])


_UNDO: dict[str, Callable[[_Step, Spec, bool], Op]] = {
    "permute": _undo_permute,
    "reshape": _undo_reshape,
    "cast": _undo_cast,
    "concat": _undo_join,
    "stack": _undo_join,
}


def _joined(name: str, pieces: Sequence[_Piece], lossy: bool) -> Move:
    """The move that joins the pieces of a source leaf, once they are found to be all of it, in order."""
    first = pieces[0].cut
    assert first is not None
    kind, axis, size = first.op[0], first.op[1], first.before.shape[first.op[1]]
    parts: dict[tuple[int, int, int], _Piece] = {}
    for number, piece in enumerate(pieces):
        op = piece.cut.op if piece.cut else first.op
        if op[:2] == first.op[:2] and piece.above == pieces[0].above:
            start, stop = op[2], op[3] if kind == "slice" else op[2] + 1
            parts.setdefault((start, stop, 0 if stop > start else number), piece)  # of equal parts the first
    covered, ordered = 0, []
    for (start, stop, _), piece in sorted(parts.items(), key=lambda item: item[0]):
        if start != covered and stop > start:
            break
        covered = max(covered, stop)
        ordered.append(piece)
    if covered != size:
        there = f"after {covered} of {size}" if covered else f"at the start, of {size}"
        raise PlanError(f"is not whole: the next part of axis {axis} is in no target, {there}")
    join = (CUTS[kind], axis)
    above, _ = _undone(pieces[0].above, infer([join], [piece.spec for piece in ordered]), lossy)
    return Move(name, tuple(piece.target for piece in ordered), (*_common(ordered), join, *above))


def _common(pieces: Sequence[_Piece]) -> tuple[Op, ...]:
    """The operations of all pieces as one list, which runs on each; reshapes may differ in one size."""
    out: list[Op] = []
    names = " and ".join(f"'{piece.target}'" for piece in (pieces[0], pieces[-1]))
    if len({tuple(op[0] for op in piece.ops) for piece in pieces}) > 1:
        raise PlanError(f"is made from {names}, which were changed in different ways")
    for ops in zip(*(piece.ops for piece in pieces), strict=True):
        op = ops[0]
        if any(one != op for one in ops):
            shapes = [one[1] for one in ops] if op[0] == "reshape" else []
            odd = [n for n, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1] if shapes else []
            if len(odd) != 1:
                raise PlanError(f"is made from {names}, which were changed in different ways")
            op = ("reshape", (*shapes[0][: odd[0]], -1, *shapes[0][odd[0] + 1 :]))
        out.append(op)
    return tuple(out)


def keeps(source: str, target: str) -> bool:
    """Whether every number of one dtype is a number of another.

    >>> keeps("bfloat16", "float32"), keeps("float32", "bfloat16"), keeps("int8", "float32")
    (True, False, True)
    """
    a, b = jnp.dtype(source), jnp.dtype(target)
    if jnp.issubdtype(b, jnp.integer) or b == jnp.bool_:
        low, high = _range(a)
        return _range(b)[0] <= low and high <= _range(b)[1]
    wide = jnp.finfo(b)
    if jnp.issubdtype(a, jnp.integer) or a == jnp.bool_:
        return max(-_range(a)[0], _range(a)[1]) <= 2 ** (wide.nmant + 1) and wide.nmant < wide.maxexp
    narrow = jnp.finfo(a)
    tiny = narrow.minexp - narrow.nmant >= wide.minexp - wide.nmant
    return narrow.nmant <= wide.nmant and narrow.maxexp <= wide.maxexp and tiny


def _range(dtype: Any) -> tuple[int, int]:
    return (0, 1) if dtype == jnp.bool_ else (int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max))
