"""Which outputs of a program depend on which inputs, and in which order its parameters meet the data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Any, NamedTuple

import jax.extend.core as jex

from transferjax.program._flow import forward
from transferjax.program._walk import live

Marks = Callable[[jex.JaxprEqn], Hashable | None]


def dependencies(
    closed_jaxpr: jex.ClosedJaxpr, *, marks: Marks | None = None, platform: str | None = None
) -> list[set[Any]]:
    """The inputs that each output of a program depends on, through calls, loops and branches.

    A value depends on what its equation reads, whatever the numbers (``0 * x`` depends on ``x``), on the condition of
    the branch or loop that made it, and not on what only gave it its shape.

    Args:
      closed_jaxpr: from ``jax.make_jaxpr``.
      marks: ``(eqn) -> mark or None``: outputs of such an equation also depend on the mark.
      platform: of ``jax.lax.platform_dependent`` only this platform's branch is followed; default: all.

    Returns:
      One set of input numbers (and marks) per output.

    >>> import jax
    >>> dependencies(jax.make_jaxpr(lambda x, y: (x + y, y, 1.0))(1.0, 2.0))
    [{0, 1}, {1}, set()]
    """
    body = live(closed_jaxpr, platform=platform)
    count = len(body.jaxpr.invars)
    bits: dict[Hashable, int] = {}  # sets as integers: a program has thousands of equations and hundreds of inputs

    def combine(eqn, facts):
        found = 0
        for fact in facts:
            found |= fact
        mark = None if marks is None else marks(eqn)
        return found if mark is None else found | 1 << bits.setdefault(mark, count + len(bits))

    results = forward(body, [1 << number for number in range(count)], combine, 0)
    names = [*range(count), *bits]
    return [{name for number, name in enumerate(names) if found >> number & 1} for found in results]


class _Meets(NamedTuple):
    """What a value is made of: data already, or parameters that wait for it."""

    data: bool = False
    waiting: frozenset[int] = frozenset()


def order_of_use(closed_jaxpr: jex.ClosedJaxpr, data: Collection[int], *, platform: str | None = None) -> list[int]:
    """The inputs other than ``data``, in the order in which they first meet the data.

    What happens to a parameter before that (casts, transposes, merged adapters, normalised kernels) does not count as
    its use, wherever it is written. Parameters that meet the data in one equation keep the order in which they were
    first touched. Those that reach an output without data come last; those that reach none are left out.

    Args:
      closed_jaxpr: from ``jax.make_jaxpr`` of the forward pass.
      data: the numbers of the inputs that are data.
      platform: of ``jax.lax.platform_dependent`` only this platform's branch is followed; default: all.

    Returns:
      Input numbers.

    >>> import jax
    >>> order_of_use(jax.make_jaxpr(lambda head, stem, x: x * stem * head)(1.0, 2.0, 3.0), data={2})
    [1, 0]
    """
    touched: dict[int, None] = {}
    used: dict[int, None] = {}

    def combine(eqn, facts):
        waiting = frozenset().union(*(fact.waiting for fact in facts))
        touched.update(dict.fromkeys(sorted(waiting)))
        if not any(fact.data for fact in facts):
            return _Meets(False, waiting)
        used.update(dict.fromkeys(sorted(waiting, key=list(touched).index)))
        return _Meets(True)

    body = live(closed_jaxpr, platform=platform)
    count = len(body.jaxpr.invars)
    inputs = [_Meets(True) if n in data else _Meets(False, frozenset({n})) for n in range(count)]
    results = forward(body, inputs, combine, _Meets())
    left = frozenset().union(*(fact.waiting for fact in results)) - set(used)
    return [*used, *sorted(left, key=lambda n: (n not in touched, list(touched).index(n) if n in touched else n))]
