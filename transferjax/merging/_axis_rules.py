"""What each primitive says about the axes of its operands and results. What is not listed fixes all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core as jex

from transferjax.merging._axes import Axes, Axis

Value = list[Axis]
Rule = Callable[[Axes, jex.JaxprEqn, Sequence[Value]], list[Value]]

_ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil",
    "clamp", "clz", "conj", "convert_element_type", "copy", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv",
    "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "lgamma", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "name", "ne", "neg", "nextafter", "not", "or", "population_count",
    "pow", "real", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sharding_constraint", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub",
    "tan", "tanh", "xor",
)  # fmt: skip
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor")
_WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")


def results(axes: Axes, eqn: jex.JaxprEqn, operands: Sequence[Value]) -> list[Value]:
    """The axes of the results of one equation that calls nothing.

    Args:
      axes: what is known of all axes; learns what this equation asks for.
      eqn: the equation.
      operands: the axes of its operands.

    Returns:
      The axes of each result.
    """
    rule = _RULES.get(eqn.primitive.name)
    return unknown(axes, eqn, operands) if rule is None else rule(axes, eqn, operands)


def unknown(axes: Axes, eqn: jex.JaxprEqn, operands: Sequence[Value]) -> list[Value]:
    """Nothing is known about this equation: every axis of its operands and results is fixed."""
    for value in operands:
        axes.fix(*value)
    return [axes.value(shape_of(var), fixed=True) for var in eqn.outvars]


def shape_of(var: Any) -> tuple[int, ...]:
    """Of a variable or literal of a jaxpr; one that is no array (a token) has no axes."""
    return tuple(getattr(var.aval, "shape", ()))


def unite(axes: Axes, a: Value, b: Value) -> None:
    """Two values of one shape are permuted alike."""
    for mine, yours in zip(a, b, strict=True):
        axes.unite(mine, yours)


def _shape(eqn: jex.JaxprEqn, operand: int = 0) -> tuple[int, ...]:
    return shape_of(eqn.invars[operand])


def _elementwise(axes, eqn, operands):
    shape = shape_of(eqn.outvars[0])
    out = axes.value(shape)
    for var, value in zip(eqn.invars, operands, strict=True):
        for place, (size, axis) in enumerate(zip(shape_of(var), value, strict=True)):  # scalars have no axes
            if size == shape[place]:  # else it is 1, and the same for all
                axes.unite(out[place], axis)
    return [out]


def _alike(axes, eqn, operands):
    return list(operands)


def _broadcast(axes, eqn, operands):
    out = axes.value(eqn.params["shape"])
    for size, axis, place in zip(_shape(eqn), operands[0], eqn.params["broadcast_dimensions"], strict=True):
        if size == eqn.params["shape"][place]:
            out[place] = axis
    return [out]


def _reshape(axes, eqn, operands):
    if eqn.params.get("dimensions") is not None:
        return unknown(axes, eqn, operands)
    return [axes.regroup(operands[0], eqn.params["new_sizes"])]


def _transpose(axes, eqn, operands):
    return [[operands[0][place] for place in eqn.params["permutation"]]]


def _squeeze(axes, eqn, operands):
    return [[axis for place, axis in enumerate(operands[0]) if place not in eqn.params["dimensions"]]]


def _reduce(axes, eqn, operands):
    return [[axis for place, axis in enumerate(operands[0]) if place not in eqn.params["axes"]]]


def _arg_reduce(axes, eqn, operands):
    axes.fix(*(operands[0][place] for place in eqn.params["axes"]))
    return _reduce(axes, eqn, operands)


def _iota(axes, eqn, operands):
    shape, along = eqn.params["shape"], eqn.params["dimension"]
    return [[axes.new(size, fixed=place == along) for place, size in enumerate(shape)]]


def _cumulative(axes, eqn, operands):
    axes.fix(operands[0][eqn.params["axis"]])
    return [operands[0]]


def _sort(axes, eqn, operands):
    (value,) = _elementwise(axes, eqn, operands)
    axes.fix(value[eqn.params["dimension"]])
    return [value] * len(operands)


def _reverse(axes, eqn, operands):
    axes.fix(*(operands[0][place] for place in eqn.params["dimensions"]))
    return [operands[0]]


def _resized(axes, eqn, value, kept: Sequence[bool]) -> list[Value]:
    """The axes that are kept, and new fixed ones for the others."""
    axes.fix(*(axis for axis, keep in zip(value, kept, strict=True) if not keep))
    sizes = shape_of(eqn.outvars[0])
    return [[axis if keep else axes.new(n, fixed=True) for axis, keep, n in zip(value, kept, sizes, strict=True)]]


def _pad(axes, eqn, operands):
    return _resized(axes, eqn, operands[0], [tuple(one) == (0, 0, 0) for one in eqn.params["padding_config"]])


def _window(axes, eqn, operands):
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    ones = [set(steps) == {1} for steps in zip(*(eqn.params[name] for name in names), strict=True)]
    kept = [one and tuple(pad) == (0, 0) for one, pad in zip(ones, eqn.params["padding"], strict=True)]
    return _resized(axes, eqn, operands[0], kept)


def _slice(axes, eqn, operands):
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    out = []
    for n, start, end, stride, axis in zip(_shape(eqn), starts, ends, strides, operands[0], strict=True):
        size = -(-(end - start) // stride)
        if size == n:
            out.append(axis)
        elif stride == 1 and size and n % size == 0 and start % size == 0:
            out.append(axes.block(axis, size, n // size))
        else:
            axes.fix(axis)
            out.append(axes.new(size, fixed=True))
    return [out]


def _split(axes, eqn, operands):
    sizes, along = eqn.params["sizes"], eqn.params["axis"]
    if len(set(sizes)) == 1 and sizes[0]:
        part = axes.block(operands[0][along], sizes[0], len(sizes))
        return [[*operands[0][:along], part, *operands[0][along + 1 :]] for _ in sizes]
    axes.fix(operands[0][along])
    parts = [axes.new(size, fixed=True) for size in sizes]
    return [[*operands[0][:along], part, *operands[0][along + 1 :]] for part in parts]


def _concatenate(axes, eqn, operands):
    along = eqn.params["dimension"]
    sizes = [shape_of(var)[along] for var in eqn.invars]
    joined = axes.new(sum(sizes))
    if len(set(sizes)) == 1 and sizes[0]:
        part = axes.block(joined, sizes[0], len(sizes))
        for value in operands:
            axes.unite(part, value[along])
    else:
        axes.fix(joined, *(value[along] for value in operands))
    others = [[*value[:along], *value[along + 1 :]] for value in operands]
    for other in others[1:]:
        unite(axes, others[0], other)
    return [[*others[0][:along], joined, *others[0][along:]]]


def _dynamic_slice(axes, eqn, operands):
    kept = [a == b for a, b in zip(_shape(eqn), eqn.params["slice_sizes"], strict=True)]
    return _resized(axes, eqn, operands[0], kept)


def _dynamic_update_slice(axes, eqn, operands):
    for n, size, axis, other in zip(_shape(eqn), _shape(eqn, 1), operands[0], operands[1], strict=True):
        if n == size:
            axes.unite(axis, other)
        else:
            axes.fix(axis, other)
    return [operands[0]]


def _top_k(axes, eqn, operands):
    along = eqn.params.get("axis", len(operands[0]) - 1) % len(operands[0])
    return _resized(axes, eqn, operands[0], [place != along for place in range(len(operands[0]))]) * 2


def _dot_general(axes, eqn, operands):
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    a, b = operands
    for mine, yours in (*zip(left, right, strict=True), *zip(left_batch, right_batch, strict=True)):
        axes.unite(a[mine], b[yours])
    rest = lambda value, *used: [axis for place, axis in enumerate(value) if place not in itertools.chain(*used)]
    return [[*(a[place] for place in left_batch), *rest(a, left, left_batch), *rest(b, right, right_batch)]]


def _convolution(axes, eqn, operands):
    """Features and outputs come in groups: each group of features makes one group of outputs."""
    if eqn.params["batch_group_count"] != 1:
        return unknown(axes, eqn, operands)
    lhs, rhs, out = eqn.params["dimension_numbers"]
    (images, kernel), groups = operands, eqn.params["feature_group_count"]
    axes.fix(*(images[place] for place in lhs[2:]), *(kernel[place] for place in rhs[2:]))
    features, made = _shape(eqn)[lhs[1]], _shape(eqn, 1)[rhs[0]]
    group, inside = axes.regroup([images[lhs[1]]], (groups, features // groups))
    other, _ = axes.regroup([kernel[rhs[0]]], (groups, made // groups))
    axes.unite(group, other)
    axes.unite(inside, kernel[rhs[1]])
    result = axes.value(shape_of(eqn.outvars[0]), fixed=True)
    result[out[0]], result[out[1]] = images[lhs[0]], kernel[rhs[0]]
    return [result]


def _gather(axes, eqn, operands):
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    value, indices = operands
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    whole = [size == n and place not in gone for place, (size, n) in enumerate(zip(sizes, _shape(eqn), strict=True))]
    axes.fix(*(axis for axis, keep in zip(value, whole, strict=True) if not keep))
    axes.fix(indices[-1], *(indices[place] for place in numbers.start_indices_batching_dims))
    inside = iter([p for p in range(len(value)) if p not in gone])
    batch = iter(indices[:-1])
    out = []
    for place, size in enumerate(shape_of(eqn.outvars[0])):
        if place in numbers.offset_dims:
            source = next(inside)
            out.append(value[source] if whole[source] else axes.new(size, fixed=True))
        else:
            out.append(next(batch))
    return [out]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_WINDOWS, _window),
    **dict.fromkeys(_CUMULATIVE, _cumulative),
    "argmax": _arg_reduce,
    "argmin": _arg_reduce,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "optimization_barrier": _alike,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "top_k": _top_k,
    "transpose": _transpose,
}
