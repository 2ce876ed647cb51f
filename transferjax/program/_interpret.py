"""Run a jaxpr equation by equation, with calls opened and everything that carries its own derivative left whole.

Hoisting and lifting are written on this. Opening a ``custom_vjp`` or ``remat`` would change gradients, so those are
bound again as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from transferjax.program import _compat

Rule = Callable[[jex.JaxprEqn, list[Any]], "Sequence[Any] | None"]


def interpret(
    jaxpr: jex.ClosedJaxpr, arguments: Sequence[Any], *, rule: Rule | None = None, platform: str | None = None
) -> list[Any]:
    """The outputs of a jaxpr.

    Args:
      jaxpr: from ``jax.make_jaxpr``.
      arguments: one value per input.
      rule: ``(eqn, values of its operands) -> outputs``, asked first for every equation but opened calls; ``None``
        means that the equation is bound as it is. A rule may let values flow that are no arrays, if it takes care of
        every equation that meets one.
      platform: of ``jax.lax.platform_dependent`` only this platform's branch is run; default: it stays a choice.

    Returns:
      One value per output.

    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda x: jax.jit(jax.numpy.sin)(x) + 1.0)(0.0)
    >>> [float(y) for y in interpret(jaxpr, [0.0])]
    [1.0]
    """
    return _run(jaxpr.jaxpr, jaxpr.consts, arguments, rule, platform)


def inline(jaxpr: jex.ClosedJaxpr, *, platform: str | None = None) -> jex.ClosedJaxpr:
    """The same program without calls: every equation of an opened call is one of the program's own.

    Args:
      jaxpr: from ``jax.make_jaxpr``.
      platform: as for :func:`interpret`.

    Returns:
      A closed jaxpr with the same inputs and outputs.

    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda x: jax.jit(lambda y: jax.numpy.sin(y) * 2.0)(x))(0.0)
    >>> [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns], [eqn.primitive.name for eqn in inline(jaxpr).jaxpr.eqns]
    (['jit'], ['sin', 'mul'])
    """
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in jaxpr.jaxpr.invars]
    return jax.make_jaxpr(lambda *arguments: interpret(jaxpr, arguments, platform=platform))(*avals)


def rebind(eqn: jex.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The outputs of one equation, bound as it is.

    >>> import jax
    >>> (eqn,) = jax.make_jaxpr(jax.numpy.negative)(1.0).jaxpr.eqns
    >>> [float(y) for y in rebind(eqn, [2.0])]
    [-2.0]
    """
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def opened(eqn: jex.JaxprEqn, platform: str | None = None) -> tuple[jex.ClosedJaxpr, int] | None:
    """The body of an equation that only calls it, and how many operands come before the body's own; else ``None``."""
    chosen = _compat.platform_branch(eqn, platform)
    if chosen is not None:
        return eqn.params["branches"][chosen], 1
    return _compat.called(eqn)


def _run(jaxpr: jex.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], rule: Rule | None, platform: Any) -> list:
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    read = lambda var: var.val if isinstance(var, jex.Literal) else env[var]
    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        body = opened(eqn, platform)
        if body is not None:
            outputs: Any = _run(body[0].jaxpr, body[0].consts, values[body[1] :], rule, platform)
        else:
            outputs = None if rule is None else rule(eqn, values)
            if outputs is None:
                outputs = rebind(eqn, values)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]
