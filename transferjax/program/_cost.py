"""FLOPs and bytes of a program, counted on its jaxpr and multiplied by trip counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend.core as jex

from transferjax._report import Report
from transferjax.program import _compat
from transferjax.program._operations import Operation, operation
from transferjax.program._walk import COND, LEAF, OPAQUE, SCAN, WHILE, Body, Site, live


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run of a program costs, dead code aside.

    Attributes:
      flops: floating point operations; a multiply-add is two. Integer arithmetic and comparisons count alike.
      transcendentals: evaluations of exp, log, tanh, sqrt and their like; not part of ``flops``.
      bytes_read: bytes of all operands, summed over the operations as if none were fused.
      bytes_written: bytes of all results, likewise.
      by_primitive: FLOPs (transcendentals for such functions) of each primitive, the largest first.
      notes: what was assumed (loops of unknown length, branches), once each.
    """

    flops: int
    transcendentals: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    by_primitive: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def contractions(self) -> int:
        """FLOPs of matrix products and convolutions alone."""
        return self.by_primitive.get("dot_general", 0) + self.by_primitive.get("conv_general_dilated", 0)

    def __add__(self, other: Cost) -> Cost:
        names = [*self.by_primitive, *(n for n in other.by_primitive if n not in self.by_primitive)]
        table = {n: self.by_primitive.get(n, 0) + other.by_primitive.get(n, 0) for n in names}
        return Cost(
            self.flops + other.flops,
            self.transcendentals + other.transcendentals,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            table,
            tuple(dict.fromkeys((*self.notes, *other.notes))),
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(
            self.flops * times,
            self.transcendentals * times,
            self.bytes_read * times,
            self.bytes_written * times,
            {name: count * times for name, count in self.by_primitive.items()},
            self.notes,
        )

    def report(self) -> Report:
        """The cost by primitive, with the totals and notes below."""
        rows = tuple((name, count, count / max(1, self.flops)) for name, count in self.by_primitive.items())
        totals = {
            "FLOPs": self.flops,
            "transcendentals": self.transcendentals,
            "bytes read": self.bytes_read,
            "bytes written": self.bytes_written,
        }
        notes = {"notes": "; ".join(self.notes)} if self.notes else {}
        return Report("Cost", ("primitive", "operations", "share of FLOPs"), rows, {**totals, **notes})


def cost(program: Any, *args: Any, platform: str | None = None) -> Cost:
    """The cost of a program: each equation that runs, times the trip counts of the loops around it.

    XLA's own figure counts the body of a loop once. Here a ``scan`` counts times its length, a ``cond`` as its
    costliest branch, ``jax.lax.platform_dependent`` as the branch of ``platform``, a ``while`` of unknown length once
    (and a note says so). Dead equations cost nothing. Convolutions count real inputs only, not padding.

    Args:
      program: a function, a ``jax.extend.core.ClosedJaxpr``, or what ``jax.jit(f).trace(...)`` returns.
      *args: the function's arguments; arrays or ``jax.ShapeDtypeStruct``.
      platform: ``"cpu"``, ``"cuda"``, ``"rocm"`` or ``"tpu"``; default: the default backend.

    Returns:
      A :class:`Cost`.

    Raises:
      TypeError: ``program`` is neither, or arguments come with a jaxpr.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    >>> cost(lambda x: jax.lax.scan(lambda c, _: (c @ jnp.ones((8, 8)), None), x, length=5)[0], x).flops
    2560
    """
    total = body_cost(live(as_jaxpr(program, *args), platform=platform or jax.default_backend()))
    return dataclasses.replace(total, by_primitive=dict(sorted(total.by_primitive.items(), key=lambda i: -i[1])))


def as_jaxpr(program: Callable | Any, *args: Any) -> jex.ClosedJaxpr:
    """The jaxpr of a function for these arguments; a jaxpr (or a traced function) as it is."""
    inner = getattr(program, "jaxpr", None)
    found = program if isinstance(program, jex.ClosedJaxpr) else inner if isinstance(inner, jex.ClosedJaxpr) else None
    if found is not None and not args:
        return found
    if found is not None or not callable(program):
        raise TypeError(
            f"expected a function with its arguments, or a jaxpr without any; got {type(program).__name__} "
            f"and {len(args)} arguments."
        )
    return jax.make_jaxpr(program)(*args)


def body_cost(body: Body) -> Cost:
    """The cost of the live part of a jaxpr."""
    total = _Tally()
    for site in body.sites:
        total.add(_site_cost(site))
    return total.cost()


def _site_cost(site: Site) -> Cost:
    eqn, name = site.eqn, site.eqn.primitive.name
    if site.kind == LEAF:
        return _leaf_cost(name, operation(eqn, site.outputs))
    inner = [body_cost(body) for body in site.bodies]
    if site.kind == SCAN:
        return inner[0] * eqn.params["length"]
    if site.kind == WHILE:
        note = "a while loop of unknown length is counted once"
        return dataclasses.replace(inner[0] + inner[1], notes=(*inner[0].notes, *inner[1].notes, note))
    if site.kind == COND and len(inner) > 1:
        most = max(inner, key=lambda c: (c.flops, c.bytes_read))
        if len({c.flops for c in inner}) == 1:
            return most
        return dataclasses.replace(most, notes=(*most.notes, "a cond is counted as its costliest branch"))
    if site.kind == OPAQUE:
        opaque = sum(inner[1:], inner[0])
        return dataclasses.replace(opaque, notes=(*opaque.notes, f"each body of '{name}' is counted once"))
    return inner[0] * _compat.devices_of(eqn)


def _leaf_cost(name: str, op: Operation) -> Cost:
    count = op.transcendentals or op.flops
    notes = () if op.known else (f"'{name}' is counted as one FLOP per element",)
    return Cost(op.flops, op.transcendentals, op.read, op.written, {name: count} if count else {}, notes)


class _Tally:
    """A running sum: adding thousands of equations to an immutable Cost one by one would be quadratic."""

    def __init__(self):
        self.totals = [0, 0, 0, 0]
        self.table: dict[str, int] = {}
        self.notes: dict[str, None] = {}

    def add(self, c: Cost) -> None:
        for i, value in enumerate((c.flops, c.transcendentals, c.bytes_read, c.bytes_written)):
            self.totals[i] += value
        for name, count in c.by_primitive.items():
            self.table[name] = self.table.get(name, 0) + count
        self.notes.update(dict.fromkeys(c.notes))

    def cost(self) -> Cost:
        flops, transcendentals, read, written = self.totals
        return Cost(flops, transcendentals, read, written, self.table, tuple(self.notes))
