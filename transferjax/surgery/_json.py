"""A Plan as JSON, and back; what is read is checked as if a stranger had written it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from transferjax._errors import PlanError, listing
from transferjax.surgery._ops import Spec, check_op, check_shape, infer
from transferjax.surgery._plan import Move, Plan

FORMAT = "transferjax.plan"
VERSION = 1


def dump(plan: Plan) -> str:
    """The text that :func:`parse` reads, with one line per leaf."""
    listed = lambda moves: _lines(json.dumps([m.target, m.source, m.ops]) for m in moves)
    replaced = ',\n"replaced": [\n' + listed(plan.replaced) + "]" if plan.replaced else ""
    return "".join(
        [
            f'{{"format": {json.dumps(FORMAT)}, "version": {VERSION}, "fingerprint": {json.dumps(plan.fingerprint)}',
            ',\n"moves": [\n' + listed(plan.moves) + "]",
            replaced,
            ',\n"waived": [\n' + _lines(map(json.dumps, plan.waived)) + "]",
            ',\n"targets": {\n' + _lines(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in plan.shapes.items()) + "}",
            ',\n"sources": {\n' + _lines(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in plan.sources.items()) + "}}\n",
        ]
    )


def parse(text: str) -> Plan:
    """The plan that :func:`dump` wrote; see ``Plan.from_json``."""
    try:
        data = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"the text of the plan is no JSON: {error}. Pass what Plan.to_json() returned.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(f'the JSON is no plan: expected an object with "format": "{FORMAT}".')
    if data.get("version") != VERSION:
        raise PlanError(
            f"the plan has version {data.get('version')!r}; this transferjax reads version {VERSION}. "
            "Make the plan again, or read it with the version that wrote it."
        )
    found = set(data) - {"format", "version", "replaced"}
    if found != {"fingerprint", "moves", "waived", "targets", "sources"}:
        raise PlanError(
            f"the plan has the entries {listing(sorted(found), 8)}; "
            "expected fingerprint, moves, sources, targets, waived, and where leaves are fresh replaced."
        )
    shapes, sources = _specs(data["targets"], "targets"), _specs(data["sources"], "sources")
    moves = tuple(_move(one, number) for number, one in enumerate(_list(data["moves"], "moves")))
    waived = tuple(_text(one, "waived name") for one in _list(data["waived"], "waived"))
    fingerprint = None if data["fingerprint"] is None else _text(data["fingerprint"], "fingerprint")
    replaced = _list(data.get("replaced", []), "replaced moves")
    would = tuple(_move(one, number) for number, one in enumerate(replaced))
    plan = Plan(moves, waived, shapes, sources, fingerprint, would)
    verify(plan)
    return plan


def verify(plan: Plan) -> None:
    """Whether the moves fit the shapes and every leaf is accounted for once.

    Raises:
      PlanError: a leaf has no move or two, a source is unknown or left over, or a move makes another shape or dtype.
    """
    moved = Counter(move.target for move in plan.moves)
    odd = [path for path, count in moved.items() if count > 1] or sorted(set(moved) ^ set(plan.shapes))
    if odd:
        raise PlanError(f"the plan does not have one move per target leaf: see {listing(odd)}.")
    used = {name for move in plan.moves for name in move.sources}
    odd = sorted(used - set(plan.sources)) or sorted(
        name for name, count in (Counter(plan.waived) + Counter({*plan.sources} - used)).items() if count != 2
    )
    if odd:
        raise PlanError(f"the plan does not use or waive each source leaf once: see {listing(odd)}.")
    for move in plan.moves:
        if move.source is None and move.ops:
            raise PlanError(f"'{move.target}' is fresh and has operations; expected none.")
        if move.source is None:
            continue
        made = infer(move.ops, [plan.sources[name] for name in move.sources])
        if made != plan.shapes[move.target]:
            raise PlanError(f"'{move.target}' expects {plan.shapes[move.target]}; its move makes {made}.")
    fresh = {move.target for move in plan.moves if move.source is None}
    for move in plan.replaced:
        if move.target not in fresh or not move.sources or not plan.sources.keys() >= {*move.sources}:
            raise PlanError(f"'{move.target}' is no fresh leaf that replaces a source leaf; expected one of each.")
        infer(move.ops, [plan.sources[name] for name in move.sources])
        fresh.remove(move.target)


def _lines(entries: Any) -> str:
    return ",\n".join(entries)


def _move(entry: Any, number: int) -> Move:
    if not isinstance(entry, list) or len(entry) != 3:
        raise PlanError(f"move {number} of the plan is malformed: expected [target, source, operations].")
    target, source, ops = entry
    if isinstance(source, list):
        source = tuple(_text(name, f"source of move {number}") for name in source)
        if not source:
            raise PlanError(f"move {number} of the plan has an empty list of sources; expected names or null.")
    elif source is not None:
        source = _text(source, f"source of move {number}")
    checked = tuple(check_op(op) for op in _list(ops, f"operations of move {number}"))
    return Move(_text(target, f"target of move {number}"), source, checked)


def _specs(table: Any, what: str) -> dict[str, Spec]:
    if not isinstance(table, dict):
        raise PlanError(f"the {what} of the plan are {type(table).__name__}; expected an object of [shape, dtype].")
    out = {}
    for name, entry in table.items():
        if not isinstance(entry, list) or len(entry) != 2:
            raise PlanError(f"'{name}' in the {what} of the plan is malformed; expected [shape, dtype].")
        shape = check_shape(entry[0])[0]
        if -1 in shape:
            raise PlanError(f"'{name}' in the {what} of the plan has the shape {shape}; expected sizes of at least 0.")
        out[name] = Spec(shape, _text(entry[1], f"dtype of '{name}'"))
    return out


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise PlanError(f"the {what} of the plan are {type(value).__name__}; expected a list.")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise PlanError(f"the {what} in the plan is {type(value).__name__}; expected a string.")
    return value
