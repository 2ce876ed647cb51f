"""How much memory a program takes, told from its jaxpr: nothing is compiled, and no array is made.

The program is lowered, fused and put in order as XLA's CPU backend does it; every written array then lives from the
kernel that writes it to the last one that reads it, and the arrays are packed into one room as XLA packs them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from transferjax.program._cost import as_jaxpr
from transferjax.program._fusion import Kernel, fuse
from transferjax.program._graph import BRANCHES, COPY, ELEMENTWISE, Graph, Value
from transferjax.program._lowering import lower
from transferjax.program._operations import _bytes
from transferjax.program._walk import live

_POINTER = 8
_ALIGNMENT = 64
_IN_PLACE = {BRANCHES, COPY, "dynamic_update_slice"}


class Memory(NamedTuple):
    """The memory of one program in bytes, as ``measure`` reports it of a compiled one.

    Attributes:
      argument_bytes: of all arguments that it reads.
      output_bytes: of all results, those that reuse an argument included.
      alias_bytes: of results that reuse a donated argument.
      temporary_bytes: held while it runs, arguments and results aside.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int

    @property
    def peak_bytes(self) -> int:
        """What the device must have: arguments, results that reuse none of them, and temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes


def predict_memory(
    program: Callable | Any, *args: Any, donated: Sequence[bool] | None = None, platform: str | None = None
) -> Memory:
    """The memory that a program will take, from the life of every array in its jaxpr.

    Elementwise work is fused into what reads it; products, convolutions, reductions, scatters and loops write arrays.
    Loops hold their carry and stacked results once and their body's arrays for one turn, branches share one room, a
    result may take the place of an operand that dies. On ``"cpu"`` kernels run as soon as their operands are there, as
    XLA orders them, which keeps early results long; elsewhere in the order of the program. The rules are those of the
    CPU backend: for other platforms the figure is a guide that was not compared. Results that reuse no argument are
    counted beside the temporaries, though XLA may use their room for some before they are written.

    Args:
      program: a function, a ``jax.extend.core.ClosedJaxpr``, or what ``jax.jit(f).trace(...)`` returns.
      *args: the function's arguments; arrays or ``jax.ShapeDtypeStruct``.
      donated: which flat arguments may be reused for results; default: those that ``jax.jit(...).trace`` was told.
      platform: ``"cpu"``, ``"cuda"``, ``"rocm"`` or ``"tpu"``; default: the default backend.

    Returns:
      A :class:`Memory`.

    Raises:
      TypeError: ``program`` is none of the three, or arguments come with a jaxpr.
      ValueError: ``donated`` has another length than the arguments.

    >>> import jax, jax.numpy as jnp
    >>> x, w = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 32), jnp.float32)
    >>> memory = predict_memory(lambda x, w: jnp.sum(jnp.tanh(x @ w)), x, w)
    >>> memory.argument_bytes, memory.temporary_bytes
    (12288, 8192)

    Source: XLA's CPU backend (``cpu_instruction_fusion.cc``, ``heap_simulator.cc``).
    """
    jaxpr, platform = as_jaxpr(program, *args), platform or jax.default_backend()
    given = [var.aval for var in jaxpr.jaxpr.invars]
    marks = list(donated) if donated is not None else _donated(program, len(given))
    if len(marks) != len(given):
        raise ValueError(
            f"predict_memory() expects one mark in donated for each of {len(given)} arguments, got {len(marks)}."
        )
    body = live(jaxpr, platform=platform)
    free = Counter(_kind(aval) for aval, mark, read in zip(given, marks, body.inputs, strict=True) if mark and read)
    results = [var.aval for var in jaxpr.jaxpr.outvars]
    alias = 0
    for aval in results:
        if free[_kind(aval)]:
            free[_kind(aval)] -= 1
            alias += _bytes(aval)
    return Memory(
        sum(_bytes(aval) for aval, read in zip(given, body.inputs, strict=True) if read),
        sum(map(_bytes, results)) + (_POINTER * len(results) if len(results) > 1 else 0),
        alias,
        temporary_bytes(lower(body), platform),
    )


def _kind(aval: Any) -> tuple[Any, ...]:
    return tuple(aval.shape), aval.dtype


def _donated(program: Any, count: int) -> list[bool]:
    """Which arguments a traced program was told to donate; none for anything else."""
    marks = [bool(getattr(leaf, "donated", False)) for leaf in jax.tree.leaves(getattr(program, "args_info", ()))]
    return marks if len(marks) == count else [False] * count


def temporary_bytes(graph: Graph, platform: str) -> int:
    """The bytes of the room in which all arrays of a graph, its inputs and outputs aside, find a place."""
    lives: list[_Life] = []
    _live_through(graph, platform, 0, lives)
    return min(pack(lives, key=key) for key in (_by_size, _by_length))


def _live_through(graph: Graph, platform: str, clock: int, lives: list[_Life]) -> int:
    """Adds the lives of a graph's arrays; the time after its last kernel. Bodies run with their kernel."""
    kernels = fuse(graph)
    heap = _Heap(graph, _as_ready(graph, kernels) if platform == "cpu" else kernels, lives)
    for kernel in heap.kernels:
        heap.begin(kernel, clock)
        for body in kernel.root.bodies:
            clock = _live_through(body, platform, clock + 1, lives)
        heap.end(kernel, clock)
        clock += 1
    return clock


def _as_ready(graph: Graph, kernels: list[Kernel]) -> list[Kernel]:
    """The kernels as their operands become ready, the longest ready first."""
    makers = {value: kernel for kernel in kernels for value in kernel.root.outputs}
    needs: dict[Kernel, int] = {}
    readers: dict[Any, list[Kernel]] = {}
    for kernel in kernels:
        sources = dict.fromkeys(makers.get(value, value) for value in kernel.inputs)
        needs[kernel] = len(sources)
        for source in sources:
            readers.setdefault(source, []).append(kernel)
    given = [*graph.inputs, *(s for s in readers if isinstance(s, Value) and s not in set(graph.inputs))]
    readers[None] = [kernel for kernel in kernels if not needs[kernel]]  # they read constants, which come last
    needs.update(dict.fromkeys(readers[None], 1))
    queue: deque[Any] = deque([*given, None])
    order = []
    while queue:
        ready = queue.popleft()
        if isinstance(ready, Kernel):
            order.append(ready)
        for kernel in readers.get(ready, ()):
            needs[kernel] -= 1
            if not needs[kernel]:
                queue.append(kernel)
    return order


class _Life(NamedTuple):
    """A buffer.

    Attributes:
      bytes: its size.
      first, last: the first and last time at which something is in it.
      length: how long the first array is in it; others may take its place.
    """

    bytes: int
    first: int
    last: int
    length: int


class _Heap:
    """The buffers of one graph while its kernels run in order."""

    def __init__(self, graph: Graph, kernels: list[Kernel], lives: list[_Life]):
        self.kernels, self.lives = kernels, lives
        self.reads = Counter(value for kernel in kernels for value in kernel.inputs)
        self.sizes = {value: _written(value) for kernel in kernels for value in kernel.root.outputs}
        for carried, following in graph.carried.items():
            self.sizes.update(dict.fromkeys(_in_their_place(carried, following, kernels), 0))
        self.buffers: dict[Value, list[int]] = {}  # [bytes, arrays in it, first time, length of the first array's life]

    def begin(self, kernel: Kernel, clock: int) -> None:
        """Finds a buffer for what a kernel writes."""
        root = kernel.root
        if root.bases:
            for value, base in zip(root.outputs, root.bases, strict=True):
                if base in self.buffers:
                    self.buffers[value] = self.buffers[base]
                    self.buffers[value][1] += 1
            return
        dying = [value for value in kernel.inputs if self.reads[value] == 1 and value in self.buffers]
        for value in root.outputs:
            if self.sizes[value]:
                self._place(value, kernel, dying, clock)

    def end(self, kernel: Kernel, clock: int) -> None:
        """Gives back the buffers of what nobody reads any more."""
        for value in kernel.inputs:
            self.reads[value] -= 1
        for value in {**kernel.inputs, **dict.fromkeys(kernel.root.outputs)}:
            buffer = None if self.reads[value] or value.kept else self.buffers.pop(value, None)
            if buffer is not None:
                buffer[1] -= 1
                buffer[3] = buffer[3] or clock - buffer[2]
                if not buffer[1]:
                    self.lives.append(_Life(buffer[0], buffer[2], clock, buffer[3]))

    def _place(self, value: Value, kernel: Kernel, dying: list[Value], clock: int) -> None:
        for old in dying:
            buffer = self.buffers[old]
            if buffer[:2] == [self.sizes[value], 1] and old.bytes == value.bytes and _in_place(old, value, kernel):
                self.buffers[value] = buffer
                buffer[1] += 1
                return
        self.buffers[value] = [self.sizes[value], 1, clock, 0]


def _in_their_place(carried: Value, following: Value | None, kernels: list[Kernel]) -> list[Value]:
    """The arrays of a turn that need no room beside the loop's own: what is carried, when nothing reads it after the
    array that takes its place is made, and its copy, when an inner loop works on that."""
    if following is None or following is carried:
        return [carried]
    makers = {value: kernel for kernel in kernels for value in kernel.root.outputs}
    before: set[Kernel] = set()
    todo = [makers[following]] if following in makers else []
    while todo:
        kernel = todo.pop()
        if kernel not in before:
            before.add(kernel)
            todo += [makers[value] for value in kernel.inputs if value in makers]
    readers = [kernel for kernel in kernels if carried in kernel.inputs]
    if not all(kernel in before for kernel in readers):
        return []
    copies = [value for kernel in readers if kernel.root.name == COPY for value in kernel.root.outputs]
    return [carried, *copies]


def _written(value: Value) -> int:
    """Bytes of an array that a kernel writes: none for a result, whose place is another's, nor for one number."""
    return 0 if value.kept or value.size <= 1 else value.bytes


def _in_place(old: Value, new: Value, kernel: Kernel) -> bool:
    """Whether a kernel may write over an operand: when it reads of it only the element that it writes."""
    if kernel.root.name in _IN_PLACE:
        return True
    if kernel.root.name not in ELEMENTWISE or (new.readers and all(new in reader.viewed for reader in new.readers)):
        return False
    todo = [old]
    while todo:
        value = todo.pop()
        for reader in value.readers:
            if reader in kernel.members:
                if reader.name not in ELEMENTWISE or value in reader.viewed:
                    return False
                todo += reader.outputs
    return True


def _by_size(life: _Life) -> tuple[int, int, int]:
    return life.bytes, life.length, -life.first


def _by_length(life: _Life) -> tuple[int, int, int]:
    return life.length, life.bytes, -life.first


def pack(lives: Sequence[_Life], *, key: Callable[[_Life], Any] = _by_size) -> int:
    """The bytes that buffers take when each, the first by ``key`` first, goes into the smallest gap that holds it."""
    order = sorted(lives, key=key, reverse=True)
    first, last = (np.array([life[n] for life in order], np.int64) for n in (1, 2))
    low, high = np.zeros(len(order), np.int64), np.zeros(len(order), np.int64)
    for number, life in enumerate(order):
        beside = np.flatnonzero((first[:number] <= life.last) & (last[:number] >= life.first))
        beside = beside[np.argsort(low[beside], kind="stable")]
        begins = np.concatenate([[0], np.maximum.accumulate(high[beside])])
        gaps = low[beside] - begins[:-1]
        fits = np.flatnonzero(gaps >= life.bytes)
        low[number] = begins[fits[np.argmin(gaps[fits])]] if fits.size else begins[-1]
        high[number] = low[number] + -(-life.bytes // _ALIGNMENT) * _ALIGNMENT
    return int(high.max(initial=0))
