"""Which operations of a graph XLA's CPU backend runs together, so that what lies between them is never written.

An operation that computes each element from few others runs inside its reader: for several readers again in each,
where it is cheap and that reads no more. Before that, library calls take reductions with the arithmetic in front of
them, and softmax with the product in front of it. Source: XLA's ``instruction_fusion.cc`` and
``cpu_instruction_fusion.cc``.
"""

from __future__ import annotations

import dataclasses
import heapq

from transferjax.program._graph import BROADCAST, COPY, DEAR, PRODUCT, REDUCES, Graph, Node, Value
from transferjax.program._operations import _names

_LIBRARY = _names(
    "mul add add_any sub div max min neg abs sign floor ceil round square exp exp2 expm1 log log1p sqrt rsqrt tanh "
    "logistic erf integer_pow"
)
_LEAST = 4096
"""Elements of the smallest arithmetic that a library call takes."""
_LONGEST = 24
"""Operations between a product and the end of its softmax, at most."""


@dataclasses.dataclass(eq=False, slots=True)
class Kernel:
    """Operations that run together.

    Attributes:
      root: the last of them; its outputs are what is written.
      members: all of them.
      inputs: the arrays that they read.
    """

    root: Node
    members: set[Node]
    inputs: dict[Value, None]


def fuse(graph: Graph) -> list[Kernel]:
    """The kernels of a graph, in the order of their roots; operations that nobody reads are left out."""
    calls, alone = _library_calls(graph), _not_repeated(graph)
    readers: dict[Value, set[Node | None]] = {v: set(v.readers) for node in graph.nodes for v in _touched(node)}
    for value in graph.outputs:
        readers.setdefault(value, set()).add(None)
    kernels = []
    for root in reversed(graph.nodes):
        if root.name != COPY and not any(readers[value] for value in root.outputs):
            continue
        kernel = Kernel(root, {root}, dict.fromkeys(root.inputs))
        if root in calls:
            _absorb_call(kernel, calls, readers)
        elif root.fusible:
            _absorb(kernel, calls, alone, readers)
        kernels.append(kernel)
    return kernels[::-1]


def _touched(node: Node) -> list[Value]:
    return [*node.inputs, *node.outputs]


def _take(kernel: Kernel, value: Value, maker: Node, readers: dict[Value, set[Node | None]]) -> None:
    """The maker of an input becomes a member; where nobody else reads it, it is no reader of its own any more."""
    del kernel.inputs[value]
    readers[value].discard(kernel.root)
    kernel.members.add(maker)
    for needed in maker.inputs:
        kernel.inputs[needed] = None
        readers[needed].add(kernel.root)
        if not readers[value]:
            readers[needed].discard(maker)


def _absorb(kernel: Kernel, calls: dict[Node, Node], alone: set[Value], readers: dict[Value, set[Node | None]]) -> None:
    """Takes what can be computed on the way, until nothing more can."""

    def may(value: Value) -> bool:
        maker = value.maker
        if maker is None or not maker.fusible or maker in calls:
            return False
        if len(readers[value]) > 1 and (maker.name in DEAR or value in alone):
            return False
        return not (maker.name in DEAR and any(r in kernel.members and _repeats(r) for r in value.readers))

    while True:
        wanted = [value for value in kernel.inputs if may(value)]
        if not wanted:
            return
        latest = max(wanted, key=lambda value: value.maker.number if value.maker else -1)
        if latest.maker is not None:
            _take(kernel, latest, latest.maker, readers)


def _absorb_call(kernel: Kernel, calls: dict[Node, Node], readers: dict[Value, set[Node | None]]) -> None:
    """Takes the operations of a library call, and broadcasts that nothing else reads."""
    own = lambda node: calls.get(node) is kernel.root
    while True:
        for value in kernel.inputs:
            maker = value.maker
            if maker is None or value.kept:
                continue
            if own(maker) or (maker.name == BROADCAST and all(map(own, value.readers))):
                break
        else:
            return
        if maker in kernel.members:
            del kernel.inputs[value]
            readers[value].discard(kernel.root)
        else:
            readers[value] &= {kernel.root}
            _take(kernel, value, maker, readers)


def _repeats(node: Node) -> bool:
    """Whether an operation reads elements of its operand many times."""
    return node.name in (BROADCAST, "gather")


def _may_fuse(reader: Node, maker: Node, value: Value) -> bool:
    if not (maker.fusible and reader.fusible):
        return False
    return maker.name not in DEAR or not (_repeats(reader) or len(value.readers) > 1)


def _not_repeated(graph: Graph) -> set[Value]:
    """Values that are written rather than computed again in each reader: those of which some reader needs the array
    itself, and that read more than one array of their size."""
    reach: list[int] = []
    for node in graph.nodes:
        bits = 1 << node.number
        for value in node.inputs:
            bits |= reach[value.maker.number] if value.maker is not None else 0
        reach.append(bits)
    found: set[Value] = set()
    for reader in graph.nodes:
        for value in reader.inputs:
            maker = value.maker
            if maker is None or not maker.fusible or value in found or (len(value.readers) == 1 and not value.kept):
                continue
            if _reads_one(maker) or sum(one.bytes for one in maker.inputs) <= value.bytes:
                continue
            if not _on_all_paths(maker, reader, found, reach, {}):
                found.add(value)
    return found


def _reads_one(node: Node) -> bool:
    """Whether at most one operand is as large as the result and no broadcast."""
    rank = len(node.outputs[0].shape)
    large = [v for v in node.inputs if len(v.shape) >= rank and not (v.maker and v.maker.name in (BROADCAST, "iota"))]
    return len(large) <= 1


def _on_all_paths(maker: Node, reader: Node, alone: set[Value], reach: list[int], known: dict[Node, bool]) -> bool:
    """Whether everything between an operation and a later one can be fused into the later one."""
    if reader is maker:
        return True
    if reader not in known:
        known[reader] = all(
            value not in alone
            and _may_fuse(reader, value.maker, value)
            and _on_all_paths(maker, value.maker, alone, reach, known)
            for value in reader.inputs
            if value.maker is not None and reach[value.maker.number] >> maker.number & 1
        )
    return known[reader]


def _library_calls(graph: Graph) -> dict[Node, Node]:
    """For every operation of a library call, the last one of the call."""
    calls: dict[Node, Node] = {}
    for reduction in graph.nodes:
        if reduction.name in REDUCES and reduction not in calls:
            members = _softmax(reduction, calls) or _in_front(reduction, calls)
            last = max(members, key=lambda node: node.number)
            calls.update(dict.fromkeys(members, last))
    return calls


def _for_library(node: Node) -> bool:
    return node.name in _LIBRARY and node.outputs[0].size >= _LEAST


def _in_front(reduction: Node, calls: dict[Node, Node]) -> set[Node]:
    """A reduction and the arithmetic that only it needs."""
    members, todo = {reduction}, [reduction]
    while todo:
        for value in todo.pop().inputs:
            maker = value.maker
            if maker is None or not _for_library(maker) or maker in calls or value.kept:
                continue
            if maker not in members and all(reader in members for reader in value.readers):
                members.add(maker)
                todo.append(maker)
    return members


def _softmax(reduction: Node, calls: dict[Node, Node]) -> set[Node]:
    """A product, the reduction of its rows, the arithmetic on both, and what follows; empty where that is not so."""
    for product in _products(reduction, calls):
        value = product.outputs[0]
        members = _between(value, reduction)
        if reduction not in members or any(member in calls for member in members):
            continue
        members.add(product)
        while True:
            result = max(members, key=lambda node: node.number).outputs[0]
            (after,) = result.readers if len(result.readers) == 1 else (None,)
            if after is None or result.kept or not _for_library(after) or after in calls:
                return members
            members.add(after)
    return set()


def _products(reduction: Node, calls: dict[Node, Node]) -> list[Node]:
    """The products that reach a reduction through arithmetic."""
    found, seen, todo = [], set(), [reduction]
    while todo and len(seen) < _LONGEST:
        for maker in (value.maker for value in todo.pop().inputs):
            if maker is None or maker in seen or maker in calls:
                continue
            seen.add(maker)
            if maker.name == PRODUCT:
                found.append(maker)
            elif _for_library(maker):
                todo.append(maker)
    return found


def _between(value: Value, reduction: Node) -> set[Node]:
    """All on the ways from an array through a reduction to where the ways meet again; empty where one leads out."""
    found: set[Node] = set()
    waiting = [(reader.number, reader) for reader in value.readers]
    heapq.heapify(waiting)
    seen = {reader for _, reader in waiting}
    while waiting and len(found) < _LONGEST:
        number, node = heapq.heappop(waiting)
        if not _for_library(node) and node.name not in REDUCES and node.name != BROADCAST:
            return set()
        found.add(node)
        if not waiting and number >= reduction.number:
            return found
        result = node.outputs[0]
        if result.kept:
            return set()
        for reader in result.readers:
            if reader not in seen:
                seen.add(reader)
                heapq.heappush(waiting, (reader.number, reader))
    return set()
