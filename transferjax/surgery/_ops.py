"""Operations of a move: plain tuples, checked, inferred on shapes, and run on arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from transferjax._errors import PlanError, nearest_hint
from transferjax.surgery._resize import RESIZERS, Resizer

Op = tuple[Any, ...]


class Spec(NamedTuple):
    """Shape and dtype name of a leaf.

    >>> print(Spec((3, 3), "float32"))
    (3, 3) float32
    """

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


class Kind(NamedTuple):
    """What one operation is: its arguments checked, its effect on shapes, its effect on arrays."""

    check: Callable[..., tuple[Any, ...]]
    infer: Callable[..., tuple[Spec, ...]]
    run: Callable[..., list[Any]]


def spec_of(leaf: Any, path: str, side: str) -> Spec:
    """The :class:`Spec` of an array, or of anything with ``shape`` and ``dtype``."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        write = "its .shapes" if hasattr(leaf, "shapes") else "an array, or jax.ShapeDtypeStruct(shape, dtype)"
        raise PlanError(
            f"{side} leaf '{path}' is {type(leaf).__name__}; expected something with shape and dtype. Pass {write}."
        )
    return Spec(tuple(map(int, leaf.shape)), _text(leaf.dtype))


@functools.lru_cache(256)
def _text(dtype: Any) -> str:
    return str(dtype)


def dtype_name(dtype: Any) -> str:
    """The name of a dtype: ``"float32"``, ``"bfloat16"``.

    Raises:
      PlanError: it is no dtype.
    """
    try:
        if dtype is None:  # numpy would take it for float64
            raise TypeError
        return jnp.dtype(dtype).name
    except (TypeError, ValueError):
        raise PlanError(f"{dtype!r} is no dtype. Write a name such as 'float32', 'bfloat16' or 'int32'.") from None


def check_op(op: Any) -> Op:
    """An operation in its plain form: tuples, ints and strings only.

    Raises:
      PlanError: its name is unknown or its arguments are malformed.

    >>> check_op(["permute", [2, 3, 1, 0]])
    ('permute', (2, 3, 1, 0))
    """
    if not isinstance(op, (list, tuple)) or not op or not isinstance(op[0], str):
        raise PlanError(f"operation {op!r} is malformed. Expected (name, argument), such as ('permute', (1, 0)).")
    if op[0] not in KINDS:
        raise PlanError(f"operation '{op[0]}' is unknown. Known: {', '.join(KINDS)}.{nearest_hint(op[0], KINDS, 1)}")
    try:
        return (op[0], *KINDS[op[0]].check(*op[1:]))
    except TypeError:
        raise PlanError(f"operation '{op[0]}' does not take {len(op) - 1} arguments: {op!r}.") from None


def infer(ops: Sequence[Op], specs: Sequence[Spec]) -> Spec:
    """The shape and dtype that come out of ``ops``.

    Raises:
      PlanError: an operation does not fit the shape it meets, or several arrays are left.
    """
    current = tuple(specs)
    for op in ops:
        current = KINDS[op[0]].infer(current, *op[1:])
    if len(current) != 1:
        raise PlanError(f"{len(current)} arrays are left after the operations; expected one.")
    return current[0]


def run(ops: Sequence[Op], arrays: Sequence[Any]) -> Any:
    """The array that comes out of ``ops``; numpy arrays stay numpy arrays, JAX arrays JAX arrays."""
    current = list(arrays)
    for op in ops:
        current = KINDS[op[0]].run(current, *op[1:])
    return current[0]


def show(op: Op) -> str:
    """An operation as tables print it.

    >>> show(("permute", (1, 0)))
    'permute(1, 0)'
    """
    first = ", ".join(map(str, op[1])) if isinstance(op[1], tuple) and len(op) == 2 else _brief(op[1])
    return f"{op[0]}({', '.join([first, *map(_brief, op[2:])])})"


def _brief(argument: Any) -> str:
    """An argument as tables print it: of a mapping of many rows only the first."""
    if not isinstance(argument, tuple) or len(argument) <= 8:
        return str(argument)
    return f"({', '.join(map(str, argument[:6]))}, ... {len(argument):,} in all)"


def check_axes(axes: Any) -> tuple[tuple[int, ...]]:
    """``axes`` as a tuple that holds each of 0 .. n-1 once."""
    given = _integers(axes, "axes")
    if sorted(given) != list(range(len(given))):
        raise PlanError(
            f"axes {given} are no permutation: expected each of 0 to {len(given) - 1} once. "
            "Write them as for numpy.transpose: axis i of the result is axis axes[i] of the source."
        )
    return (given,)


def check_shape(shape: Any) -> tuple[tuple[int, ...]]:
    """``shape`` as a tuple of sizes with at most one -1."""
    given = _integers(shape, "shape")
    if any(n < -1 for n in given) or given.count(-1) > 1:
        raise PlanError(f"shape {given} is malformed: expected sizes of at least 0, and at most one -1.")
    return (given,)


def check_dtype(dtype: Any) -> tuple[str]:
    """The dtype's name."""
    return (dtype_name(dtype),)


def castable(source: str, target: str) -> bool:
    """Whether a cast keeps the meaning of the numbers: never fractions to integers, nor anything to bool."""
    try:
        a, b = jnp.dtype(source), jnp.dtype(target)
    except TypeError:
        return False
    order = {jnp.bool_: 0, jnp.integer: 1, jnp.floating: 2, jnp.complexfloating: 3}
    rank = lambda d: next((n for kind, n in order.items() if jnp.issubdtype(d, kind)), -1)
    return 0 <= rank(a) <= rank(b) and (a == b or rank(b) > 0)


def _integers(values: Any, what: str) -> tuple[int, ...]:
    whole = lambda n: isinstance(n, (int, np.integer)) and not isinstance(n, bool)
    if not isinstance(values, (list, tuple)) or not all(map(whole, values)):
        raise PlanError(f"{what} {values!r} is malformed. Expected a tuple of integers.")
    return tuple(int(n) for n in values)


def _infer_permute(specs: tuple[Spec, ...], axes: tuple[int, ...]) -> tuple[Spec, ...]:
    for spec in specs:
        if len(spec.shape) != len(axes):
            raise PlanError(f"permute{axes} needs an array of {len(axes)} axes; {spec} came.")
    return tuple(Spec(tuple(s.shape[a] for a in axes), s.dtype) for s in specs)


def _infer_reshape(specs: tuple[Spec, ...], shape: tuple[int, ...]) -> tuple[Spec, ...]:
    return tuple(Spec(_resolved(spec, shape), spec.dtype) for spec in specs)


def _resolved(spec: Spec, shape: tuple[int, ...]) -> tuple[int, ...]:
    size, known = math.prod(spec.shape), math.prod(n for n in shape if n != -1)
    if size % known if -1 in shape and known else size != known:
        raise PlanError(f"reshape{shape} does not hold the {size:,} elements of {spec}.")
    return tuple(size // max(known, 1) if n == -1 else n for n in shape)


def _infer_cast(specs: tuple[Spec, ...], dtype: str) -> tuple[Spec, ...]:
    for spec in specs:
        if not castable(spec.dtype, dtype):
            raise PlanError(
                f"cast to {dtype} would not keep the numbers of {spec}. "
                "Cast integers to floats or between widths; convert other leaves before the plan."
            )
    return tuple(Spec(spec.shape, dtype) for spec in specs)


def _run_permute(arrays: list[Any], axes: tuple[int, ...]) -> list[Any]:
    return [array.transpose(axes) for array in arrays]


def _run_reshape(arrays: list[Any], shape: tuple[int, ...]) -> list[Any]:
    return [array.reshape(shape) for array in arrays]


def _run_cast(arrays: list[Any], dtype: str) -> list[Any]:
    return [_cast(array, dtype) for array in arrays]


def _cast(array: Any, dtype: str) -> Any:
    if str(array.dtype) == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(jnp.dtype(dtype))
    if isinstance(array, Tracer) or not array.size:
        return out
    if jnp.issubdtype(array.dtype, jnp.integer):
        with np.errstate(invalid="ignore", over="ignore"):
            lost = int((out.astype(array.dtype) != array).sum())
        if lost:
            raise PlanError(f"cast from {array.dtype} to {dtype} changes {lost:,} of {array.size:,} values.")
        return out
    finite = jnp.isfinite if isinstance(array, jax.Array) else np.isfinite
    lost = int((finite(array) & ~finite(out)).sum())
    if lost:
        raise PlanError(
            f"cast from {array.dtype} to {dtype} makes {lost:,} of {array.size:,} values infinite. "
            "Cast to a type of wider range, such as 'bfloat16' or 'float32'."
        )
    return out


def _check_axis_numbers(*numbers: Any) -> tuple[int, ...]:
    given = _integers(numbers, "axis and numbers")
    if any(n < 0 for n in given):
        raise PlanError(f"axis and numbers {given} are malformed: expected integers of at least 0.")
    return given


def _check_axis(axis: Any) -> tuple[int]:
    return (_check_axis_numbers(axis)[0],)


def _check_take(axis: Any, index: Any) -> tuple[int, ...]:
    return _check_axis_numbers(axis, index)


def _check_slice(axis: Any, start: Any, stop: Any) -> tuple[int, ...]:
    return _check_axis_numbers(axis, start, stop)


def _infer_slice(specs: tuple[Spec, ...], axis: int, start: int, stop: int) -> tuple[Spec, ...]:
    out = []
    for spec in specs:
        if axis >= len(spec.shape) or not start <= stop <= spec.shape[axis]:
            raise PlanError(f"slice({axis}, {start}, {stop}) (axis, start, stop) does not lie in {spec}.")
        out.append(Spec((*spec.shape[:axis], stop - start, *spec.shape[axis + 1 :]), spec.dtype))
    return tuple(out)


def _infer_take(specs: tuple[Spec, ...], axis: int, index: int) -> tuple[Spec, ...]:
    for spec in specs:
        if axis >= len(spec.shape) or index >= spec.shape[axis]:
            raise PlanError(f"take({axis}, {index}) (axis, index) does not lie in {spec}.")
    return tuple(Spec((*s.shape[:axis], *s.shape[axis + 1 :]), s.dtype) for s in specs)


def _infer_concat(specs: tuple[Spec, ...], axis: int) -> tuple[Spec, ...]:
    first = specs[0]
    rest = lambda s: (*s.shape[:axis], *s.shape[axis + 1 :])
    for spec in specs:
        alike = len(spec.shape) == len(first.shape) and rest(spec) == rest(first) and spec.dtype == first.dtype
        if axis >= len(spec.shape) or not alike:
            raise PlanError(f"concat({axis}) needs arrays that differ along axis {axis} only; {first} and {spec} came.")
    return (Spec((*first.shape[:axis], sum(s.shape[axis] for s in specs), *first.shape[axis + 1 :]), first.dtype),)


def _infer_stack(specs: tuple[Spec, ...], axis: int) -> tuple[Spec, ...]:
    first = specs[0]
    for spec in specs:
        if axis > len(spec.shape) or spec != first:
            raise PlanError(f"stack({axis}) needs arrays of one shape and dtype; {first} and {spec} came.")
    return (Spec((*first.shape[:axis], len(specs), *first.shape[axis:]), first.dtype),)


def _run_slice(arrays: list[Any], axis: int, start: int, stop: int) -> list[Any]:
    return [array[(slice(None),) * axis + (slice(start, stop),)] for array in arrays]


def _run_take(arrays: list[Any], axis: int, index: int) -> list[Any]:
    # asarray: a number taken from a numpy vector stays an array
    return [_module([array]).asarray(array[(slice(None),) * axis + (index,)]) for array in arrays]


def _run_concat(arrays: list[Any], axis: int) -> list[Any]:
    return [_module(arrays).concatenate(arrays, axis=axis)]


def _run_stack(arrays: list[Any], axis: int) -> list[Any]:
    return [_module(arrays).stack(arrays, axis=axis)]


def _module(arrays: list[Any]) -> Any:
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _resizing(name: str, resizer: Resizer) -> Kind:
    def infer_shapes(specs: tuple[Spec, ...], *arguments: Any) -> tuple[Spec, ...]:
        for spec in specs:
            if not castable(spec.dtype, "float64") or castable(spec.dtype, "int64"):
                raise PlanError(f"{name} needs floats; {spec} came. Write cast(...) before it.")
        return tuple(Spec(resizer.shape(spec.shape, *arguments), spec.dtype) for spec in specs)

    def run_arrays(arrays: list[Any], *arguments: Any) -> list[Any]:
        return [resizer.run(array, *arguments) for array in arrays]

    return Kind(resizer.check, infer_shapes, run_arrays)


KINDS: dict[str, Kind] = {
    "permute": Kind(check_axes, _infer_permute, _run_permute),
    "reshape": Kind(check_shape, _infer_reshape, _run_reshape),
    "cast": Kind(check_dtype, _infer_cast, _run_cast),
    "slice": Kind(_check_slice, _infer_slice, _run_slice),
    "take": Kind(_check_take, _infer_take, _run_take),
    "concat": Kind(_check_axis, _infer_concat, _run_concat),
    "stack": Kind(_check_axis, _infer_stack, _run_stack),
    **{name: _resizing(name, resizer) for name, resizer in RESIZERS.items()},
}
