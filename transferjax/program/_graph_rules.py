"""One equation as operations of the graph: what XLA makes of it before it fuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp

from transferjax.program._graph import (
    BARRIER,
    BROADCAST,
    ELEMENTWISE,
    POSITIONS,
    PRODUCT,
    REDUCES,
    SCATTERS,
    SUMMED_ROWS,
    Graph,
    Value,
    array,
)
from transferjax.program._operations import _names
from transferjax.program._walk import Site

_VIEWS = _names(
    "reshape squeeze expand_dims stop_gradient name copy copy_p sharding_constraint device_put pvary pcast reshard"
)
_NO_MATTER = _names("sharding out_sharding accuracy")
_BARE = ((), ())
"""The key of an operation without parameters and literals."""


def lowered(graph: Graph, site: Site, values: Sequence[Value | None]) -> list[Value]:
    """What an equation makes, one value per output that is needed; ``None`` among its operands is a literal."""
    eqn: Any = site.eqn
    name, arrays = eqn.primitive.name, [value for value in values if value is not None]
    avals = [var.aval for var, used in zip(eqn.outvars, site.outputs, strict=True) if used]
    if arrays and _is_view(eqn, arrays[0], avals[0] if avals else None):
        return [arrays[0]]
    rule = _RULES.get(name)
    if rule is not None:
        return rule(graph, site, arrays, avals)
    if name in ELEMENTWISE and avals[0].shape:
        return _elementwise(graph, site, values, avals[0])
    return _plain(graph, site, arrays, avals)


def _is_view(eqn: Any, value: Value, aval: Any) -> bool:
    """Whether a result is its operand under another shape."""
    name = eqn.primitive.name
    if name in _VIEWS:
        return True
    if name in ("convert_element_type", BROADCAST) or name in REDUCES:
        return value.size == math.prod(aval.shape) and value.dtype == aval.dtype
    if name != "transpose":
        return False
    long = [axis for axis in eqn.params["permutation"] if eqn.invars[0].aval.shape[axis] > 1]
    turned = (
        len(eqn.params["permutation"]) == 2 and value.maker is not None and value.maker.name in (PRODUCT, SUMMED_ROWS)
    )
    return turned or long == sorted(long)  # a product can be computed transposed


def _plain(graph: Graph, site: Site, arrays: Sequence[Value], avals: Sequence[Any]) -> list[Value]:
    eqn: Any = site.eqn
    params = tuple((name, str(eqn.params[name])) for name in sorted(eqn.params) if name not in _NO_MATTER)
    literals = tuple(str(var.val) for var in eqn.invars if isinstance(var, jex.Literal))
    outputs = graph.add(eqn.primitive.name, arrays, avals, None if eqn.effects else (params, literals))
    shapes = [var.aval.shape for var in eqn.invars if not isinstance(var, jex.Literal)]
    _note_views(outputs, zip(arrays, shapes, strict=False))
    return outputs


def _note_views(outputs: Sequence[Value], read: Iterable[tuple[Value, Sequence[int]]]) -> None:
    """Notes which arrays are read under another shape than theirs."""
    if outputs and outputs[0].maker is not None:
        other = lambda value, shape: value.shape != tuple(shape) and value.size == math.prod(shape)
        outputs[0].maker.viewed.update(value for value, shape in read if other(value, shape))


def _elementwise(graph: Graph, site: Site, values: Sequence[Value | None], aval: Any) -> list[Value]:
    """Operands of fewer elements, and numbers, are broadcast first."""
    eqn: Any = site.eqn
    name = eqn.primitive.name
    if name == "max" and any(_is_lowest(var) for var in eqn.invars) and any(v is not None for v in values):
        return [value for value in values if value is not None]
    if name in ("square", "integer_pow") and eqn.params.get("y", 2) == 2 and values[0] is not None:
        return graph.add("mul", [values[0], values[0]], [aval], _BARE)
    whole: list[Value] = []
    for var, value in zip(eqn.invars, values, strict=True):
        kind = array(aval.shape, var.aval.dtype)
        if value is None:
            whole.append(graph.constant(var.val, kind))
        elif value.size < math.prod(aval.shape):
            whole.append(graph.add(BROADCAST, [value], [kind], _axes(var.aval.shape, aval.shape))[0])
        else:
            whole.append(value)
    if name in ("erf", "erfc"):
        return [_error_function(graph, name, whole[0], aval)]
    outputs = _plain(graph, site, whole, [aval])
    _note_views(outputs, ((value, var.aval.shape) for var, value in zip(eqn.invars, whole, strict=True)))
    return outputs


def _is_lowest(var: Any) -> bool:
    return isinstance(var, jex.Literal) and jnp.ndim(var.val) == 0 and float(var.val) == -math.inf


def _error_function(graph: Graph, name: str, x: Value, aval: Any) -> Value:
    """Two polynomials, one of them times ``exp(-x * x)``, of which one is chosen."""
    (square,) = graph.add("mul", [x, x], [aval], _BARE)
    (negative,) = graph.add("neg", [square], [aval], _BARE)
    (bell,) = graph.add("exp", [negative], [aval], _BARE)
    return graph.add("select_n", [x, bell], [aval], name)[0]


def _axes(small: Sequence[int], large: Sequence[int]) -> tuple[int, ...]:
    """The axes of the large shape along which the small one varies, its last axes being the same ones."""
    padded = (*(1,) * (len(large) - len(small)), *small)
    return tuple(axis for axis, (a, b) in enumerate(zip(padded, large, strict=True)) if a == b and b > 1)


def _broadcast(graph: Graph, site: Site, arrays: Sequence[Value], avals: Sequence[Any]) -> list[Value]:
    eqn: Any = site.eqn
    (aval,) = avals
    if not arrays:
        return [graph.constant(getattr(eqn.invars[0], "val", None), array(aval.shape, aval.dtype))]
    sizes = zip(eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape, strict=True)
    axes = tuple(axis for axis, size in sizes if size == aval.shape[axis] and size > 1)
    return graph.add(BROADCAST, arrays, [array(aval.shape, aval.dtype)], axes)


def _barrier(graph: Graph, site: Site, arrays: Sequence[Value], avals: Sequence[Any]) -> list[Value]:
    if len(arrays) != len(avals):
        return graph.add("copy", arrays, avals)
    return graph.add(BARRIER, arrays, avals, bases=tuple(arrays))


def _random_bits(graph: Graph, site: Site, arrays: Sequence[Value], avals: Sequence[Any]) -> list[Value]:
    """Two words per element, then folded into one."""
    words = graph.add("threefry2x32", arrays, [array(avals[0].shape, jnp.uint32)] * 2)
    return graph.add("xor", words, avals, _BARE)


def _scatter(graph: Graph, site: Site, arrays: Sequence[Value], avals: Sequence[Any]) -> list[Value]:
    eqn: Any = site.eqn
    target = eqn.invars[0]
    if isinstance(target, jex.Literal):
        return graph.add(eqn.primitive.name, arrays, avals)
    copied = graph.copied(arrays[0], target.aval)
    return graph.add(eqn.primitive.name, [copied, *arrays[1:]], avals, bases=(copied,))


def _pooling_gradient(graph: Graph, site: Site, arrays: Sequence[Value], avals: Sequence[Any]) -> list[Value]:
    """The place of every window's largest element, from one array of positions per axis; then a scatter. Padding is
    written, and the result cut to size afterwards."""
    source, operand = arrays
    padding = site.eqn.params["padding"]
    shape = [size + low + high for size, (low, high) in zip(operand.shape, padding, strict=True)]
    whole, windows = array(shape, operand.dtype), array(source.shape, jnp.int32)
    places = [graph.add(POSITIONS, [], [array(shape, jnp.int32)], axis)[0] for axis in range(len(shape))]
    padded = operand if whole.shape == operand.shape else graph.add("pad", [operand], [whole])[0]
    kinds = [array(source.shape, operand.dtype), *[windows] * len(places)]
    found = graph.add("reduce_window", [padded, *places], kinds)
    indices = graph.add("concatenate", found[1:], [array((source.size, len(places)), jnp.int32)])
    copied = graph.copied(graph.zeros(whole), whole)
    scattered = graph.add("scatter_add", [copied, *indices, source], [whole], bases=(copied,))
    return scattered if padded is operand else graph.add("slice", scattered, avals)


def _convolution(graph: Graph, site: Site, arrays: Sequence[Value], avals: Sequence[Any]) -> list[Value]:
    """Operands and result have the batch first and the features last, kernels inputs before outputs; all else is
    transposed."""
    numbers, (aval,) = site.eqn.params["dimension_numbers"], avals
    if len(arrays) < 2:
        return _plain(graph, site, arrays, avals)
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    orders = ((lhs[0], *lhs[2:], lhs[1]), (*rhs[2:], rhs[1], rhs[0]))
    read = [_turned(graph, value, order) for value, order in zip(arrays, orders, strict=True)]
    image, window = (math.prod(kept.shape[axis] for axis in spec[2:]) for kept, spec in zip(arrays, (lhs, rhs)))
    if window > image and not (arrays[1].maker and arrays[1].maker.name == "rev"):  # computed with the roles exchanged
        read[1] = graph.add("rev", [read[1]], [array(read[1].shape, read[1].dtype)])[0]
    order = (out[0], *out[2:], out[1])
    kind = array([aval.shape[axis] for axis in order], aval.dtype)
    params = tuple((name, str(site.eqn.params[name])) for name in sorted(site.eqn.params) if name not in _NO_MATTER)
    (made,) = graph.add(site.eqn.primitive.name, read, [kind], params)
    return [_turned(graph, made, [order.index(axis) for axis in range(len(order))])]


def _turned(graph: Graph, value: Value, order: Sequence[int]) -> Value:
    """An array with its axes in another order: itself where no long axis moves."""
    long = [axis for axis in order if len(value.shape) == len(order) and value.shape[axis] > 1]
    if long == sorted(long):
        return value
    kind = array([value.shape[axis] for axis in order], value.dtype)
    return graph.add("transpose", [value], [kind], tuple(order))[0]


def _split(graph: Graph, site: Site, arrays: Sequence[Value], avals: Sequence[Any]) -> list[Value]:
    numbers = [number for number, used in enumerate(site.outputs) if used]
    params = str(site.eqn.params)
    return [graph.add("slice", arrays, [aval], (params, n))[0] for n, aval in zip(numbers, avals, strict=True)]


def _product(graph: Graph, site: Site, arrays: Sequence[Value], avals: Sequence[Any]) -> list[Value]:
    """Operands are read as ``[batch, rows, summed]`` and ``[batch, summed, columns]``; others are transposed first."""
    eqn: Any = site.eqn
    if len(arrays) < 2:
        return graph.add(PRODUCT, arrays, avals)
    summed, batch = eqn.params["dimension_numbers"]
    read, viewed, frees, name = [], set(), [], PRODUCT
    for value, var, c, b, first in zip(arrays, eqn.invars, summed, batch, (False, True), strict=True):
        shape = var.aval.shape
        free = [axis for axis in range(len(shape)) if axis not in c and axis not in b]
        orders = [[*b, *free, *c], [*b, *c, *free]]
        wanted = orders[first]
        long = lambda axes, shape=shape: [axis for axis in axes if shape[axis] > 1]
        ordered = lambda axes, long=long: long(axes) == sorted(long(axes))
        if value.maker is not None and value.maker.name == "transpose" and len(shape) == 2:
            read.append(value.maker.inputs[0])
        elif ordered(wanted):
            read.append(value)
        elif ordered(orders[not first]) and len(long(free)) <= 1 and len(long(c)) <= 1:
            read.append(value)
            name = name if first or b else SUMMED_ROWS
        else:
            kind = array([shape[axis] for axis in wanted], value.dtype)
            read.append(graph.add("transpose", [value], [kind], tuple(wanted))[0])
        if len(free) > 1 or len(c) > 1 or value.shape != tuple(shape):
            viewed.add(value)
        frees.append(math.prod(shape[axis] for axis in free))
    outputs = graph.add(name, read, avals, str(eqn.params["dimension_numbers"]))
    outputs[0].shape = (*(eqn.invars[0].aval.shape[axis] for axis in batch[0]), *frees)
    if outputs[0].maker is not None:
        outputs[0].maker.viewed |= viewed
    return outputs


_RULES: dict[str, Callable[[Graph, Site, Sequence[Value], Sequence[Any]], list[Value]]] = {
    BROADCAST: _broadcast,
    BARRIER: _barrier,
    PRODUCT: _product,
    "conv_general_dilated": _convolution,
    "random_bits": _random_bits,
    "select_and_scatter_add": _pooling_gradient,
    "split": _split,
    **dict.fromkeys(SCATTERS, _scatter),
}
