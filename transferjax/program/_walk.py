"""The live part of a jaxpr: what is left after dead code is removed, with every body opened.

XLA runs only equations whose results are needed. A jaxpr made by tracing still holds the others (a gradient that
nobody asked for, a metric that was dropped), so everything that is counted or proved here starts from :func:`live`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.extend.core as jex

from transferjax.program import _compat

CALL, SCAN, WHILE, COND, OPAQUE, LEAF = "call", "scan", "while", "cond", "opaque", "leaf"

# Primitives whose inner jaxpr only says how two scalars combine: they are costed as one operation.
_SCALAR_BODIES = {
    *("reduce", "reduce_window", "select_and_scatter", "argmin", "argmax", "sort"),
    *("scatter", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub"),
    *("scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"),
    *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"),
}


@dataclasses.dataclass(frozen=True)
class Site:
    """One equation that runs.

    Attributes:
      eqn: the equation.
      kind: ``"leaf"`` (one operation), ``"call"``, ``"scan"``, ``"while"`` (bodies: condition, body), ``"cond"``
        (one body per branch that can be taken) or ``"opaque"`` (bodies whose operands are not known).
      outputs: which of its outputs are needed.
      bodies: the live part of each inner jaxpr.
    """

    eqn: jex.JaxprEqn
    kind: str
    outputs: tuple[bool, ...]
    bodies: tuple[Body, ...] = ()


@dataclasses.dataclass(frozen=True)
class Body:
    """The live part of one jaxpr.

    Attributes:
      jaxpr: the jaxpr with its dead equations still in it.
      sites: the equations that run, in order.
      inputs: which inputs are needed.
    """

    jaxpr: jex.Jaxpr
    sites: tuple[Site, ...]
    inputs: tuple[bool, ...]


def live(
    jaxpr: jex.ClosedJaxpr | jex.Jaxpr, outputs: Sequence[bool] | None = None, *, platform: str | None = None
) -> Body:
    """The equations of a jaxpr that reach an output (or have an effect), inner jaxprs included.

    Args:
      jaxpr: from ``jax.make_jaxpr`` or ``jax.jit(f).trace(...).jaxpr``.
      outputs: which outputs are wanted; default: all.
      platform: ``"cpu"``, ``"cuda"``, ``"tpu"`` ...: of ``jax.lax.platform_dependent`` only its branch is kept.

    Returns:
      A :class:`Body`.

    >>> import jax, jax.numpy as jnp
    >>> jaxpr = jax.make_jaxpr(lambda x: (jnp.sin(x), jnp.cos(x))[0])(1.0)
    >>> [site.eqn.primitive.name for site in live(jaxpr).sites]
    ['sin']
    """
    inner = _compat.open_jaxpr(jaxpr)
    wanted = tuple(outputs) if outputs is not None else (True,) * len(inner.outvars)
    needed = {var for var, keep in zip(inner.outvars, wanted, strict=True) if keep and isinstance(var, jex.Var)}
    sites: list[Site] = []
    for eqn in reversed(inner.eqns):
        used = tuple(var in needed for var in eqn.outvars)
        effects = _compat.has_effects(eqn)
        if not any(used) and not effects:
            continue
        site, operands = _site(eqn, (True,) * len(used) if effects else used, platform)
        sites.append(site)
        needed.update(var for var, keep in zip(eqn.invars, operands, strict=True) if keep and isinstance(var, jex.Var))
    return Body(inner, tuple(reversed(sites)), tuple(var in needed for var in inner.invars))


def _site(eqn: jex.JaxprEqn, used: tuple[bool, ...], platform: str | None) -> tuple[Site, tuple[bool, ...]]:
    """An equation with its bodies opened, and which of its operands it needs."""
    name, everything = eqn.primitive.name, (True,) * len(eqn.invars)
    if name == "scan":
        return _scan_site(eqn, used, platform)
    if name == "while":
        return _while_site(eqn, used, platform)
    if name == "cond":
        return _cond_site(eqn, used, platform)
    inner = [] if name in _SCALAR_BODIES else _compat.bodies(eqn)
    if not inner:
        return Site(eqn, LEAF, used), everything
    if len(inner) == 1 and _same_arity(eqn, inner[0]) and name != "pallas_call":
        body = live(inner[0], used, platform=platform)
        return Site(eqn, CALL, used, (body,)), body.inputs
    return Site(eqn, OPAQUE, used, tuple(live(jaxpr, platform=platform) for jaxpr in inner)), everything


def _same_arity(eqn: jex.JaxprEqn, jaxpr: jex.Jaxpr) -> bool:
    return len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars)


def _scan_site(eqn, used, platform):
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    body_used = used
    while True:  # a carry is needed when the next turn of the loop needs it
        body = live(eqn.params["jaxpr"], body_used, platform=platform)
        carried = body.inputs[consts : consts + carries]
        wider = tuple(a or b for a, b in zip(body_used, carried)) + body_used[carries:]
        if wider == body_used:
            break
        body_used = wider
    inputs = body.inputs[:consts] + body_used[:carries] + body.inputs[consts + carries :]
    return Site(eqn, SCAN, body_used, (body,)), inputs


def _while_site(eqn, used, platform):
    cond_consts, body_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    condition = live(eqn.params["cond_jaxpr"], platform=platform)
    used = tuple(a or b for a, b in zip(used, condition.inputs[cond_consts:], strict=True))
    while True:
        body = live(eqn.params["body_jaxpr"], used, platform=platform)
        wider = tuple(a or b for a, b in zip(used, body.inputs[body_consts:], strict=True))
        if wider == used:
            break
        used = wider
    inputs = condition.inputs[:cond_consts] + body.inputs[:body_consts] + used
    return Site(eqn, WHILE, used, (condition, body)), inputs


def _cond_site(eqn, used, platform):
    branches = eqn.params["branches"]
    chosen = _compat.platform_branch(eqn, platform)
    if chosen is not None:
        branches = (branches[chosen],)
    inner = tuple(live(branch, used, platform=platform) for branch in branches)
    operands = tuple(any(keep) for keep in zip(*(body.inputs for body in inner), strict=True))
    return Site(eqn, COND, used, inner), (len(branches) > 1, *operands)
