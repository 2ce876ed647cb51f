"""Rematerialisation where it saves memory: inside the bodies of scans."""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core as jex

from transferjax._types import Batch, Extra, Loss, Objective, Params
from transferjax.finetune._match import check_objective
from transferjax.program import interpret

_REMAT = ("remat", "remat2", "checkpoint")


def remat_scans(objective: Objective) -> Objective:
    """The same objective, whose scans keep their carries and compute the rest of every turn again for the gradients.

    A scan stacks all that its gradient reads, turn by turn; with this it stacks what enters a turn. Layers that are
    written one after another are left alone: on CPU XLA finds what is computed twice and computes it once, so that
    rematerialising them saves nothing.

    Args:
      objective: any objective; scans whose body is rematerialised already stay as they are.

    Returns:
      An objective with equal values and gradients, to float32 rounding.

    Raises:
      TransferError: ``objective`` cannot be called.

    >>> import jax, jax.numpy as jnp, transferjax as tj
    >>> def apply(params, extra, x, *, key=None, train=False):
    ...     return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0], extra
    >>> objective = remat_scans(tj.objectives.mean_squared_error(apply))
    >>> batch = {"inputs": jnp.ones((4, 3)), "labels": jnp.ones((4, 3))}
    >>> objective(jnp.zeros((2, 3, 3)), {}, batch, None, False).value.item()
    1.0

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
    """
    check_objective(objective)
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(objective)):
        objective = jax.tree_util.Partial(objective)
    return jax.tree_util.Partial(_call, objective)


def has_scan(jaxpr: jex.ClosedJaxpr) -> bool:
    """Whether :func:`remat_scans` would change a program.

    >>> import jax
    >>> has_scan(jax.make_jaxpr(lambda x: jax.lax.scan(lambda c, _: (c * x, c), x, length=3))(1.0))
    True
    """
    found = []

    def note(eqn, values):
        found.extend([eqn] if _is_plain_scan(eqn) else [])

    avals = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in jaxpr.jaxpr.invars]
    jax.eval_shape(lambda *arguments: interpret(jaxpr, arguments, rule=note), *avals)
    return bool(found)


def _call(objective: Objective, params: Params, extra: Extra, batch: Batch, key: Any, train: Any) -> Loss:
    run = lambda params, extra, batch, key: objective(params, extra, batch, key, train)
    jaxpr, outputs = jax.make_jaxpr(run, return_shape=True)(params, extra, batch, key)
    values = interpret(jaxpr, jax.tree.leaves((params, extra, batch, key)), rule=_rule)
    return jax.tree.unflatten(jax.tree.structure(outputs), values)


def _is_plain_scan(eqn: jex.JaxprEqn) -> bool:
    if eqn.primitive.name != "scan":
        return False
    return not all(inner.primitive.name in _REMAT for inner in eqn.params["jaxpr"].jaxpr.eqns)


def _rule(eqn: jex.JaxprEqn, values: list[Any]) -> list[Any] | None:
    if not _is_plain_scan(eqn):
        return None
    given = eqn.params
    consts, carries = given["num_consts"], given["num_carry"]
    fixed, first, stacked = values[:consts], values[consts : consts + carries], values[consts + carries :]

    @jax.checkpoint
    def turn(fixed, carry, row):
        outputs = interpret(given["jaxpr"], [*fixed, *carry, *row], rule=_rule)
        return outputs[:carries], outputs[carries:]

    last, rows = jax.lax.scan(
        lambda carry, row: turn(fixed, carry, row),
        first,
        stacked,
        length=given["length"],
        reverse=given["reverse"],
        unroll=given["unroll"],
    )
    return [*last, *rows]
