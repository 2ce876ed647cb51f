"""A program split into what its frozen inputs and each example alone decide, and the rest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from transferjax._errors import describe, listing
from transferjax.program import _compat
from transferjax.program._cut import Split, Stored, cheapest_values, computed_again, part_of
from transferjax.program._examples import (
    RULES,
    Fact,
    Layout,
    Mixed,
    after_replacement,
    apart,
    complete,
    join,
    leading,
    normal,
    plain,
)
from transferjax.program._operations import _shape
from transferjax.program._walk import live

TRAINABLE, FROZEN, OBJECTIVE, EXTRA = "trainable", "frozen", "objective", "extra"
CHANGING, BATCH, KEY, STEP = "changing extra", "batch", "key", "step"

_ON_BATCH, _ON_TRAINABLE, _ON_KEY, _ON_CHANGING, _ON_WEIGHTS = 1, 2, 4, 8, 16
_BITS = {
    **{BATCH: _ON_BATCH, TRAINABLE: _ON_TRAINABLE, KEY: _ON_KEY, CHANGING: _ON_CHANGING, STEP: _ON_CHANGING},
    **dict.fromkeys((FROZEN, OBJECTIVE, EXTRA), _ON_WEIGHTS),
}
_LATE = _ON_TRAINABLE | _ON_KEY | _ON_CHANGING
_NOTHING = "nothing is hoisted: no product, reduction or loop may be early."
_SAME_PLACE = ("optimization_barrier", "device_put", "copy")


class Input(NamedTuple):
    """One input of a program: its role, and its path in its tree."""

    role: str
    path: str


def split(
    program: jex.ClosedJaxpr,
    inputs: Sequence[Input],
    count: int,
    *,
    size: Callable[[Stored], int],
    platform: str | None = None,
    forbid: str | None = None,
    random: bool = False,
) -> Split:
    """Splits a program at the cheapest place.

    What depends on nothing that learns, changes or is random, and on each example alone, may be computed early. It is
    cut where the stored values are smallest; products, reductions, loops and calls with derivatives of their own that
    may be early are early, cheap work on stored values is done again. What depends on no example is computed by the
    part that needs it.

    Args:
      program: flat, from ``inline``.
      inputs: what each input is.
      count: the number of examples, the first axis of every batch entry that has it.
      size: bytes of a stored value.
      platform: of ``jax.lax.platform_dependent`` only this platform's branch is looked at; default: all.
      forbid: a reason to compute nothing early.
      random: whether what draws from the key may be early too. Where a draw, or two from one key, would be needed both
        early and late, nothing random is early.

    Returns:
      A :class:`Split`; ``reasons`` say in plain sentences why the cut is where it is.

    >>> import jax, jax.numpy as jnp
    >>> program = jax.make_jaxpr(lambda w, x, head: jnp.sum(jnp.tanh(x @ w) * head))(
    ...     jnp.ones((5, 2)), jnp.ones((8, 5)), jnp.ones(2))
    >>> found = split(program, [Input(FROZEN, "w"), Input(BATCH, "x"), Input(TRAINABLE, "head")], 8,
    ...               size=lambda stored: math.prod(stored.shape(1)))
    >>> [(one.name, one.shape(8)) for one in found.stored], len(found.prefix.eqns)
    ([('hoisted_0', (8, 2))], 2)
    """
    body = live(program, platform=platform)
    known = _Analysis(program.jaxpr, inputs, count, platform, _LATE & ~_ON_KEY if random else _LATE)
    equations = []
    for site in body.sites:
        used = [var for var, keep in zip(site.eqn.outvars, site.outputs, strict=True) if keep]
        early = known.add(site.eqn, used)
        equations.append((site.eqn, early and forbid is None))
    eqns = [eqn for eqn, _ in equations]
    batch = [var for var, one, need in zip(program.jaxpr.invars, inputs, body.inputs) if one.role == BATCH and need]
    paths = {var: one.path for var, one in zip(program.jaxpr.invars, inputs, strict=True)}

    def stored(var: jex.Var, number: int = 0) -> Stored:
        fact = known.facts[var]
        return Stored(var, paths.get(var, f"hoisted_{number}"), fact if isinstance(fact, Layout) else None)

    weigh = lambda var: size(stored(var))
    chosen = cheapest_values(equations, batch, program.jaxpr.outvars, weigh)
    work = [eqn for eqn in part_of(program.jaxpr, eqns, chosen, (), effects=False).eqns if not computed_again(eqn)]
    if not work:  # then the inputs themselves, unless something smaller follows from them
        whole = cheapest_values([(eqn, False) for eqn in eqns], batch, program.jaxpr.outvars, weigh)
        chosen = whole if sum(map(weigh, whole)) <= sum(map(weigh, chosen)) else chosen
    made = iter(range(len(chosen)))
    kept = tuple(stored(var, 0 if var in paths else next(made)) for var in chosen)
    prefix = part_of(program.jaxpr, eqns, chosen, (), effects=False)
    suffix = part_of(program.jaxpr, eqns, program.jaxpr.outvars, chosen, effects=True)
    reasons = (*(() if work else (_NOTHING,)), *((forbid,) if forbid else known.sentences.values()))
    if random and (twice := known.drawn(prefix.eqns, eqns) & known.drawn(suffix.eqns, eqns)):
        again = split(program, inputs, count, size=size, platform=platform, forbid=forbid)
        draw = next(eqn for eqn in suffix.eqns if known.drawn([eqn], eqns) & twice)
        why = f"{cause_of(draw)} draws from a key that is needed before the cut too, so nothing random is early."
        return dataclasses.replace(again, reasons=(why, *again.reasons))
    return Split(program, count, kept, prefix, suffix, reasons)


def split_alike(found: Split, program: jex.ClosedJaxpr) -> Split | None:
    """The same split of the same program for one example, in which nothing shows where the examples are.

    Args:
      found: of the program for several examples.
      program: the program for one.

    Returns:
      A :class:`Split`, or ``None`` where the equations are others.

    >>> import jax, jax.numpy as jnp
    >>> made = lambda count: jax.make_jaxpr(lambda w, x: jnp.tanh(x @ w).sum())(jnp.ones((5, 2)), jnp.ones((count, 5)))
    >>> size = lambda stored: math.prod(stored.shape(1))
    >>> many = split(made(8), [Input(TRAINABLE, "w"), Input(BATCH, "x")], 8, size=size)
    >>> [one.shape(1) for one in split_alike(many, made(1)).stored]
    [(1, 5)]
    """
    many, one = found.program.jaxpr, program.jaxpr
    if [eqn.primitive for eqn in many.eqns] != [eqn.primitive for eqn in one.eqns]:
        return None
    values = lambda jaxpr: [*jaxpr.invars, *(var for eqn in jaxpr.eqns for var in eqn.outvars)]
    there = dict(zip(values(many), values(one), strict=True))
    stored = tuple(Stored(there[s.var], s.name, s.layout and _of_one(s.layout)) for s in found.stored)
    known = [s.var for s in stored]
    prefix = part_of(one, one.eqns, known, (), effects=False)
    return Split(program, 1, stored, prefix, part_of(one, one.eqns, one.outvars, known, effects=True), found.reasons)


def _of_one(layout: Layout) -> Layout:
    return Layout(tuple(tuple(factor for factor in axis if not factor[1]) for axis in layout.dims))


def cause_of(eqn: jex.JaxprEqn, note: str = "") -> str:
    """An equation in words: its primitive, what goes in and what comes out."""
    operands = [describe(v.aval) for v in eqn.invars if math.prod(getattr(v.aval, "shape", ())) > 1] or ["scalars"]
    return f"{eqn.primitive.name} of {' and '.join(operands[:2])} to {describe(eqn.outvars[0].aval)}{note}"


class _Analysis:
    """What is known of each value as the equations of a flat program are added in order: on what it depends, where it
    has its examples, and which weights it is made of; and the sentences that explain the cut."""

    def __init__(self, jaxpr: jex.Jaxpr, inputs: Sequence[Input], count: int, platform: str | None, late: int):
        self.follow, self.count, self.inputs, self.late = Follow(platform), count, inputs, late
        self.depends: dict[Any, int] = {v: _BITS[one.role] for v, one in zip(jaxpr.invars, inputs, strict=True)}
        self.facts: dict[Any, Fact] = {}
        self.weights: dict[Any, int] = {}  # sets of input numbers as integers
        for number, (var, one) in enumerate(zip(jaxpr.invars, inputs, strict=True)):
            shape = _shape(var)
            self.weights[var] = 0 if one.role in (BATCH, KEY, STEP) else 1 << number
            if one.role == BATCH:
                whole = shape and shape[0] == count
                self.facts[var] = leading(shape) if whole else Mixed(f"the batch entry '{one.path}' as a whole")
        self.last = ""  # the weight that met the data most recently
        self.sentences: dict[str, str] = {}  # by cause
        self.candidates: dict[str, str] = {}
        self.numbers: dict[Any, int] = {}  # of what is made of the key alone

    def add(self, eqn: jex.JaxprEqn, outputs: Sequence[Any]) -> bool:
        """Takes in one equation; returns whether it may be early, its ``outputs`` being those that are needed."""
        reads = [var for var in eqn.invars if isinstance(var, jex.Var)]
        depends = weights = 0
        for var in reads:
            depends |= self.depends.get(var, 0)
            weights |= self.weights.get(var, 0)
        data = [var for var in reads if self.depends.get(var, 0) & _ON_BATCH]
        found = self.follow.equation(
            eqn, [None if isinstance(v, jex.Literal) else self.facts.get(v) for v in eqn.invars], self.count
        )
        self.depends.update(dict.fromkeys(eqn.outvars, depends))
        self.weights.update(dict.fromkeys(eqn.outvars, 0 if data else weights))
        self.facts.update(zip(eqn.outvars, found, strict=True))
        if data:
            self.explain(eqn, depends, [self.depends[var] for var in data], found)
            self.meet([var for var in reads if var not in data])
        kept = [fact for var, fact in zip(eqn.outvars, found, strict=True) if var in outputs]
        whole = bool(kept) and all(isinstance(fact, Layout) for fact in kept)
        return whole and bool(depends & _ON_BATCH) and not depends & self.late and not _compat.has_effects(eqn)

    def named(self, weights: int, roles: Sequence[str]) -> list[str]:
        return [one.path for n, one in enumerate(self.inputs) if weights >> n & 1 and one.role in roles]

    def meet(self, others: Sequence[Any]) -> None:
        """Remembers the weight that an equation brings to the data."""
        for var in others:
            names = self.named(self.weights.get(var, 0), (FROZEN, TRAINABLE))
            self.last = names[-1] if names else self.last

    def explain(self, eqn: jex.JaxprEqn, depends: int, data: Sequence[int], found: Sequence[Fact]) -> None:
        """Notes why this equation cannot be early, where it is the first of its kind."""
        before = data[0]
        for one in data[1:]:
            before &= one  # what even the least dependent operand depends on
        new = depends & ~before
        where = f" (after the use of '{self.last}')" if self.last else ""
        weights = 0
        for var in eqn.invars:
            if isinstance(var, jex.Var) and not self.depends.get(var, 0) & _ON_BATCH:
                weights |= self.weights.get(var, 0)
        if new & _ON_TRAINABLE:
            names = self.named(weights, (TRAINABLE,))
            met = f": {listing(names, 3)}" if names else ""
            self.note("trainable", f"what learns first meets the data in {cause_of(eqn)}{where}{met}.")
        elif new & _ON_KEY & self.late:
            self.note("key", f"dropout or augmentation draws randomness that enters at {cause_of(eqn)}{where}.")
        elif new & _ON_CHANGING:
            names = self.named(weights, (CHANGING,))
            met = f": {listing(names, 3)}" if names else ""
            self.note("changing", f"values that the step changes enter at {cause_of(eqn)}{where}{met}.")
        elif not depends & self.late:
            self.explain_mixing(eqn, depends, found, where)

    def explain_mixing(self, eqn: jex.JaxprEqn, depends: int, found: Sequence[Fact], where: str) -> None:
        """Examples that meet are worth a word where weights are involved, or work that cannot be done early."""
        before = {fact for var in eqn.invars if isinstance(var, jex.Var) and (fact := self.facts.get(var))}
        for fact in found:
            if not isinstance(fact, Mixed):
                continue
            text = self.candidates.setdefault(fact.cause, f"examples meet in {fact.cause}{where}.")
            if depends & _ON_WEIGHTS or (fact in before and not computed_again(eqn)):
                self.note(fact.cause, text)

    def drawn(self, part: Sequence[jex.JaxprEqn], eqns: Sequence[jex.JaxprEqn]) -> set[Any]:
        """The keys from which some of the equations draw. Two that are made of one key in the same way are one."""
        if not self.numbers:
            table: dict[Any, int] = {}
            for eqn in eqns:
                if self.depends[eqn.outvars[0]] == _ON_KEY:
                    how = (eqn.primitive.name, str(eqn.params), *map(self.number, eqn.invars))
                    for place, var in enumerate(eqn.outvars):
                        self.numbers[var] = table.setdefault((place, *how), len(table))
        draws = [eqn for eqn in part if not all(map(_is_key, eqn.outvars))]
        return {self.number(var) for eqn in draws for var in eqn.invars if _is_key(var)}

    def number(self, var: Any) -> Any:
        return str(var.val) if isinstance(var, jex.Literal) else self.numbers.get(var, var)

    def note(self, kind: str, text: str) -> None:
        if len(self.sentences) < 6:
            self.sentences.setdefault(kind, text)


def _is_key(var: Any) -> bool:
    return jnp.issubdtype(getattr(var.aval, "dtype", jnp.float32), jax.dtypes.prng_key)


class Follow:
    """Where the examples are in each value of a jaxpr, its bodies included.

    Of ``jax.lax.platform_dependent`` only the branch of ``platform`` is followed, or all with ``None``. What holds for
    the carry of a loop is found by repetition.

    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda x: (x * 2, x.sum(1), x.sum(0)))(jax.numpy.ones((8, 5))).jaxpr
    >>> found = Follow(None).values(jaxpr, [leading((8, 5))], 8)
    >>> [type(found[out]).__name__ for out in jaxpr.outvars]
    ['Layout', 'Layout', 'Mixed']
    """

    def __init__(self, platform: str | None):
        self.platform = platform
        self.control = {"cond": self.cond, "while": self.loop, "scan": self.scan}

    def values(self, jaxpr: jex.Jaxpr, facts: Sequence[Fact], count: int) -> dict[Any, Fact]:
        env: dict[Any, Fact] = dict(zip(jaxpr.invars, facts, strict=True))
        for eqn in jaxpr.eqns:
            found = self.equation(eqn, [_read(env, var) for var in eqn.invars], count)
            env.update(zip(eqn.outvars, found, strict=True))
        return env

    def outputs(self, body: Any, facts: Sequence[Fact], count: int) -> list[Fact]:
        jaxpr = _compat.open_jaxpr(body)
        env = self.values(jaxpr, facts, count)
        return [_read(env, var) for var in jaxpr.outvars]

    def equation(self, eqn: jex.JaxprEqn, facts: list[Fact], count: int) -> list[Fact]:
        name = eqn.primitive.name
        if all(fact is None for fact in facts):
            return [None] * len(eqn.outvars)
        if name in self.control:
            return self.control[name](eqn, facts, count)
        if name in _SAME_PLACE:
            return facts
        body = None if name in RULES else _body(eqn)
        if body is not None:
            return self.outputs(body, facts, count)
        mixed = next((fact for fact in facts if isinstance(fact, Mixed)), None)
        if mixed is not None:
            return [mixed] * len(eqn.outvars)
        dims = [f.dims if isinstance(f, Layout) else plain(_shape(v)) for f, v in zip(facts, eqn.invars)]
        if name in RULES:
            return _checked(eqn, RULES[name](eqn, dims), count)
        known = [None if fact is None else one for fact, one in zip(facts, dims)]
        found = after_replacement(eqn, known, count)
        return _checked(eqn, found, count, " (it has no rule, and no test shows that rows keep to themselves)")

    def cond(self, eqn: jex.JaxprEqn, facts: list[Fact], count: int) -> list[Fact]:
        branches, chosen = eqn.params["branches"], _compat.platform_branch(eqn, self.platform)
        if chosen is not None:
            branches = branches[chosen : chosen + 1]
        elif facts[0] is not None and count > 1:
            return [Mixed(cause_of(eqn, ", whose branch depends on the batch"))] * len(eqn.outvars)
        found = [self.outputs(branch, facts[1:], count) for branch in branches]
        joined = found[0]
        for other in found[1:]:
            joined = [_either(eqn, a, b) for a, b in zip(joined, other, strict=True)]
        return joined

    def loop(self, eqn: jex.JaxprEqn, facts: list[Fact], count: int) -> list[Fact]:
        first = eqn.params["cond_nconsts"]
        second = first + eqn.params["body_nconsts"]
        body = eqn.params["body_jaxpr"]
        carry: Sequence[Fact] = self.carried(eqn, body, facts[first:second], facts[second:], [], count)[0]
        (again,) = self.outputs(eqn.params["cond_jaxpr"], [*facts[:first], *carry], count)
        if again is not None and count > 1:
            carry = [Mixed(cause_of(eqn, ", whose length depends on the batch"))] * len(eqn.outvars)
        return list(carry)

    def scan(self, eqn: jex.JaxprEqn, facts: list[Fact], count: int) -> list[Fact]:
        """A loop over an axis of each example, or over the examples themselves, some at a time."""
        consts, split = eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"]
        length, xs = eqn.params["length"], facts[split:]
        outer = {fact.dims[0] for fact in xs if isinstance(fact, Layout)}
        chunked = not apart(outer)
        inner = count // length if chunked else count
        walks: list[Fact] = [Mixed(cause_of(eqn, ", which walks through the examples"))] * len(eqn.outvars)
        if chunked and (outer != {normal([(length, inner)])} or any(fact is not None for fact in facts[:split])):
            return walks
        xs = [Layout(fact.dims[1:]) if isinstance(fact, Layout) else fact for fact in xs]
        carry, out = self.carried(eqn, eqn.params["jaxpr"], facts[:consts], facts[consts:split], xs, inner)
        if chunked and any(fact is not None for fact in carry):
            return walks
        first = normal([(length, inner if chunked else 0)])
        ys = [Layout((first, *fact.dims)) if isinstance(fact, Layout) else fact for fact in out[len(carry) :]]
        return [*carry, *ys]

    def carried(self, eqn, body, consts, carry, xs, count) -> tuple[list[Fact], list[Fact]]:
        """What holds for a loop's carry in every turn, and for all that its body returns."""
        while True:
            out = self.outputs(body, [*consts, *carry, *xs], count)
            wider = [_either(eqn, a, b) for a, b in zip(carry, out, strict=False)]
            if wider == carry:
                return carry, out
            carry = wider


def _read(env: dict[Any, Fact], var: Any) -> Fact:
    return None if isinstance(var, jex.Literal) else env.get(var)


def _checked(eqn: jex.JaxprEqn, found: Any, count: int, note: str = "") -> list[Fact]:
    """The layouts, or what mixes where the examples are not all there exactly once."""
    found = [None] * len(eqn.outvars) if found is None else found
    kept = [None if one is None else tuple(map(normal, one)) for one in found]
    return [Layout(one) if one is not None and complete(one, count) else Mixed(cause_of(eqn, note)) for one in kept]


def _body(eqn: jex.JaxprEqn) -> jex.Jaxpr | None:
    """The body of an equation that passes its operands on as they are."""
    found = _compat.bodies(eqn)
    if len(found) != 1 or eqn.primitive.name == "pallas_call":
        return None
    shapes = lambda variables: [getattr(var.aval, "shape", None) for var in variables]
    same = shapes(found[0].invars) == shapes(eqn.invars) and shapes(found[0].outvars) == shapes(eqn.outvars)
    return found[0] if same else None


def _either(eqn: jex.JaxprEqn, a: Fact, b: Fact) -> Fact:
    """One fact for a value that may be either."""
    if a is None or b is None or isinstance(a, Mixed):
        return b if a is None else a
    dims = None if isinstance(b, Mixed) else join([a.dims, b.dims])
    return b if isinstance(b, Mixed) else Mixed(cause_of(eqn)) if dims is None else Layout(dims)
