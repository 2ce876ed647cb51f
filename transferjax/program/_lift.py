"""Run a function on leaves that stand for a matrix, without building the matrix.

The function is traced with plain abstract arrays, so no framework ever sees a strange leaf. Then its jaxpr is run with
the leaves in place of the arrays: they flow through casts, transposes and reshapes to the product that uses them, and
there ``x @ (W + A @ B)`` becomes ``x @ W + (x @ A) @ B``. Anything else gets the array, and that is reported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from transferjax._errors import SelectionError
from transferjax.program._interpret import interpret, rebind
from transferjax.program._leaves import Stacked, is_lifted
from transferjax.program._lift_rules import Convolution, Lookup, Product, Refused, push
from transferjax.program._quantised import Quantised


class Materialised(NamedTuple):
    """Where a lifted leaf became an array.

    Attributes:
      path: of the leaf in the first argument.
      primitive: the operation that needed the array; ``"output"`` where the function returns the leaf.
      reason: why, in words.
    """

    path: str
    primitive: str
    reason: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Named:
    """A lifted leaf on its way through a program, and the path it came from."""

    leaf: Any
    path: str = dataclasses.field(metadata={"static": True})


def lift(function: Callable[..., Any], *, strict: bool = False) -> Callable[..., Any]:
    """A function that takes lifted leaves in its first argument wherever ``function`` takes arrays.

    Outputs and gradients are those of ``function`` on the dense leaves, to rounding; the cost is that of the side
    path. The leaves pass matrix products, convolutions without groups, look-ups of rows, ``scan``, ``cond``,
    ``jax.checkpoint`` and everything that only renames axes; what else needs one gets ``dense()``, among them
    functions with a derivative of their own, whose rule is never looked into.

    Args:
      function: ``(params, *rest) -> pytree of arrays``.
      strict: whether a leaf that must become an array raises instead.

    Returns:
      A function of the same arguments; only ``params`` may hold lifted leaves.

    Raises:
      SelectionError: (when called) the parts of a leaf do not fit each other; or, under ``strict``, a leaf must become
        an array: its path, the operation and the reason are named.

    >>> import jax.numpy as jnp
    >>> from transferjax.program import LowRank
    >>> leaf = LowRank(jnp.ones((3, 2)), jnp.ones((3, 1)), jnp.ones((1, 2)), 0.5)
    >>> lift(lambda params, x: x @ params["kernel"], strict=True)({"kernel": leaf}, jnp.ones(3)).tolist()
    [4.5, 4.5]
    """

    def lifted(params, *rest):
        return _run(function, params, rest, _Run(strict, []))

    return lifted


def materialised(function: Callable[..., Any], params: Any, *rest: Any) -> tuple[Materialised, ...]:
    """Where ``lift(function)(params, *rest)`` must build an array for a lifted leaf.

    Args:
      function: ``(params, *rest) -> pytree of arrays``.
      params: its first argument, with lifted leaves; shapes will do.
      rest: its other arguments; shapes will do.

    Returns:
      One :class:`Materialised` per leaf, operation and reason, in the order of the program; nothing is run.

    >>> import jax.numpy as jnp
    >>> from transferjax.program import LowRank
    >>> leaf = LowRank(jnp.ones((3, 2)), jnp.ones((3, 1)), jnp.ones((1, 2)))
    >>> materialised(lambda params, x: x @ jnp.tanh(params["kernel"]), {"kernel": leaf}, jnp.ones(3))
    (Materialised(path='kernel', primitive='tanh', reason='it is no linear operation that knows lifted leaves'),)
    """
    leaves, treedef = jax.tree.flatten((params, rest))
    arrays = {number: leaf for number, leaf in enumerate(leaves) if hasattr(leaf, "dtype") and hasattr(leaf, "shape")}
    run = _Run(False, [])

    def call(arrays):
        params, rest = jax.tree.unflatten(treedef, [arrays.get(number, leaf) for number, leaf in enumerate(leaves)])
        return _run(function, params, rest, run)

    jax.eval_shape(call, arrays)
    return tuple(dict.fromkeys(run.facts))


def _run(function: Any, params: Any, rest: Any, run: _Run) -> Any:
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_lifted)
    named = [
        _Named(leaf, jax.tree_util.keystr(keys, simple=True, separator="/")) if is_lifted(leaf) else leaf
        for keys, leaf in flat
    ]
    ours = [value for value in named if isinstance(value, _Named)]
    if not ours:
        return function(params, *rest)
    for value in ours:
        problem = value.leaf.problem()
        if problem is not None:
            raise SelectionError(
                f"the lifted leaf at '{value.path}' does not fit together: {problem}. Expected the shapes that "
                f"{type(value.leaf).__name__} documents."
            )

    def call(*arrays):
        found = iter(arrays)
        own = [next(found) if isinstance(value, _Named) else value for value in named]
        return function(jax.tree.unflatten(treedef, own), *rest)

    shapes = [jax.ShapeDtypeStruct(value.leaf.shape, value.leaf.dtype) for value in ours]
    jaxpr, made = jax.make_jaxpr(call, return_shape=True)(*shapes)
    return jax.tree.unflatten(jax.tree.structure(made), run.body(jaxpr, ours, "output"))


@dataclasses.dataclass(frozen=True)
class _Run:
    """One run of a program: whether arrays may be built, and where they were."""

    strict: bool
    facts: list[Materialised]

    def body(self, jaxpr: jex.ClosedJaxpr, values: Sequence[Any], primitive: str) -> list[Any]:
        """The outputs of a jaxpr, as arrays."""
        outputs = interpret(jaxpr, values, rule=self.rule)
        return [self.dense(value, primitive, "it is an output") for value in outputs]

    def rule(self, eqn: jex.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        """What one equation makes of lifted leaves; ``None`` where it meets none."""
        if not any(isinstance(value, _Named) for value in values):
            return None
        name = eqn.primitive.name
        try:
            with eqn.ctx.manager:
                return _rules[name](self, eqn, values) if name in _rules else _refuse(name)
        except Refused as refusal:
            return rebind(eqn, [self.dense(value, name, str(refusal)) for value in values])

    def dense(self, value: Any, primitive: str, reason: str) -> Any:
        """The array of a named leaf, noted; anything else as it is."""
        if not isinstance(value, _Named):
            return value
        if self.strict:
            raise SelectionError(
                f"the lifted leaf at '{value.path}' reaches '{primitive}', which it cannot pass: {reason}. Expected "
                "products only: leave the leaf out of the selector, or allow its array with strict=False."
            )
        self.facts.append(Materialised(value.path, primitive, reason))
        return value.leaf.dense()


def _refuse(name: str) -> Any:
    if "custom" in name:
        raise Refused("it has a derivative of its own")
    raise Refused("it is no linear operation that knows lifted leaves")


def _shape(eqn: jex.JaxprEqn) -> tuple[int, ...]:
    shape: Any = getattr(eqn.outvars[0].aval, "shape", ())
    return tuple(shape)


def _view(made: Any, value: _Named) -> list[Any]:
    if made is None:
        raise Refused("axes of both factors, or scaled and other axes, would become one")
    return [_Named(made, value.path)]


def _convert(run: _Run, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Refused("it is cast to a type that is no floating-point one")
    return _view(values[0].leaf.cast(dtype), values[0])


def _transpose(run: _Run, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    return _view(values[0].leaf.transpose(eqn.params["permutation"]), values[0])


def _reshape(run: _Run, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    new = _shape(eqn)
    if values[0].leaf.size != math.prod(new):
        raise Refused("its entries are repeated")
    if eqn.primitive.name == "broadcast_in_dim":
        places = eqn.params["broadcast_dimensions"]
        if tuple(new[place] for place in places) != values[0].leaf.shape:
            raise Refused("its entries are repeated")
    return _view(values[0].leaf.reshape(new), values[0])


def _same(run: _Run, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    return values


def _slice(run: _Run, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    """Neighbouring layers of a stack."""
    value, new = values[0], _shape(eqn)
    if not isinstance(value, _Named) or not isinstance(value.leaf, Stacked) or new[1:] != value.leaf.shape[1:]:
        raise Refused("a part is taken that is no layer of a stack")
    if eqn.params.get("strides") is not None:
        raise Refused("a part is taken that is no layer of a stack")
    start = values[1] if eqn.primitive.name == "dynamic_slice" else eqn.params["start_indices"][0]
    return [_Named(value.leaf.part(start, new[0]), value.path)]


def _dot_general(run: _Run, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    lhs, rhs = values
    (summed, batch), p = eqn.params["dimension_numbers"], eqn.params
    if p.get("out_sharding") is not None:
        raise Refused("the product says where its result lies")
    first = isinstance(lhs, _Named)
    if first and isinstance(rhs, _Named):
        rhs = run.dense(rhs, "dot_general", "it is multiplied by another lifted leaf")
    pair = lambda axes: tuple(map(tuple, axes[::-1] if first else axes))
    options = {name: p[name] for name in ("precision", "preferred_element_type")}
    value, x = (lhs, rhs) if first else (rhs, lhs)
    return [push(Product(x, pair(summed), pair(batch), first, options), value.leaf)]  # pyright: ignore


def _convolution(run: _Run, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    x, kernel = values
    if isinstance(x, _Named):
        raise Refused("it is the input of a convolution")
    return [push(Convolution(x, dict(eqn.params)), kernel.leaf)]


def _gather(run: _Run, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    table, rows = values
    return [push(Lookup(rows, dict(eqn.params)), table.leaf)]


def _scan(run: _Run, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    """The same loop with the leaves in its body: constants as they are, stacks one layer at a time."""
    p = eqn.params
    first, then = p["num_consts"], p["num_consts"] + p["num_carry"]
    consts = values[:first]
    carry = [run.dense(value, "scan", "it changes from one iteration to the next") for value in values[first:then]]
    arrays, joins = [], []
    for value in values[then:]:
        layers = value.leaf.layered() if isinstance(value, _Named) and isinstance(value.leaf, Quantised) else None
        value = value if layers is None else _Named(Stacked(layers), value.path)
        if isinstance(value, _Named) and not isinstance(value.leaf, Stacked):
            value = run.dense(value, "scan", "its first axis is run over, and it is no stack of layers")
        own, join = value.leaf.split() if isinstance(value, _Named) else ([value], lambda one: one[0])
        arrays.append(own)
        joins.append((join, getattr(value, "path", None)))

    def body(carry, slices):
        inner = [join(own) for (join, _), own in zip(joins, slices, strict=True)]
        inner = [leaf if path is None else _Named(leaf, path) for leaf, (_, path) in zip(inner, joins, strict=True)]
        outputs = run.body(p["jaxpr"], [*consts, *carry, *inner], "scan")
        return outputs[: p["num_carry"]], outputs[p["num_carry"] :]

    last, collected = jax.lax.scan(body, carry, arrays, p["length"], p["reverse"], p["unroll"])
    return [*last, *collected]


def _cond(run: _Run, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    """The same branches with the leaves in them; a choice by platform stays one."""
    index, *operands = values
    branches = [lambda *own, body=body: run.body(body, own, "cond") for body in eqn.params["branches"]]
    table = eqn.params.get("branches_platforms")
    if not table:
        return jax.lax.switch(index, branches, *operands)
    chosen = {name: branch for names, branch in zip(table, branches, strict=True) for name in names or ("default",)}
    return jax.lax.platform_dependent(*operands, **chosen)


def _checkpoint(run: _Run, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    p = eqn.params
    body = lambda *own: run.body(jex.ClosedJaxpr(p["jaxpr"], ()), own, "checkpoint")
    return jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(*values)


_rules: dict[str, Callable[[_Run, jex.JaxprEqn, list[Any]], list[Any]]] = {
    "convert_element_type": _convert,
    "transpose": _transpose,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims", "broadcast_in_dim"), _reshape),
    **dict.fromkeys(("copy", "copy_p", "sharding_constraint"), _same),
    **dict.fromkeys(("slice", "dynamic_slice"), _slice),
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "scan": _scan,
    "cond": _cond,
    **dict.fromkeys(("checkpoint", "remat", "remat2"), _checkpoint),
}
