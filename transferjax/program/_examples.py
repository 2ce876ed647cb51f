"""Where the examples of a batch are in the outputs of one operation, given where they are in its operands.

A rule is ``(eqn, layouts of the operands) -> layouts of the outputs``, with ``None`` where examples meet. It accounts
for every axis of an operand that counts examples; that they are all there once is checked with :func:`complete`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from transferjax.program import _compat
from transferjax.program._interpret import rebind
from transferjax.program._operations import _ELEMENTWISE, TRANSCENDENTAL, _shape

Axis = tuple[tuple[int, int], ...]
"""The factors of an axis, from the slowest to the fastest, as ``(size, stride)``: a step along one moves ``stride``
examples on, or, with 0, stays within one. A batch of 8 is ``((8, 1),)``; 8 examples of 5 tokens in one axis of 40 are
``((8, 1), (5, 0))``."""
Dims = tuple[Axis, ...]
Rule = Callable[[jex.JaxprEqn, Sequence[Dims]], Any]


class Mixed(NamedTuple):
    """Examples meet in a value, or may do so; ``cause`` names the operation in which they first do."""

    cause: str


class Layout(NamedTuple):
    """Where a value has its examples, each of them computed from its own example alone."""

    dims: Dims

    def stored_shape(self, count: int) -> tuple[int, ...]:
        """Of the stored form: examples first, then what each axis has within an example."""
        inside = (math.prod(size for size, stride in axis if not stride) for axis in self.dims)
        return (count, *(size for size in inside if size > 1))

    def pack(self, value: Any, count: int) -> Any:
        """The stored form of a value: its examples unfolded into the first axis.

        >>> Layout((((2, 1), (3, 0)),)).pack(jnp.arange(6), 2).tolist()
        [[0, 1, 2], [3, 4, 5]]
        """
        sizes, order = self._order()
        return jnp.transpose(jnp.reshape(value, sizes), order).reshape(self.stored_shape(count))

    def unpack(self, value: Any, shape: Sequence[int]) -> Any:
        """The value from its stored form."""
        sizes, order = self._order()
        back = sorted(range(len(order)), key=lambda number: order[number])
        return jnp.transpose(jnp.reshape(value, [sizes[n] for n in order]), back).reshape(shape)

    def _order(self) -> tuple[list[int], list[int]]:
        factors = [factor for axis in self.dims for factor in axis]
        return [size for size, _ in factors], sorted(range(len(factors)), key=lambda number: -factors[number][1])


Fact = Layout | Mixed | None
"""``None``: all examples share the value."""


def leading(shape: Sequence[int]) -> Layout:
    """The layout of a batch: the first axis counts the examples.

    >>> leading((8, 5))
    Layout(dims=(((8, 1),), ((5, 0),)))
    """
    return Layout((normal([(shape[0], 1)]), *plain(shape[1:])))


def plain(shape: Iterable[int]) -> Dims:
    """Axes that count no examples."""
    return tuple(() if size == 1 else ((size, 0),) for size in shape)


def apart(dims: Iterable[Axis]) -> bool:
    """Whether no axis counts examples."""
    return not any(stride for axis in dims for _, stride in axis)


def normal(factors: Iterable[tuple[int, int]]) -> Axis:
    """The same axis with as few factors as possible.

    >>> normal([(2, 4), (4, 1), (1, 0), (3, 0), (5, 0)])
    ((8, 1), (15, 0))
    """
    kept: list[tuple[int, int]] = []
    for size, stride in factors:
        if kept and kept[-1][1] == stride * size:
            kept[-1] = (kept[-1][0] * size, stride)
        elif size != 1:
            kept.append((size, stride))
    return tuple(kept)


def complete(dims: Dims, count: int) -> bool:
    """Whether the examples are all there, each exactly once."""
    reached = 1
    for stride, size in sorted((stride, size) for axis in dims for size, stride in axis if stride):
        if stride != reached:
            return False
        reached *= size
    return reached == count


def join(several: Sequence[Dims]) -> Dims | None:
    """The layout of a value made element by element of several; ``None`` where they count examples differently."""
    counting = [dims for dims in several if not apart(dims)]
    if not counting:
        return several[0] if several else None
    return counting[0] if all(dims == counting[0] for dims in counting) else None


def reshaped(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """The layout after a reshape; ``None`` where an axis cuts through a factor.

    >>> reshaped((((8, 1),), ((5, 0),)), (40,)), reshaped((((8, 1), (5, 0)),), (2, 4, 5))
    ((((8, 1), (5, 0)),), (((2, 4),), ((4, 1),), ((5, 0),)))
    """
    left = list(normal(factor for axis in dims for factor in axis))[::-1]
    axes = []
    for need in shape:
        axis = []
        while need > 1:
            length, stride = left.pop() if left else (0, 0)
            if not length or (need % length and length % need):
                return None
            if length > need:
                left.append((length // need, stride))
                length, stride = need, stride * (length // need)
            axis.append((length, stride))
            need //= length
        axes.append(normal(axis))
    return None if 0 in shape else tuple(axes)


def part(axis: Axis, start: int, stop: int, stride: int) -> Axis | None:
    """The layout of a slice of an axis; ``None`` where it takes some examples and leaves others."""
    size = math.prod(length for length, _ in axis)
    if (start, stop, stride) == (0, size, 1):
        return axis
    if apart([axis]):
        return normal([(-(-(stop - start) // stride), 0)])
    outer = axis[0][0] if axis[0][1] == 0 else 1
    inner = size // outer
    if stride != 1 or outer == 1 or start % inner or stop % inner:
        return None
    return normal([((stop - start) // inner, 0), *axis[1:]])


def _out(eqn: jex.JaxprEqn, number: int = 0) -> tuple[int, ...]:
    return _shape(eqn.outvars[number])


def _with(dims: Dims, place: int, axis: Axis) -> Dims:
    return (*dims[:place], axis, *dims[place + 1 :])


def _same(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    """Element by element: operands of the outputs' shape, of length 1 where they are repeated, or scalars."""
    out = _out(eqn)
    whole = [
        tuple(axis if size == n else new for axis, size, n, new in zip(one, _shape(var), out, plain(out)))
        for one, var in zip(dims, eqn.invars)
        if len(one) == len(out)
    ]
    strange = any(len(one) not in (0, len(out)) for one in dims)
    return None if strange else [join(whole)] * len(eqn.outvars)


def _broadcast_in_dim(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    out = list(plain(_out(eqn)))
    for axis, size, place in zip(dims[0], _shape(eqn.invars[0]), eqn.params["broadcast_dimensions"], strict=True):
        if size == _out(eqn)[place]:
            out[place] = axis
    return [tuple(out)]


def _reshape(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    return [reshaped(dims[0], _out(eqn))]


def _transpose(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    return [tuple(dims[0][axis] for axis in eqn.params["permutation"])]


def _dot_general(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    contracted, batched = eqn.params["dimension_numbers"]
    both = [join([(dims[0][left],), (dims[1][right],)]) for left, right in zip(*batched, strict=True)]
    if not all(apart(one[axis] for axis in axes) for one, axes in zip(dims, contracted)):
        return None
    free = [
        [axis for number, axis in enumerate(one) if number not in (*used, *taken)]
        for one, used, taken in zip(dims, contracted, batched)
    ]
    return None if None in both else [(*(one[0] for one in both if one), *free[0], *free[1])]


def _convolution(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    numbers = eqn.params["dimension_numbers"]
    place = numbers.lhs_spec[0]
    if eqn.params["batch_group_count"] != 1 or not apart([*_with(dims[0], place, ()), *dims[1]]):
        return None
    return [_with(plain(_out(eqn)), numbers.out_spec[0], dims[0][place])]


def _reduction(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    axes = eqn.params["axes"] if "axes" in eqn.params else eqn.params["dimensions"]
    joined = join([one for one in dims if one])
    if joined is None or not apart(joined[axis] for axis in axes):
        return None
    return [tuple(axis for number, axis in enumerate(joined) if number not in axes)] * len(eqn.outvars)


def _along(name: str) -> Rule:
    """An operation along one axis that keeps the others."""

    def rule(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
        joined, axis = join(dims), eqn.params.get(name, -1) % len(dims[0])
        if joined is None or not apart([joined[axis]]):
            return None
        return [_with(joined, axis, plain(_out(eqn, n))[axis]) for n in range(len(eqn.outvars))]

    return rule


def _windows(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    p, joined = eqn.params, join([one for one in dims if one])
    if joined is None:
        return None
    dilated = [p.get(name) or (1,) * len(joined) for name in ("base_dilation", "window_dilation")]
    configs = zip(p["window_dimensions"], p["window_strides"], map(tuple, p["padding"]), *dilated)
    return [_unless_changed(joined, _out(eqn), [config == (1, 1, (0, 0), 1, 1) for config in configs])]


def _unless_changed(dims: Dims, shape: Sequence[int], kept: Sequence[bool]) -> Dims | None:
    """Axes that are kept as they are, and others of a new size, which may count no examples."""
    if any(not keep and not apart([axis]) for axis, keep in zip(dims, kept, strict=True)):
        return None
    return tuple(axis if keep else new for axis, new, keep in zip(dims, plain(shape), kept, strict=True))


def _concatenate(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    """Along another axis, or whole batches one after the other."""
    place = eqn.params["dimension"]
    rest, along = join([_with(one, place, ()) for one in dims]), [one[place] for one in dims]
    if rest is not None and not apart(along):
        rest = join([_with(one, place, dims[0][place]) for one in dims])
        return None if rest is None or len({*along}) > 1 else [_with(rest, place, ((len(along), 0), *along[0]))]
    return None if rest is None else [_with(rest, place, plain(_out(eqn))[place])]


def _pad(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    kept = [tuple(config) == (0, 0, 0) for config in eqn.params["padding_config"]]
    return [_unless_changed(dims[0], _out(eqn), kept)]


def _slice(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    p = eqn.params
    bounds = zip(p["start_indices"], p["limit_indices"], p["strides"] or (1,) * len(dims[0]))
    axes = [part(axis, *bound) for axis, bound in zip(dims[0], bounds, strict=True)]
    return None if None in axes else [tuple(axes)]


def _split(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    place, start, found = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        axis = part(dims[0][place], start, start + size, 1)
        found.append(None if axis is None else _with(dims[0], place, axis))
        start += size
    return found


def _dynamic_slice(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    kept = [a == b for a, b in zip(eqn.params["slice_sizes"], _shape(eqn.invars[0]), strict=True)]
    return [_unless_changed(dims[0], _out(eqn), kept)]


def _dynamic_update_slice(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    kept = [a == b for a, b in zip(_shape(eqn.invars[1]), _out(eqn), strict=True)]
    whole, update = _unless_changed(dims[0], _out(eqn), kept), _unless_changed(dims[1], _out(eqn), kept)
    return None if whole is None or update is None else [join([whole, update])]


def _gather(eqn: jex.JaxprEqn, dims: Sequence[Dims]) -> Any:
    """Rows picked by index: examples may be in the index, in axes taken whole, or in axes batched on both sides."""
    numbers, (operand, index) = eqn.params["dimension_numbers"], dims
    batched = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    sizes, before = eqn.params["slice_sizes"], _shape(eqn.invars[0])
    kept = [size == n and axis not in numbers.start_index_map for axis, (size, n) in enumerate(zip(sizes, before))]
    inside = _unless_changed(operand, sizes, [keep or n in batched.values() for n, keep in enumerate(kept)])
    picked = [join([(axis,), (operand[batched[n]] if n in batched else (),)]) for n, axis in enumerate(index)]
    if inside is None or None in picked or not apart([index[-1]]):
        return None
    gone = {*batched.values(), *numbers.collapsed_slice_dims}
    taken = iter([axis for number, axis in enumerate(inside) if number not in gone])
    rows = iter([one[0] for one in picked[:-1] if one])
    return [tuple(next(taken if n in numbers.offset_dims else rows) for n in range(len(_out(eqn))))]


def _names(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_COUPLED = ["psum", "pmax", "pmin", "psum2", "psum_invariant", "addupdate"]
RULES: dict[str, Rule] = {
    **dict.fromkeys((_ELEMENTWISE | TRANSCENDENTAL.keys()).difference(_COUPLED), _same),
    **_names(_same, "integer_pow convert_element_type reduce_precision stop_gradient name real imag complex"),
    **_names(_reshape, "reshape squeeze expand_dims"),
    **_names(_reduction, "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin"),
    **_names(_along("axis"), "cumsum cumprod cummax cummin cumlogsumexp top_k"),
    **_names(_along("dimension"), "sort"),
    **_names(_windows, "reduce_window_sum reduce_window_max reduce_window_min"),
    **{"broadcast_in_dim": _broadcast_in_dim, "transpose": _transpose, "dot_general": _dot_general},
    **{"conv_general_dilated": _convolution, "gather": _gather, "concatenate": _concatenate, "pad": _pad},
    **{"slice": _slice, "split": _split},
    **{"dynamic_slice": _dynamic_slice, "dynamic_update_slice": _dynamic_update_slice},
}
_MOST_ELEMENTS = 1 << 22


def after_replacement(eqn: jex.JaxprEqn, operands: Sequence[Dims | None], count: int) -> Any:
    """The answer for an operation without a rule, found by running it on random numbers.

    One example is replaced by another, and every other row has to keep its bits.

    Args:
      eqn: an equation; one with effects, with operands that are no numbers or are very large, or whose examples are
        not one axis is not run.
      operands: the layout of each operand, ``None`` for one that all examples share.
      count: how many examples there are.

    Returns:
      One layout per output, ``None`` for an output in which no axis shows one example per row; ``None`` when the
      equation was not run.
    """
    axes = [None if dims is None else _axis(dims, count) for dims in operands]
    avals = [var.aval for var in (*eqn.invars, *eqn.outvars)]
    strange = any(dims is not None and axis is None for dims, axis in zip(operands, axes))
    if count < 2 or strange or _compat.has_effects(eqn) or not all(map(_small_numbers, avals)):
        return None
    rng = np.random.default_rng(0)
    values = [var.val if isinstance(var, jex.Literal) else _random(rng, var.aval) for var in eqn.invars]
    base = _run(eqn, values)
    found = [set(range(out.ndim)) for out in base]
    for example in (0, count - 1):
        other = [_replaced(rng, value, axis, example) for value, axis in zip(values, axes)]
        for number, (before, after) in enumerate(zip(base, _run(eqn, other), strict=True)):
            found[number] &= _rows(before, after, example, count)
    return [
        _with(plain(out.shape), min(one), ((count, 1),)) if len(one) == 1 else None for out, one in zip(base, found)
    ]


def _axis(dims: Dims, count: int) -> int | None:
    """The axis that is the examples and nothing else."""
    axes = [number for number, axis in enumerate(dims) if not apart([axis])]
    return axes[0] if len(axes) == 1 and dims[axes[0]] == ((count, 1),) else None


def _small_numbers(aval: Any) -> bool:
    kinds = (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(aval.dtype, kind) for kind in kinds) and math.prod(aval.shape) <= _MOST_ELEMENTS


def _random(rng: np.random.Generator, aval: Any) -> np.ndarray:
    inexact = jnp.issubdtype(aval.dtype, jnp.inexact)
    return (rng.normal(size=aval.shape) if inexact else rng.integers(0, 2, aval.shape)).astype(aval.dtype)


def _replaced(rng: np.random.Generator, value: Any, axis: int | None, example: int) -> Any:
    if axis is None:
        return value
    rows = np.moveaxis(np.array(value), axis, 0)
    rows[example] = _random(rng, rows[example]) if jnp.issubdtype(rows.dtype, jnp.inexact) else 1 - rows[example]
    return np.moveaxis(rows, 0, axis)


def _run(eqn: jex.JaxprEqn, values: Sequence[Any]) -> list[np.ndarray]:
    with jax.ensure_compile_time_eval():
        return [np.asarray(out) for out in rebind(eqn, [jnp.asarray(value) for value in values])]


def _rows(before: np.ndarray, after: np.ndarray, example: int, count: int) -> set[int]:
    """The axes along which the replaced example changed and no other did."""
    bits = lambda x: np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape, x.dtype.itemsize)
    changed = (bits(before) != bits(after)).any(-1)
    long = [axis for axis in range(before.ndim) if before.shape[axis] == count]
    return {axis for axis in long if changed.any() and not np.delete(changed, example, axis).any()}
