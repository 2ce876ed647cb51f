"""The cheapest way to cut a program in two: the minimum cut that a maximum flow through it leaves behind."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from transferjax._errors import TransferError
from transferjax.program import _compat
from transferjax.program._examples import Layout
from transferjax.program._interpret import rebind
from transferjax.program._operations import _ELEMENTWISE, _VIEWS, TRANSCENDENTAL, _shape

Edge = tuple[int, int, "int | None"]


def minimum_cut(edges: Iterable[Edge], source: int, sink: int) -> frozenset[int]:
    """The source's side of the minimum cut; of equally cheap cuts the one nearest the sink.

    Capacities are whole numbers of any size, so a cut is exact whatever it weighs.

    Args:
      edges: ``(from, to, capacity)`` with capacities of at least 0; ``None``: this edge is never cut.
      source: the node from which everything flows.
      sink: the node to which everything flows.

    Returns:
      Every node that cannot reach the sink once the cut edges are gone, ``source`` among them.

    Raises:
      TransferError: a path of edges that are never cut leads from source to sink.

    >>> sorted(minimum_cut([(0, 1, 5), (1, 2, 3), (2, 3, 3)], 0, 3))
    [0, 1, 2]

    Source: Dinic, "Algorithm for solution of a problem of maximum flow", 1970; Ford and Fulkerson, 1956.
    """
    edges = list(edges)
    endless = 1 + sum(capacity for _, _, capacity in edges if capacity is not None)
    flow = _Flow(1 + max([source, sink, *(max(a, b) for a, b, _ in edges)]))
    for tail, head, capacity in edges:
        flow.connect(tail, head, endless if capacity is None else capacity)
    total = 0
    while (levels := flow.levels(source, sink)) is not None:
        total += flow.block(source, sink, levels)
        if total >= endless:
            raise TransferError(
                "no finite cut parts source and sink: a path of edges that are never cut connects them. Expected at "
                "least one edge with a capacity on every path."
            )
    return frozenset(range(len(flow.arcs))) - flow.reaching(sink)


class _Flow:
    """What can still flow along each arc; arc ``a`` and its reverse ``a ^ 1`` stand side by side."""

    def __init__(self, nodes: int):
        self.arcs: list[list[int]] = [[] for _ in range(nodes)]
        self.heads: list[int] = []
        self.left: list[int] = []

    def connect(self, tail: int, head: int, capacity: int) -> None:
        for start, end, room in ((tail, head, capacity), (head, tail, 0)):
            self.arcs[start].append(len(self.heads))
            self.heads.append(end)
            self.left.append(room)

    def levels(self, source: int, sink: int) -> list[int] | None:
        """Each node's distance from the source along arcs with room; ``None`` when the sink cannot be reached."""
        found = [-1] * len(self.arcs)
        found[source] = 0
        queue = deque([source])
        while queue:
            node = queue.popleft()
            for arc in self.arcs[node]:
                head = self.heads[arc]
                if self.left[arc] and found[head] < 0:
                    found[head] = found[node] + 1
                    queue.append(head)
        return found if found[sink] >= 0 else None

    def block(self, source: int, sink: int, levels: list[int]) -> int:
        """Pushes along shortest paths until each is blocked; returns how much."""
        total, path, node = 0, [], source
        following = [0] * len(self.arcs)
        while True:
            if node == sink:
                room = min(self.left[arc] for arc in path)
                for arc in path:
                    self.left[arc] -= room
                    self.left[arc ^ 1] += room
                total, path, node = total + room, [], source
                continue
            while following[node] < len(self.arcs[node]):
                arc = self.arcs[node][following[node]]
                if self.left[arc] and levels[self.heads[arc]] == levels[node] + 1:
                    break
                following[node] += 1
            else:
                if node == source:
                    return total
                node = self.heads[path.pop() ^ 1]
                following[node] += 1
                continue
            path.append(arc)
            node = self.heads[arc]

    def reaching(self, sink: int) -> frozenset[int]:
        """The nodes from which something could still flow to the sink."""
        found, queue = {sink}, deque([sink])
        while queue:
            for arc in self.arcs[queue.popleft()]:
                tail = self.heads[arc]
                if self.left[arc ^ 1] and tail not in found:
                    found.add(tail)
                    queue.append(tail)
        return frozenset(found)


# What is computed again rather than stored: arithmetic element by element, and what only moves or names elements.
_AGAIN = (_ELEMENTWISE | TRANSCENDENTAL.keys() | _VIEWS).union(
    ("convert_element_type", "integer_pow", "reduce_precision", "bitcast_convert_type", "real", "imag", "copy"),
    ("broadcast_in_dim", "transpose", "slice", "dynamic_slice", "split", "rev", "pad", "concatenate", "gather"),
)


def computed_again(eqn: jex.JaxprEqn) -> bool:
    """Whether an operation is cheap enough to be done twice: no product, reduction, loop or custom derivative is."""
    return eqn.primitive.name in _AGAIN


def cheapest_values(
    equations: Sequence[tuple[jex.JaxprEqn, bool]],
    inputs: Sequence[jex.Var],
    outputs: Sequence[Any],
    size: Callable[[jex.Var], int],
) -> list[jex.Var]:
    """The values that part a program in two and weigh least, in the order in which they are made.

    Args:
      equations: every equation in order, and whether its outputs may be computed before the cut.
      inputs: the values that are there before the cut.
      outputs: the program's outputs, all after the cut.
      size: the weight of a value.

    Returns:
      What has to be kept. All else that is needed after the cut follows from it by equations that may be computed
      again, or were not allowed before the cut. Of equally light cuts it is the last.

    >>> import jax, jax.numpy as jnp
    >>> jaxpr = jax.make_jaxpr(lambda x: jnp.sin(jnp.sum(x, 1)).sum())(jnp.ones((8, 5))).jaxpr
    >>> values = cheapest_values([(eqn, n < 1) for n, eqn in enumerate(jaxpr.eqns)], jaxpr.invars, jaxpr.outvars,
    ...                          lambda var: var.aval.size)
    >>> [value.aval.shape for value in values]
    [(8,)]
    """
    source, sink = 0, 1
    made: dict[Any, int] = {var: source for var in inputs}  # the node of the equation that makes a value
    nodes: dict[Any, int] = {var: 2 + n for n, var in enumerate(inputs)}
    edges: list[Edge] = [(source, nodes[var], size(var)) for var in inputs]
    following = 2 + len(inputs)
    for eqn, early in equations:
        node, following = (following, following + 1) if early else (sink, following)
        reads = {var for var in eqn.invars if isinstance(var, jex.Var)}
        edges += [(nodes[var], node, None) for var in reads if var in nodes]
        if not early:
            continue
        if not computed_again(eqn):
            edges.append((source, node, None))
        for var in eqn.outvars:
            made[var], nodes[var] = node, following
            edges.append((node, following, size(var)))
            following += 1
    edges += [(nodes[var], sink, None) for var in outputs if isinstance(var, jex.Var) and var in nodes]
    before = minimum_cut(edges, source, sink)
    return [var for var, node in nodes.items() if made[var] in before and node not in before]


class Stored(NamedTuple):
    """A value that is kept between the two parts; ``layout`` is ``None`` for a batch entry without examples."""

    var: jex.Var
    name: str
    layout: Layout | None

    def shape(self, count: int) -> tuple[int, ...]:
        """Of the stored form."""
        return _shape(self.var) if self.layout is None else self.layout.stored_shape(count)

    @property
    def dtype(self) -> Any:
        return getattr(self.var.aval, "dtype", None)

    def pack(self, value: Any, count: int) -> Any:
        return value if self.layout is None else self.layout.pack(value, count)

    def unpack(self, value: Any) -> Any:
        return value if self.layout is None else self.layout.unpack(value, _shape(self.var))


class Part(NamedTuple):
    """Some equations of a program, in order, and the numbers of the inputs that they need."""

    eqns: tuple[jex.JaxprEqn, ...]
    reads: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """A program in two parts; :meth:`early` and :meth:`late` run them."""

    program: jex.ClosedJaxpr = dataclasses.field(repr=False)
    count: int
    stored: tuple[Stored, ...]
    prefix: Part = dataclasses.field(repr=False)
    suffix: Part = dataclasses.field(repr=False)
    reasons: tuple[str, ...]

    def early(self, arguments: Mapping[int, Any]) -> dict[str, Any]:
        """The stored values by name, examples first, from the inputs that ``prefix`` reads."""
        env = self._run(self.prefix, arguments, {})
        return {one.name: one.pack(env[one.var], self.count) for one in self.stored}

    def late(self, arguments: Mapping[int, Any], stored: Mapping[str, Any]) -> list[Any]:
        """The program's outputs, from the inputs that ``suffix`` reads and the stored values."""
        env = self._run(self.suffix, arguments, {one.var: one.unpack(stored[one.name]) for one in self.stored})
        return [var.val if isinstance(var, jex.Literal) else env[var] for var in self.program.jaxpr.outvars]

    def _run(self, part: Part, arguments: Mapping[int, Any], env: dict[Any, Any]) -> dict[Any, Any]:
        env.update(zip(self.program.jaxpr.constvars, self.program.consts, strict=True))
        env.update((self.program.jaxpr.invars[number], arguments[number]) for number in part.reads)
        for eqn in part.eqns:
            values = [var.val if isinstance(var, jex.Literal) else env[var] for var in eqn.invars]
            env.update(zip(eqn.outvars, rebind(eqn, values), strict=True))
        return env


def part_of(jaxpr: jex.Jaxpr, eqns: Sequence[jex.JaxprEqn], wanted: Iterable[Any], known: Iterable[Any], *, effects):
    """The equations that lead from ``known`` values and inputs to the ``wanted`` ones."""
    stop = set(known)
    needed = {var for var in wanted if isinstance(var, jex.Var)} - stop
    chosen = []
    for eqn in reversed(eqns):
        if needed.intersection(eqn.outvars) or (effects and _compat.has_effects(eqn)):
            chosen.append(eqn)
            needed |= {var for var in eqn.invars if isinstance(var, jex.Var)} - stop
    return Part(tuple(chosen[::-1]), tuple(n for n, var in enumerate(jaxpr.invars) if var in needed))
