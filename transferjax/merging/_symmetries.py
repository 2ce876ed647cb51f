"""The permutations of hidden units that leave a network's function as it is, found in its jaxpr."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex

from transferjax._errors import TransferError
from transferjax._types import Model
from transferjax.merging._axes import Axes
from transferjax.merging._axis_rules import Value, results, shape_of, unite, unknown
from transferjax.merging._permutations import Entry, Spec, as_tree
from transferjax.program import Body, Site, live
from transferjax.tree import flatten, natural


def permutation_spec(model: Model, inputs: Any) -> Spec:
    """The groups of axes of ``params`` and ``extra`` that may be permuted together without changing the outputs.

    The forward pass in inference mode is traced, and the identity of each axis followed through it: a product unites
    the axes that it sums over, a sum or any other elementwise operation (a residual stream, a BatchNorm) unites the
    axes of its operands, a reshape takes axes apart (heads and the features of a head) or joins them. Axes that reach
    the inputs or the outputs stay as they are, and so do those that meet an operation which is not known.
    So a group may be missing, but none is wrong: any permutation of a group changes the outputs by rounding only.

    Args:
      model: the Model; arrays or shapes.
      inputs: one batch of inputs, arrays or ``jax.ShapeDtypeStruct``; only shapes and dtypes matter.

    Returns:
      ``{group: [(path, axis), ...]}``, plain data that may be edited, with paths of ``params`` and,
      under ``extra/``, of ``extra``. ``(path, axis, (outer, inner))`` where the units are not the whole axis: it holds
      ``outer`` runs of all units, each unit ``inner`` entries long.

    Raises:
      TransferError: no axis may be permuted.

    >>> import jax.numpy as jnp
    >>> def apply(params, extra, inputs, *, key=None, train=False):
    ...     return jnp.tanh(inputs @ params["dense1"]) @ params["dense2"], extra
    >>> params = {"dense1": jnp.ones((4, 8)), "dense2": jnp.ones((8, 3))}
    >>> permutation_spec(Model(apply, None, params, {}), jnp.ones((1, 4)))
    {'P0': [('dense1', 1), ('dense2', 0)]}
    """
    tree = as_tree(model)
    flat, treedef = flatten(tree)

    def outputs(leaves, inputs):
        whole = jax.tree.unflatten(treedef, leaves)
        extra = whole.pop("extra") if jax.tree.leaves(model.extra) else model.extra
        return model.apply(whole, extra, inputs)[0]

    closed = jax.make_jaxpr(outputs)([leaf for _, leaf in flat], inputs)
    body = live(closed)
    axes = Axes()
    values = [axes.value(shape_of(var), fixed=place >= len(flat)) for place, var in enumerate(body.jaxpr.invars)]
    for value in _forward(axes, body, values):
        axes.fix(*(value or ()))
    used = [(path, values[n]) for n, (path, _) in enumerate(flat) if body.inputs[n]]
    spec = _spec(axes, sorted(used, key=lambda item: natural(item[0])))
    if not spec:
        raise TransferError(
            f"permutation_spec() found no axis that may be permuted in {len(flat)} leaves: every axis reaches the "
            "inputs or the outputs, or an operation that is not followed. Write the spec by hand: "
            "{'P0': [('dense1/kernel', 1), ('dense1/bias', 0), ('dense2/kernel', 0)]}."
        )
    return spec


def _spec(axes: Axes, leaves: list[tuple[str, Value]]) -> Spec:
    """The free classes by name, those that no parameter has left out."""
    found: dict[int, list[Entry]] = {}
    for path, value in leaves:
        for place, axis in enumerate(value):
            factors, outer = axes.leaves(axis), 1
            total = math.prod(map(axes.size, factors))
            for one in factors:
                size = axes.size(one)
                whole = len(factors) == 1
                entry = (path, place) if whole else (path, place, (outer, total // (outer * size)))
                outer *= size
                if not axes.is_fixed(one):
                    found.setdefault(one, []).append(entry)
    kept = [entries for entries in found.values() if any(not entry[0].startswith("extra/") for entry in entries)]
    return {f"P{number}": entries for number, entries in enumerate(kept)}


def _forward(axes: Axes, body: Body, inputs: Sequence[Value | None]) -> list[Value | None]:
    """The axes of the results of a program; ``None`` for what nobody needs."""
    env: dict[Any, Value | None] = {var: axes.value(shape_of(var), fixed=True) for var in body.jaxpr.constvars}
    env.update(zip(body.jaxpr.invars, inputs, strict=True))
    read = lambda var: axes.value(shape_of(var), fixed=True) if isinstance(var, jex.Literal) else env.get(var)
    for site in body.sites:
        operands = [read(var) for var in site.eqn.invars]
        env.update(zip(site.eqn.outvars, _site(axes, site, operands), strict=True))
    return [read(var) for var in body.jaxpr.outvars]


def _site(axes: Axes, site: Site, operands: list[Value | None]) -> list[Value | None]:
    eqn = site.eqn
    if site.kind == "leaf":
        return list(results(axes, eqn, [value or [] for value in operands]))
    if site.kind == "call" and eqn.primitive.name != "shard_map":  # whose body sees parts of the arrays
        return _forward(axes, site.bodies[0], operands)
    if site.kind == "cond":
        branches = [_forward(axes, body, operands[1:]) for body in site.bodies]
        for other in branches[1:]:
            _unite_all(axes, branches[0], other)
        return branches[0]
    if site.kind == "scan":
        return _scan(axes, site, operands)
    if site.kind == "while":
        return _while(axes, site, operands)
    return list(unknown(axes, eqn, [value or [] for value in operands]))


def _scan(axes: Axes, site: Site, operands: list[Value | None]) -> list[Value | None]:
    """One turn stands for all: what is carried is permuted alike before and after it."""
    params = site.eqn.params
    consts, end = params["num_consts"], params["num_consts"] + params["num_carry"]
    for value in operands[end:]:
        axes.fix(*(value or [])[:1])
    turns = [None if value is None else value[1:] for value in operands[end:]]
    out = _forward(axes, site.bodies[0], [*operands[:end], *turns])
    carried = end - consts
    _unite_all(axes, operands[consts:end], out[:carried])
    length = axes.new(params["length"], fixed=True)
    return [*operands[consts:end], *(None if value is None else [length, *value] for value in out[carried:])]


def _while(axes: Axes, site: Site, operands: list[Value | None]) -> list[Value | None]:
    params, (condition, body) = site.eqn.params, site.bodies
    first = params["cond_nconsts"]
    start = first + params["body_nconsts"]
    _forward(axes, condition, [*operands[:first], *operands[start:]])
    _unite_all(axes, operands[start:], _forward(axes, body, operands[first:]))
    return operands[start:]


def _unite_all(axes: Axes, some: list[Value | None], others: list[Value | None]) -> None:
    for a, b in zip(some, others, strict=True):
        if a is not None and b is not None:
            unite(axes, a, b)
