"""What one equation costs: multiply-adds of contractions, one operation per element elsewhere, bytes touched.

A multiply-add is two FLOPs. Transcendental functions are counted apart (as XLA does), since what one costs differs by
a factor of twenty between machines; ``TRANSCENDENTAL`` says how many evaluations and how many FLOPs each takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.extend.core as jex


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# No arithmetic and no traffic: a new name for the same bytes.
_VIEWS = _names("reshape squeeze expand_dims stop_gradient name optimization_barrier platform_index")

# No arithmetic, but bytes move.
_MOVES = _names(
    "broadcast_in_dim broadcast transpose slice dynamic_slice dynamic_update_slice concatenate split stack unstack pad "
    "rev gather scatter iota copy copy_p convert_element_type bitcast_convert_type device_put sharding_constraint "
    "create_token after_all random_wrap random_unwrap random_seed axis_index all_gather all_to_all ppermute pbroadcast "
    "pvary pcast empty empty2 reduce_precision real imag complex get swap reshard mesh_cast debug_callback io_callback "
    "pure_callback"
)

_ELEMENTWISE = _names(
    "add add_any sub mul div neg abs sign max min clamp select_n eq ne lt le gt ge eq_to le_to lt_to and or not xor "
    "rem floor ceil round is_finite nextafter square shift_left shift_right_logical shift_right_arithmetic "
    "population_count clz conj mul_add psum pmax pmin psum2 psum_invariant addupdate"
)

# name: (evaluations, further FLOPs) per element
TRANSCENDENTAL: dict[str, tuple[int, int]] = {
    **dict.fromkeys(
        _names(
            "exp exp2 expm1 log log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh sqrt rsqrt cbrt erf "
            "erfc erf_inv lgamma digamma bessel_i0e bessel_i1e pow atan2"
        ),
        (1, 0),
    ),
    "logistic": (1, 2),  # 1 / (1 + exp(-x))
    "igamma": (8, 8),
    "igammac": (8, 8),
    "polygamma": (8, 8),
    "zeta": (8, 8),
}

_REDUCTIONS = _names(
    "reduce reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or reduce_xor argmax argmin"
)
_SCANS = _names("cumsum cumprod cummax cummin cumlogsumexp")
_SCATTERS = _names(
    "scatter_add scatter_mul scatter_min scatter_max scatter_sub scatter-add scatter-mul scatter-min "
    "scatter-max scatter-sub"
)
# Threefry-2x32 runs 20 rounds of add, rotate (3) and xor for each pair of words, and 5 key injections.
_RANDOM_WORD = 55


class Operation(NamedTuple):
    """The cost of one equation run once; ``known`` is false where one FLOP per element is a guess."""

    flops: int
    transcendentals: int
    read: int
    written: int
    known: bool = True


def operation(eqn: jex.JaxprEqn, used: tuple[bool, ...]) -> Operation:
    """The cost of one equation without bodies, of which the outputs ``used`` are wanted."""
    name = eqn.primitive.name
    outputs = [var.aval for var, keep in zip(eqn.outvars, used, strict=True) if keep] or [v.aval for v in eqn.outvars]
    if name in _VIEWS:
        return Operation(0, 0, 0, 0)
    read, written = _traffic(name, eqn, outputs)
    size = max(map(_size, outputs), default=0)
    if name in TRANSCENDENTAL:
        evaluations, flops = TRANSCENDENTAL[name]
        return Operation(flops * size, evaluations * size, read, written)
    if name in _MOVES:
        return Operation(0, 0, read, written)
    if name in _RULES:
        return Operation(_RULES[name](eqn), 0, read, written)
    return Operation(size, 0, read, written, name in _ELEMENTWISE)


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(var.aval.shape)


def _size(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ()))


def _bytes(aval: Any) -> int:
    return _size(aval) * getattr(getattr(aval, "dtype", None), "itemsize", 0)


def _traffic(name: str, eqn: jex.JaxprEqn, outputs: list[Any]) -> tuple[int, int]:
    """Bytes read and written; an operation on a window touches the window, not the whole array."""
    inputs = [var.aval for var in eqn.invars]
    written = sum(map(_bytes, outputs))
    if name in ("slice", "dynamic_slice", "gather"):
        return written + sum(map(_bytes, inputs[1:])), written
    if name == "dynamic_update_slice":
        return _bytes(inputs[1]), _bytes(inputs[1])
    if name in _SCATTERS or name == "scatter":
        update = _bytes(inputs[2])
        return 2 * update + _bytes(inputs[1]), update
    return sum(_bytes(v.aval) for v in eqn.invars if isinstance(v, jex.Var)), written


def _dot_general(eqn: jex.JaxprEqn) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    lhs = _shape(eqn.invars[0])
    return 2 * _size(eqn.outvars[0].aval) * math.prod(lhs[d] for d in contract)


def _convolution(eqn: jex.JaxprEqn) -> int:
    """Twice the multiply-adds with a real input: padding and the holes of dilation cost nothing.

    So a convolution, its input gradient (dilated by the stride) and its kernel gradient (a convolution that has the
    batch as its features) count the same.
    """
    lhs, rhs, out = map(_shape, (*eqn.invars[:2], eqn.outvars[0]))
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    flops = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
    for d, (low, _) in enumerate(p["padding"]):
        flops *= _taps(
            lhs[numbers.lhs_spec[2 + d]],
            rhs[numbers.rhs_spec[2 + d]],
            out[numbers.out_spec[2 + d]],
            (p["window_strides"][d], low, p["lhs_dilation"][d], p["rhs_dilation"][d]),
        )
    return flops


def _taps(size: int, window: int, outputs: int, geometry: tuple[int, int, int, int]) -> int:
    """In one dimension: how many pairs (output position, window position) fall on a real input element."""
    stride, low, lhs_dilation, rhs_dilation = geometry
    last = (size - 1) * lhs_dilation
    count = 0
    for tap in range(window):
        offset = tap * rhs_dilation - low
        if lhs_dilation == 1:
            first = max(0, -(offset // stride))  # the first output o with o * stride + offset >= 0
            final = min(outputs - 1, (last - offset) // stride)
            count += max(0, final - first + 1)
        else:
            places = (o * stride + offset for o in range(outputs))
            count += sum(0 <= place <= last and place % lhs_dilation == 0 for place in places)
    return count


def _reduction(eqn: jex.JaxprEqn) -> int:
    return max(0, _size(eqn.invars[0].aval) - _size(eqn.outvars[0].aval))


def _window(eqn: jex.JaxprEqn) -> int:
    window = eqn.params.get("window_dimensions") or ()
    return _size(eqn.outvars[0].aval) * max(0, math.prod(window) - 1)


def _select_and_scatter(eqn: jex.JaxprEqn) -> int:
    return _size(eqn.invars[0].aval) * math.prod(eqn.params["window_dimensions"])


def _integer_pow(eqn: jex.JaxprEqn) -> int:
    """Square and multiply; a negative power also divides."""
    power = abs(eqn.params["y"])
    steps = power.bit_length() - 1 + bin(power).count("1") - 1 if power else 0
    return (steps + (eqn.params["y"] < 0)) * _size(eqn.outvars[0].aval)


def _sort(eqn: jex.JaxprEqn) -> int:
    shape = _shape(eqn.invars[0])
    length = shape[eqn.params.get("dimension", -1)] if shape else 1
    return math.prod(shape) * max(1, math.ceil(math.log2(max(2, length))))


def _fft(eqn: jex.JaxprEqn) -> int:
    lengths = eqn.params["fft_lengths"]
    size = max(_size(eqn.invars[0].aval), _size(eqn.outvars[0].aval))
    return round(5 * size * math.log2(max(2, math.prod(lengths))))


def _cubic(factor: float) -> Callable[[jex.JaxprEqn], int]:
    """A factorisation of ``[..., m, n]``: ``factor * m * n * min(m, n)``."""

    def rule(eqn):
        shape = _shape(eqn.invars[0])
        return round(factor * math.prod(shape) * min(shape[-2:]))

    return rule


def _random(eqn: jex.JaxprEqn) -> int:
    return _RANDOM_WORD * max(1, -(-_bytes(eqn.outvars[0].aval) // 4))


_RULES: dict[str, Callable[[jex.JaxprEqn], int]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_SCANS, lambda eqn: _size(eqn.outvars[0].aval)),
    **dict.fromkeys(_SCATTERS, lambda eqn: _size(eqn.invars[2].aval)),
    **dict.fromkeys(("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    "select_and_gather_add": _window,
    "select_and_scatter_add": _select_and_scatter,
    "select_and_scatter": _select_and_scatter,
    "integer_pow": _integer_pow,
    "sort": _sort,
    "top_k": lambda eqn: _size(eqn.invars[0].aval),
    "fft": _fft,
    "cholesky": _cubic(1 / 3),
    "lu": _cubic(2 / 3),
    "qr": _cubic(2),
    "geqrf": _cubic(2),
    "householder_product": _cubic(2),
    "svd": _cubic(14),
    "eigh": _cubic(9),
    "eig": _cubic(25),
    "triangular_solve": lambda eqn: _size(eqn.invars[1].aval) * _shape(eqn.invars[0])[-1],
    **dict.fromkeys(("random_bits", "random_split", "random_fold_in", "threefry2x32", "random_gamma"), _random),
}
