"""Carry facts forward through a jaxpr: one engine, of which each analysis gives only the rule for one equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core as jex

from transferjax.program._walk import CALL, COND, SCAN, WHILE, Body, Site

Combine = Callable[[jex.JaxprEqn, Sequence[Any]], Any]


def forward(body: Body, inputs: Sequence[Any], combine: Combine, bottom: Any) -> list[Any]:
    """The fact of each output of ``body``, given the facts of its inputs.

    Loops run until nothing changes, so ``combine`` must be monotone over finitely many facts.

    Args:
      body: from :func:`live`.
      inputs: one fact per input.
      combine: ``(eqn, facts of its operands) -> fact`` of all its outputs; also called where a branch or a loop
        condition decides about a value, since the value then depends on the decision.
      bottom: the fact of a constant.

    Returns:
      One fact per output.
    """
    env: dict[Any, Any] = dict(zip(body.jaxpr.invars, inputs, strict=True))
    read = lambda var: bottom if isinstance(var, jex.Literal) else env.get(var, bottom)
    for site in body.sites:
        facts = [read(var) for var in site.eqn.invars]
        env.update(zip(site.eqn.outvars, _site_facts(site, facts, combine, bottom), strict=True))
    return [read(var) for var in body.jaxpr.outvars]


def _site_facts(site: Site, facts: list[Any], combine: Combine, bottom: Any) -> list[Any]:
    eqn = site.eqn
    if site.kind == CALL:
        return [combine(eqn, (fact,)) for fact in forward(site.bodies[0], facts, combine, bottom)]
    if site.kind == SCAN:
        return _scan(site, facts, combine, bottom)
    if site.kind == WHILE:
        return _while(site, facts, combine, bottom)
    if site.kind == COND:
        index, operands = facts[0], facts[1:]
        per_branch = [forward(branch, operands, combine, bottom) for branch in site.bodies]
        if len(per_branch) == 1:
            return per_branch[0]
        return [combine(eqn, (index, *values)) for values in zip(*per_branch, strict=True)]
    return [combine(eqn, facts)] * len(eqn.outvars)


def _scan(site: Site, facts: list[Any], combine: Combine, bottom: Any) -> list[Any]:
    consts, carries = site.eqn.params["num_consts"], site.eqn.params["num_carry"]
    carry = facts[consts : consts + carries]
    while True:
        out = forward(site.bodies[0], [*facts[:consts], *carry, *facts[consts + carries :]], combine, bottom)
        wider = [combine(site.eqn, pair) for pair in zip(carry, out, strict=False)]
        if wider == carry:
            return [*carry, *out[carries:]]
        carry = wider


def _while(site: Site, facts: list[Any], combine: Combine, bottom: Any) -> list[Any]:
    eqn, (condition, body) = site.eqn, site.bodies
    cond_consts, body_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    split = cond_consts + body_consts
    carry = facts[split:]
    untouched = [a is b for a, b in zip(body.jaxpr.invars[body_consts:], body.jaxpr.outvars, strict=True)]
    while True:
        (again,) = forward(condition, [*facts[:cond_consts], *carry], combine, bottom)
        out = forward(body, [*facts[cond_consts:split], *carry], combine, bottom)
        wider = [
            before if same else combine(eqn, (before, after, again))
            for same, before, after in zip(untouched, carry, out, strict=True)
        ]
        if wider == carry:
            return carry
        carry = wider
