"""A program as a graph of arrays and operations: what XLA's CPU backend sees before it fuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from transferjax.program._operations import _bytes, _names

BROADCAST, PRODUCT, COPY, CARRY, WRITE = "broadcast_in_dim", "dot_general", "copy into", "carry", "write into"
SUMMED_ROWS = "dot_general over rows"
LOOP, BRANCHES, BARRIER, POSITIONS = "loop", "branches", "optimization_barrier", "positions"
REDUCES = _names("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or")
SCATTERS = _names("scatter scatter_add scatter-add scatter_mul scatter-mul scatter_max scatter_min scatter_sub")
DEAR = _names(
    "exp exp2 expm1 log log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh sqrt rsqrt cbrt erf erfc "
    "erf_inv logistic pow atan2 nextafter lgamma digamma"
)
"""Operations that are not done again for another reader."""

ELEMENTWISE = DEAR | _names(
    "add add_any sub mul div neg abs sign max min clamp select_n eq ne lt le gt ge eq_to le_to lt_to and or not xor "
    "rem floor ceil round is_finite shift_left shift_right_logical shift_right_arithmetic convert_element_type "
    "integer_pow square real imag mul_add reduce_precision bitcast_convert_type clz population_count conj"
)
MOVES = _names(f"{BROADCAST} concatenate dynamic_slice gather iota pad rev slice transpose") | {WRITE}


class Value:
    """An array: its shape as it is written, its bytes, who makes it (``None``: given) and who reads it, in order."""

    __slots__ = ("bytes", "dtype", "kept", "maker", "readers", "shape")

    def __init__(self, aval: Any, maker: Node | None):
        self.shape: tuple[int, ...] = tuple(getattr(aval, "shape", ()))
        self.dtype = getattr(aval, "dtype", None)
        self.bytes = _bytes(aval)
        self.maker, self.readers, self.kept = maker, dict[Node, None](), False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """An operation.

    Attributes:
      number: its place in the graph.
      name: of its primitive, or one of this file's.
      inputs: what it reads, each once.
      outputs: what it makes.
      viewed: those inputs that it reads under another shape.
      bases: the inputs whose buffers hold the outputs, one for each, where that must be so.
      bodies: the graphs of a loop, or of every branch.
    """

    number: int
    name: str
    inputs: list[Value]
    outputs: list[Value] = dataclasses.field(default_factory=list)
    viewed: set[Value] = dataclasses.field(default_factory=set)
    bases: tuple[Value, ...] = ()
    bodies: tuple[Graph, ...] = ()

    @property
    def fusible(self) -> bool:
        """Whether each element of the result is computed from few others, so that a reader can compute it."""
        return self.name in ELEMENTWISE or self.name in MOVES


class Graph:
    """The operations of one body, in order.

    Attributes:
      nodes: the operations.
      inputs: the arrays that are given.
      outputs: the arrays that come back.
      carried: of a loop's body: each carried array as it is read, and the one that takes its place.
    """

    def __init__(self):
        self.nodes: list[Node] = []
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.carried: dict[Value, Value | None] = {}
        self._known: dict[Any, list[Value]] = {}

    def given(self, aval: Any) -> Value:
        self.inputs.append(Value(aval, None))
        return self.inputs[-1]

    def add(
        self, name: str, inputs: Sequence[Value], avals: Sequence[Any], key: Any = None, **more: Any
    ) -> list[Value]:
        """What an operation makes; with a key, an equal operation on the same arrays is the one that is there."""
        whole = (name, key, tuple(inputs), tuple((tuple(a.shape), str(a.dtype)) for a in avals))
        if key is not None and whole in self._known:
            return self._known[whole]
        node = Node(len(self.nodes), name, list(dict.fromkeys(inputs)), **more)
        node.outputs = [Value(aval, node) for aval in avals]
        self.nodes.append(node)
        for value in node.inputs:
            value.readers[node] = None
        if key is not None:
            self._known[whole] = node.outputs
        return node.outputs

    def constant(self, value: Any, aval: Any) -> Value:
        """One number in every place."""
        return self.add(BROADCAST, [], [aval], key=str(value))[0]

    def zeros(self, aval: Any) -> Value:
        return self.constant(0.0 if jnp.issubdtype(aval.dtype, jnp.inexact) else 0, array(aval.shape, aval.dtype))

    def copied(self, value: Value | None, aval: Any) -> Value:
        """An array that may be written to."""
        return self.add(COPY, [] if value is None else [value], [aval])[0]

    def close(self, outputs: Sequence[Value | None]) -> Graph:
        """Says what comes back, and drops the operations that nobody reads; copies are made for who writes on them."""
        self.outputs = [value for value in outputs if value is not None]
        for value in self.outputs:
            value.kept = True
        needed: list[Node] = []
        for node in reversed(self.nodes):
            if node.name == COPY or any(value.readers or value.kept for value in node.outputs):
                needed.append(node)
                continue
            for value in node.inputs:
                del value.readers[node]
        self.nodes = needed[::-1]
        for number, node in enumerate(self.nodes):
            node.number = number
        return self


def array(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)
