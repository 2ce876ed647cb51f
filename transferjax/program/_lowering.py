"""The graph of a program: calls opened, loops and branches as one operation each, with the graphs of their bodies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.extend.core as jex

from transferjax.program._graph import BARRIER, BRANCHES, CARRY, LOOP, WRITE, Graph, Value, array
from transferjax.program._graph_rules import lowered
from transferjax.program._operations import _names
from transferjax.program._walk import CALL, COND, SCAN, WHILE, Body, Site

_REMAT = _names("remat remat2 checkpoint")


def lower(body: Body) -> Graph:
    """The graph of a live body; a reshape of an input is no node, so an output may be an input."""
    graph = Graph()
    env = {var: graph.given(var.aval) for var, needed in zip(body.jaxpr.invars, body.inputs, strict=True) if needed}
    _body(graph, body, env)
    return graph.close([_read(env, var) for var in body.jaxpr.outvars])


Env = dict[Any, Value]


def _read(env: Env, var: Any) -> Value | None:
    return None if isinstance(var, jex.Literal) else env.get(var)


def _body(graph: Graph, body: Body, env: Env) -> None:
    for var in body.jaxpr.constvars:
        env.setdefault(var, Value(var.aval, None))
    for site in body.sites:
        if site.kind == CALL or (site.kind == COND and len(site.bodies) == 1):
            _call(graph, site, env)
        elif site.kind in _CONTROL:
            _CONTROL[site.kind](graph, site, env)
        else:
            _leaf(graph, site, env)


def _call(graph: Graph, site: Site, env: Env) -> None:
    eqn, body = site.eqn, site.bodies[0]
    operands = eqn.invars[1:] if site.kind == COND else eqn.invars
    inner: Env = {}
    for var, operand, needed in zip(body.jaxpr.invars, operands, body.inputs, strict=True):
        value = _read(env, operand)
        if needed and value is not None:
            inner[var] = value
        elif needed:
            inner[var] = (
                graph.constant(operand.val, var.aval) if isinstance(operand, jex.Literal) else graph.given(var.aval)
            )
    _body(graph, body, inner)
    for var, result, used in zip(eqn.outvars, body.jaxpr.outvars, site.outputs, strict=True):
        value = _read(inner, result)
        if used and value is not None:
            env[var] = value
        elif used and isinstance(result, jex.Literal):
            env[var] = graph.constant(result.val, var.aval)


def _barrier(graph: Graph, values: list[Value]) -> list[Value]:
    avals = [array(value.shape, value.dtype) for value in values]
    return graph.add(BARRIER, values, avals, bases=tuple(values))


def _scan(graph: Graph, site: Site, env: Env) -> None:
    """A loop whose stacked results are written into arrays of zeros, made before it begins."""
    eqn, (body,) = site.eqn, site.bodies
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    inner, sub, read = Env(), Graph(), list[Value]()
    carried: dict[int, Value] = {}
    for number, (var, operand) in enumerate(zip(body.jaxpr.invars, eqn.invars, strict=True)):
        carry = number - consts if consts <= number < consts + carries else None
        if not (body.inputs[number] if carry is None else site.outputs[carry]):
            continue
        if carry is not None:
            carried[carry] = inner[var] = sub.add(CARRY, [sub.given(var.aval)], [var.aval])[0]
            continue
        given = sub.given(operand.aval)
        stacked = number >= consts + carries
        inner[var] = sub.add("dynamic_slice", [given], [var.aval], key=number)[0] if stacked else given
        value = _read(env, operand)
        read += [] if value is None else [value]
    _body(sub, body, inner)
    results = [(n, _read(inner, var), var) for n, var in enumerate(body.jaxpr.outvars) if site.outputs[n]]
    written = [value if n < carries else _written(sub, value, var.aval) for n, value, var in results]
    sub.carried = {carried[n]: value for n, value, _ in results if n < carries}
    sub.close(written)
    avals = {n: eqn.outvars[n].aval for n, _, _ in results}
    bases = [
        graph.copied(_read(env, eqn.invars[consts + n]) if n < carries else graph.zeros(avals[n]), avals[n])
        for n, _, _ in results
    ]
    _loop(graph, env, [eqn.outvars[n] for n, _, _ in results], bases, read, sub)


def _written(graph: Graph, value: Value | None, aval: Any) -> Value:
    """A value written into one row of a stack that is there already."""
    (row,) = graph.add(WRITE, [] if value is None else [value], [aval])
    row.bytes = 0
    return row


def _while(graph: Graph, site: Site, env: Env) -> None:
    eqn, (_, body) = site.eqn, site.bodies
    before, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    inner, sub, read = Env(), Graph(), list[Value]()
    carried: dict[int, Value] = {}
    for number, (var, operand) in enumerate(zip(body.jaxpr.invars, eqn.invars[before:], strict=True)):
        if number >= consts:
            carried[number - consts] = inner[var] = sub.add(CARRY, [sub.given(var.aval)], [var.aval])[0]
        elif body.inputs[number]:
            inner[var] = sub.given(var.aval)
            value = _read(env, operand)
            read += [] if value is None else [value]
    _body(sub, body, inner)
    used = [n for n, keep in enumerate(site.outputs) if keep]
    results = {n: _read(inner, body.jaxpr.outvars[n]) for n in used}
    sub.carried = {carried[n]: value for n, value in results.items()}
    sub.close(list(results.values()))
    bases = [graph.copied(_read(env, eqn.invars[before + consts + n]), eqn.outvars[n].aval) for n in used]
    _loop(graph, env, [eqn.outvars[n] for n in used], bases, read, sub)


def _loop(graph: Graph, env: Env, outvars: list[Any], bases: list[Value], read: list[Value], sub: Graph) -> None:
    outputs = graph.add(LOOP, [*bases, *read], [var.aval for var in outvars], bases=tuple(bases), bodies=(sub,))
    env.update(zip(outvars, outputs, strict=True))


def _cond(graph: Graph, site: Site, env: Env) -> None:
    eqn, subs = site.eqn, []
    for body in site.bodies:
        sub = Graph()
        pairs = zip(body.jaxpr.invars, body.inputs, strict=True)
        inner: Env = {var: sub.given(var.aval) for var, needed in pairs if needed}
        _body(sub, body, inner)
        wanted = zip(body.jaxpr.outvars, site.outputs, strict=True)
        subs.append(sub.close([_read(inner, var) for var, used in wanted if used]))
    values = [value for value in (_read(env, var) for var in eqn.invars) if value is not None]
    outvars = [var for var, used in zip(eqn.outvars, site.outputs, strict=True) if used]
    outputs = graph.add(BRANCHES, values, [var.aval for var in outvars], bodies=tuple(subs))
    env.update(zip(outvars, outputs, strict=True))


_CONTROL: dict[str, Callable[[Graph, Site, Env], None]] = {SCAN: _scan, WHILE: _while, COND: _cond}


def _leaf(graph: Graph, site: Site, env: Env) -> None:
    """One operation: by its rule where it has one, else as it is."""
    eqn = site.eqn
    if eqn.primitive.name == "platform_index":
        return
    values = [_read(env, var) for var in eqn.invars]
    outvars = [var for var, used in zip(eqn.outvars, site.outputs, strict=True) if used]
    outputs = lowered(graph, site, values)
    env.update(zip(outvars, outputs, strict=True))
