"""The optimizer's state goes the way of its parameters: moments and averages through the same plan."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from transferjax._errors import PlanError, describe, listing
from transferjax._report import Report
from transferjax.surgery._ops import Op
from transferjax.surgery._plan import Move, Plan
from transferjax.tree import copy, flatten, natural

REARRANGING = frozenset({"permute", "reshape", "slice", "take", "concat", "stack", "cast"})
"""Operations that keep each number a number of the source, so that what was averaged of it stays true."""

COLUMNS = ("state", "leaf", "shape", "source", "how")


def carry(plan: Plan, old_state: Any, new_state: Any) -> tuple[Any, Report]:
    """The state of an optimizer over the old parameters, as the state over the new ones that a plan makes of them.

    Every part of the state that is shaped like the parameters (Adam's moments, momentum, averages, accumulated
    gradients) goes through the plan's moves; numbers beside them (steps, keys, injected hyperparameters) are taken as
    they are. What no rearrangement of old numbers gives, keeps its value in ``new_state``: fresh leaves, leaves that
    had no state, resized leaves (a resize can make a second moment negative), and factored moments, which are of
    another shape than their parameter. So does a step count none of whose leaves were carried.

    A count that is shared by carried and new leaves is old, and Adam takes steps that are up to 6.6 times too long on
    the new ones for some tens of updates: the report's ``"shared counts"`` names them. Give fresh leaves a group of
    their own (``transferjax.per_group``), whose count then starts with them.

    Args:
      plan: from the old parameters to the new ones, by the paths of both: ``plan(old_params, new_params, *rules)``.
        Its casts do not apply: each leaf of the state comes in the dtype of ``new_state``.
      old_state: any nested optax state over the old parameters, in part masked or with Holes; or a tree like the
        parameters, such as an average of them.
      new_state: the first state of the same optimizer over the new parameters, ``tx.init(new_params)``.

    Returns:
      ``(state, report)``: the state in the structure and sharding of ``new_state``, each array a copy of its own so
      that it can be donated; and a ``Report`` of one row per leaf of it, then of the old leaves that were dropped.

    Raises:
      PlanError: the two states are not of one optimizer, a leaf does not fit the plan, or holds what the plan has no
        leaf for (an adapter beside its kernel), or a leaf is abstract.

    >>> import jax.numpy as jnp, optax
    >>> from transferjax.surgery import permute, plan, rename
    >>> old, new = {"w": jnp.ones((2, 3))}, {"kernel": jnp.ones((3, 2))}
    >>> tx = optax.adam(1e-3)
    >>> _, before = tx.update({"w": jnp.full((2, 3), 5.0)}, tx.init(old), old)
    >>> moves = plan(old, new, rename("w", "kernel"), permute("kernel", (1, 0)))
    >>> state, report = carry(moves, before, tx.init(new))
    >>> int(state[0].count), state[0].mu["kernel"].shape, float(state[0].mu["kernel"][0, 0])
    (1, (3, 2), 0.5)
    >>> print(report)
    Carry: 3 of 3 leaves of the state are carried over
    state    leaf    shape   source  how
    -------  ------  ------  ------  -------------
    0/count          ()              carried
    0/mu     kernel  (3, 2)  w       permute(1, 0)
    0/nu     kernel  (3, 2)  w       permute(1, 0)
    carried: 3
    new: 0
    dropped: 0
    >>> average, _ = carry(moves, {"w": jnp.zeros((2, 3))}, new)  # an average of the parameters is a tree like them
    >>> average["kernel"].shape
    (3, 2)
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"carry() expects a Plan first, got {describe(plan)}. Write carry(plan, old_state, new_state).")
    for name, state in (("old_state", old_state), ("new_state", new_state)):
        if state is None:
            raise PlanError(f"{name} of carry() is None; expected the state of an optimizer, tx.init(params).")
    flat, treedef = flatten(new_state)
    old, new = _State(flatten(old_state)[0], plan.sources), _State(flat, plan.shapes)
    _check_alike(old, new)
    for path, leaf in old.leaves.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise PlanError(f"'{path}' of old_state is a jax.ShapeDtypeStruct. Pass the arrays of the old run.")
    moves = {move.target: move for move in plan.moves}
    entries = {path: _entry(plan, moves[new.places[path].leaf], new.places[path], old, new) for path in new.places}
    entries |= _others(old, new, entries)
    leaves = [_value(entries[path], path, leaf) for path, leaf in flat]
    return copy(jax.tree.unflatten(treedef, leaves)), _report(plan, old, new, entries)


class _Place(NamedTuple):
    """Where a leaf of the state lies: in which of its parts, at which path of the parameters."""

    part: str
    leaf: str


class _Entry(NamedTuple):
    """What becomes of a leaf of the new state: ``make`` gives its value, ``None`` keeps the one it has."""

    how: str
    make: Callable[[], Any] | None = None
    sources: tuple[str, ...] = ()


class _State:
    """Leaves of an optimizer's state by path, and which of them belong to parameters."""

    def __init__(self, flat: Iterable[tuple[str, Any]], known: Collection[str]):
        self.leaves = dict(flat)
        self.places: dict[str, _Place] = {}
        self._find("", {path: path for path in self.leaves}, known)
        self.parts: dict[str, dict[str, str]] = defaultdict(dict)
        for path, place in self.places.items():
            self.parts[place.part][place.leaf] = path
        self.others = [path for path in self.leaves if path not in self.places]
        for path in self.others:
            whose = _inside(path, known) if jnp.shape(self.leaves[path]) else None
            if whose is not None:
                raise PlanError(
                    f"'{path}' of the state belongs to '{whose}', and what lies there is not the plan's leaves alone. "
                    "Make the plan from and to the trees that the optimizer trains, adapters included, or carry the "
                    "groups that have none by themselves: carry(plan, old_state['group'], new_state['group'])."
                )

    def _find(self, part: str, rest: Mapping[str, str], known: Collection[str]) -> None:
        """A part all of whose leaves are parameters by their paths is shaped like them; the outermost such counts."""
        if rest and all(leaf in known for leaf in rest.values()):
            self.places |= {path: _Place(part, leaf) for path, leaf in rest.items()}
            return
        inner: dict[str, dict[str, str]] = defaultdict(dict)
        for path, leaf in rest.items():
            first, below, last = leaf.partition("/")
            if below:
                inner[first][path] = last
        for name, below in inner.items():
            self._find(f"{part}/{name}" if part else name, below, known)

    def above(self, path: str) -> list[str]:
        """The leaves of parameters in the innermost node that holds ``path`` and any of them."""
        while path:
            path = path.rpartition("/")[0]
            found = [one for one in self.places if not path or one.startswith(f"{path}/")]
            if found:
                return found
        return []


def _inside(path: str, known: Collection[str]) -> str | None:
    """The longest path of a parameter that runs inside of a path of the state."""
    parts = path.split("/")
    spans = [(a, b) for a in range(len(parts)) for b in range(a + 1, len(parts) + 1)]
    found = [run for a, b in spans if (run := "/".join(parts[a:b])) in known]
    return max(found, key=len, default=None)


def _check_alike(old: _State, new: _State) -> None:
    for what, before, after in (("parts", old.parts, new.parts), ("numbers", old.others, new.others)):
        odd = [f"'{name}' (in old_state only)" for name in before if name not in after]
        odd += [f"'{name}' (in new_state only)" for name in after if name not in before]
        if odd:
            raise PlanError(
                f"the two states differ in their {what}: {listing(odd, 4)}. Expected those of one optimizer, over the "
                "plan's source and target: new_state = tx.init(new_params). A group that is new is carried by itself: "
                "carry(plan, old_state['group'], new_state['group'])."
            )
    for path in new.others:
        if _form(old.leaves[path]) != _form(new.leaves[path]):
            raise PlanError(
                f"'{path}' is {describe(old.leaves[path])} in old_state and {describe(new.leaves[path])} in new_state; "
                "expected the same of both. Make them by the same optimizer."
            )


def _form(leaf: Any) -> tuple[Any, ...]:
    return jnp.shape(leaf), getattr(leaf, "dtype", type(leaf))


def _entry(plan: Plan, move: Move, place: _Place, old: _State, new: _State) -> _Entry:
    """What the plan's move makes of one leaf of the state."""
    before, leaf = old.parts[place.part], new.leaves[new.parts[place.part][place.leaf]]
    if move.source is None:
        return _Entry("new: fresh leaf")
    strange = next((op[0] for op in move.ops if op[0] not in REARRANGING), None)
    if strange is not None:
        return _Entry(f"new: {strange} is no rearrangement", None, move.sources)
    lacking = [name for name in move.sources if name not in before]
    if lacking:
        return _Entry(f"new: {listing(lacking)} had no state", None, move.sources)
    arrays = [old.leaves[before[name]] for name in move.sources]
    fits = [jnp.shape(array) == plan.sources[name].shape for name, array in zip(move.sources, arrays, strict=True)]
    if not all(fits) or jnp.shape(leaf) != plan.shapes[move.target].shape:
        _check_factored(plan, move, place, arrays, leaf)
        return _Entry("new: not of its parameter's shape", None, move.sources)
    ops: tuple[Op, ...] = tuple(op for op in move.ops if op[0] != "cast")
    how = dataclasses.replace(move, ops=ops).how
    moved = Move(f"{place.part}/{place.leaf}".strip("/"), move.source, (*ops, ("cast", str(leaf.dtype))))
    return _Entry(how, lambda: moved.run(arrays), move.sources)


def _check_factored(plan: Plan, move: Move, place: _Place, arrays: list[Any], leaf: Any) -> None:
    """Raises where a leaf has as many axes as its parameter but other sizes: it is of other parameters.

    A single number stands for what a factored state does not keep.
    """
    sides = [(name, array, plan.sources[name], "old") for name, array in zip(move.sources, arrays, strict=True)]
    for name, array, spec, side in [*sides, (move.target, leaf, plan.shapes[move.target], "new")]:
        if jnp.ndim(array) == len(spec.shape) and jnp.shape(array) not in (spec.shape, (1,)):
            raise PlanError(
                f"'{place.part}' of {side}_state has {describe(array)} for '{name}'; the plan was made for {spec}. "
                "Make the plan from the parameters of old_state to those of new_state."
            )


def _others(old: _State, new: _State, entries: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """Steps, keys and hyperparameters: carried, unless all leaves of their optimizer are new."""
    out = {}
    for path in new.others:
        beside = new.above(path)
        if beside and all(entries[one].make is None for one in beside):
            out[path] = _Entry("new: all leaves beside it are new")
        else:
            out[path] = _Entry("carried", lambda path=path: old.leaves[path])
    return out


def _value(entry: _Entry, path: str, leaf: Any) -> Any:
    if entry.make is None:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise PlanError(
                f"'{path}' keeps its value in new_state, which is a jax.ShapeDtypeStruct. Pass tx.init(new_params)."
            )
        return leaf
    value = entry.make()
    bound = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed
    return jax.device_put(value, leaf.sharding) if bound else value


def _report(plan: Plan, old: _State, new: _State, entries: Mapping[str, _Entry]) -> Report:
    rows, read, shared = [], set(), []
    for path in sorted(new.leaves, key=natural):
        entry, place = entries[path], new.places.get(path)
        shape = str(jnp.shape(new.leaves[path]))
        if place is None:
            rows.append((path, None, shape, None, entry.how))
            made = {entries[one].make is None for one in new.above(path)}
            shared += [path] if len(made) == 2 and path.rpartition("/")[2] == "count" else []
            continue
        rows.append((place.part, place.leaf, shape, " + ".join(entry.sources) or None, entry.how))
        read |= {(place.part, name) for name in entry.sources} if entry.make else set()
    carried = sum(entry.make is not None for entry in entries.values())
    dropped = [(path, *place) for path, place in old.places.items() if tuple(place) not in read]
    for path, part, name in sorted(dropped, key=lambda one: natural(one[0])):
        why = "waived by the plan" if name in plan.waived else "no leaf takes it"
        rows.append((part, None, str(jnp.shape(old.leaves[path])), name, f"dropped: {why}"))
    metadata: dict[str, Any] = {"carried": carried, "new": len(entries) - carried, "dropped": len(dropped)}
    if shared:
        metadata["shared counts"] = listing(shared)
    title = f"Carry: {carried:,} of {len(entries):,} leaves of the state are carried over"
    return Report(title, COLUMNS, tuple(rows), metadata)
