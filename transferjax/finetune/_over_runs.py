"""One function over many runs: what they share is computed once, the rest for each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from transferjax.program import inline, rebind

SMALL = 1 << 25
"""Bytes of all that runs compute up to which the CPU runs them side by side: a loop costs more than they do."""


def over_runs(function: Callable[..., Any], states: Any, inputs: Any, shared: Any) -> tuple[Any, Any]:
    """``function(state, input, shared) -> (state, output)`` for every run, in one program.

    An accelerator runs all of them side by side, and so does the CPU where everything that is computed for the runs
    is small (``SMALL``). A larger one runs one after another there, so that the temporary memory is that of one run;
    each new state is written over the old one. Either way, what depends on ``shared`` alone is computed once. The
    function is traced once.

    Args:
      function: keeps the shapes and dtypes of the state.
      states: a tree of arrays ``[K, ...]``.
      inputs: a tree of arrays ``[K, ...]``, not all of both trees empty.
      shared: a tree of arrays that all runs read.

    Returns:
      The new states and the outputs, each ``[K, ...]``.

    >>> import jax.numpy as jnp
    >>> states, outputs = over_runs(lambda s, i, shared: (s + shared, s * i), jnp.arange(2), jnp.array([3, 4]), 10)
    >>> states.tolist(), outputs.tolist()
    ([10, 11], [0, 4])
    """
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), (states, inputs))
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*first, shared)
    treedef, common = jax.tree.structure(shapes), jax.tree.leaves(shared)
    one_by_one = lambda states, inputs, *common: _one_by_one(jaxpr, treedef, states, inputs, common)
    side_by_side = lambda states, inputs, *common: _side_by_side(jaxpr, treedef, states, inputs, common)
    count = len(jax.tree.leaves((states, inputs))[0])
    if count * run_bytes(inline(jaxpr, platform="cpu").jaxpr, len(common)) <= SMALL:
        return side_by_side(states, inputs, *common)
    return jax.lax.platform_dependent(states, inputs, *common, cpu=one_by_one, default=side_by_side)


def run_bytes(jaxpr: jex.Jaxpr, shared: int) -> float:
    """Bytes of every value that a program makes of more than its last inputs; infinite where it loops.

    >>> import jax, jax.numpy as jnp
    >>> run_bytes(jax.make_jaxpr(lambda x, shared: x + jnp.sin(shared))(1.0, 0.0).jaxpr, 1)
    4
    """
    own, total = set(jaxpr.invars[: len(jaxpr.invars) - shared]), 0
    for eqn in jaxpr.eqns:
        if not any(var in own for var in eqn.invars if not isinstance(var, jex.Literal)):
            continue
        own.update(eqn.outvars)
        bodies = [body.jaxpr for value in eqn.params.values() for body in _bodies(value)]
        if bodies and eqn.primitive.name in ("scan", "while"):
            return math.inf
        made: list[Any] = [var.aval for var in eqn.outvars]
        total += sum(one.size * one.dtype.itemsize for one in made)
        total += sum(run_bytes(body, 0) for body in bodies)
    return total


def _bodies(value: Any) -> list[jex.ClosedJaxpr]:
    return [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, jex.ClosedJaxpr)]


def _side_by_side(jaxpr: jex.ClosedJaxpr, treedef: Any, states: Any, inputs: Any, common: Sequence[Any]) -> Any:
    one = lambda run: jex.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(run), *common)
    return jax.tree.unflatten(treedef, jax.vmap(one)((states, inputs)))


def _one_by_one(jaxpr: jex.ClosedJaxpr, treedef: Any, states: Any, inputs: Any, common: Sequence[Any]) -> Any:
    rest = split_shared(inline(jaxpr, platform="cpu"), common)

    def one(states, number):
        at = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)
        state, output = jax.tree.unflatten(treedef, rest(jax.tree.leaves(jax.tree.map(at, (states, inputs)))))
        write = lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, number, 0)
        return jax.tree.map(write, states, state), output

    return jax.lax.scan(one, states, jnp.arange(len(jax.tree.leaves((states, inputs))[0])))


# Cheap, and often larger than what it is made of: a widened or broadcast weight is made anew for each run, never held.
_LIGHT = frozenset(
    (
        *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "slice", "convert_element_type"),
        *("iota", "copy", "stop_gradient", "neg", "add", "add_any", "sub", "mul", "div", "max", "min"),
    )
)


def split_shared(jaxpr: jex.ClosedJaxpr, shared: Sequence[Any]) -> Callable[[Sequence[Any]], list[Any]]:
    """Runs the equations that need only the last inputs now; the function that is returned runs the others.

    Cheap elementwise work on these inputs themselves stays with the others: its results are not worth their memory.

    Args:
      jaxpr: without calls, from ``transferjax.program.inline``.
      shared: the values of its last inputs.

    Returns:
      ``rest(values of the first inputs) -> outputs``.

    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda x, shared: x + jax.numpy.sin(shared))(1.0, 0.0)
    >>> float(split_shared(jaxpr, [0.0])([1.0])[0])
    1.0
    """
    inner, first = jaxpr.jaxpr, len(jaxpr.jaxpr.invars) - len(shared)
    known: dict[Any, Any] = dict(zip([*inner.constvars, *inner.invars[first:]], [*jaxpr.consts, *shared], strict=True))
    light, later = set(known), []
    for eqn in inner.eqns:
        operands = [var for var in eqn.invars if not isinstance(var, jex.Literal)]
        now = all(var in known for var in operands) and not eqn.effects
        cheap = now and eqn.primitive.name in _LIGHT and all(var in light for var in operands)
        if now:
            known.update(zip(eqn.outvars, _bound(eqn, known), strict=True))
        if cheap:
            light.update(eqn.outvars)
        if cheap or not now:
            later.append(eqn)

    def rest(values):
        env = {**known, **dict(zip(inner.invars[:first], values, strict=True))}
        for eqn in later:
            env.update(zip(eqn.outvars, _bound(eqn, env), strict=True))
        return [var.val if isinstance(var, jex.Literal) else env[var] for var in inner.outvars]

    return rest


def _bound(eqn: Any, env: dict[Any, Any]) -> list[Any]:
    return rebind(eqn, [var.val if isinstance(var, jex.Literal) else env[var] for var in eqn.invars])
