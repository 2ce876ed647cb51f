"""All pools of a file matched under one layout, and what the last layers do when nothing fits them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from transferjax.surgery._align_assign import MARGIN
from transferjax.surgery._align_blocks import Module, Pool, modules
from transferjax.surgery._align_layout import LAYOUTS, is_kernel, turned
from transferjax.surgery._align_match import Choice, Pair, match
from transferjax.surgery._align_names import WEIGHT, is_head, similarity
from transferjax.tree import natural

MOST = 128
"""Candidate plans that are tried at most."""


class Solution(NamedTuple):
    """What a layout makes of a file: pairs, open choices, leaves to waive and to keep, and what fits nowhere.

    ``heads`` are last layers of other sizes that belong together: the file's are waived, the target's kept.
    """

    layout: str
    pairs: tuple[Pair, ...]
    choices: tuple[Choice, ...]
    waived: dict[str, str]
    kept: dict[str, str]
    left: tuple[Module, ...]
    missing: tuple[Module, ...]
    heads: tuple[Pair, ...] = ()

    @property
    def score(self) -> float:
        """How much the names of all pairs agree."""
        open_ = [pair for choice in self.choices for pair in (choice.ways or ((),))[0]]
        return sum(similarity(pair.source.terms, t.terms) for pair in (*self.pairs, *open_) for t in pair.targets)

    @property
    def lacking(self) -> int:
        """How many modules fit nowhere."""
        return len(self.left) + len(self.missing)

    def candidates(self) -> Iterator[tuple[Pair, ...]]:
        """Every set of pairs that is left to choose from."""
        for ways in itertools.product(*(choice.ways for choice in self.choices)):
            yield (*self.pairs, *itertools.chain(*ways))

    def varied(self, base: Solution) -> Iterator[tuple[Pair, ...]]:
        """The pairs of a solution with one choice at a time made in another way; none when these are too many."""
        name = lambda pair: pair.source.all()[0].name
        if base.layout == self.layout and sum(len(choice.ways) for choice in self.choices) <= MOST:
            for way in itertools.chain(*(choice.ways for choice in self.choices)):
                other = {name(pair): pair for pair in way}
                yield tuple(other.get(name(pair), pair) for pair in base.pairs)

    def count(self) -> int:
        """How many candidates there are; more than :data:`MOST` when they were too many to list."""
        total = 1
        for choice in self.choices:
            total *= len(choice.ways) or MOST + 1
        return total


def solve(found: Sequence[Pool], order: Mapping[str, int], layout: str | None, trust: int) -> list[Solution]:
    """The solutions to choose from, the best first: several only where nothing decides between layouts.

    Args:
      found: the pools.
      order: the place of each source leaf in the file.
      layout: of the kernels; ``None``: both are tried.
      trust: how many kinds of evidence may decide beside shapes, see ``match``.

    Returns:
      At least one solution; the first lacks something only if every layout does.
    """
    ordered = informative(list(order))
    sides = [(modules(pool.source, order), modules(pool.target, {})) for pool in found]
    solutions = [_solution(sides, one, ordered, trust) for one in ([layout] if layout else LAYOUTS)]
    rank = lambda one: (one.lacking, len(one.kept) + len(one.waived), -one.score)
    solutions.sort(key=rank)
    best = solutions[0]
    return [
        one
        for one in solutions
        if rank(one)[:2] == rank(best)[:2] and best.score - one.score < MARGIN and (one is best or not best.lacking)
    ]


def informative(names: Sequence[str]) -> bool:
    """Whether an order of names says more than that somebody sorted them.

    >>> informative(["stem", "blocks.0", "head"]), informative(["blocks.0", "head", "stem"])
    (True, False)
    """
    return names not in (sorted(names), sorted(names, key=natural), sorted(names, key=lambda n: natural(_slashed(n))))


def _slashed(name: str) -> str:
    return name.replace(".", "/")


def _solution(sides: Sequence[tuple[list[Module], list[Module]]], layout: str, ordered: bool, trust: int) -> Solution:
    pairs, choices, left, missing = [], [], [], []
    for sources, targets in sides:
        made = match(sources, targets, layout, ordered, trust)
        pairs += made.pairs
        choices += made.choices
        left += made.left
        missing += made.missing
    heads = _heads([m for m in left if m in sides[-1][0]], [m for m in missing if m in sides[-1][1]], layout)
    waived = {leaf.name: why for m, why in heads[0] for leaf in m.all()}
    kept = {leaf.name: why for m, why in heads[1] for leaf in m.all()}
    shared = len(pairs) + sum(len(choice.targets) for choice in choices)
    if len(heads[1]) < shared:  # else it is another network, not one with another last layer
        left = [m for m in left if all(m is not head for head, _ in heads[0])]
        missing = [m for m in missing if all(m is not head for head, _ in heads[1])]
    return Solution(layout, tuple(pairs), tuple(choices), waived, kept, tuple(left), tuple(missing), heads[2])


_Told = list[tuple[Module, str]]


def _heads(left: Sequence[Module], missing: Sequence[Module], layout: str) -> tuple[_Told, _Told, tuple[Pair, ...]]:
    """The last layers among what fits nowhere, of both sides, each with what it is; and which belong together."""
    waived: _Told = []
    kept: _Told = []
    for t in missing:
        rivals = [(s, why) for s in left if (why := _other_classes(s, t, layout))]
        if len(rivals) == 1:
            waived += rivals
            kept.append((t, rivals[0][1]))
    done = [m for m, _ in (*waived, *kept)]
    alone = [sum(s is other for other, _ in waived) == 1 for s, _ in waived]
    pairs = tuple(Pair(s, (t,), why, 1.0) for (s, why), (t, _), one in zip(waived, kept, alone, strict=True) if one)
    rest = lambda side: [m for m in side if is_head(m.text) and all(m is not other for other in done)]
    waived += [(m, "last layer that the target does not have") for m in rest(left)]
    kept += [(m, "last layer that the file does not have") for m in rest(missing)]
    return waived, kept, pairs


def _other_classes(s: Module, t: Module, layout: str) -> str:
    """In words, that two last layers differ in the number of their outputs only; empty if they do not."""
    if s.leaves.keys() != t.leaves.keys() or WEIGHT not in s.leaves or not (is_head(s.text) or is_head(t.text)):
        return ""
    came, to = s.leaves[WEIGHT][0], t.leaves[WEIGHT][0]
    if came is None or to is None or not is_kernel(came, to):
        return ""
    shape, wanted = turned(came.spec.shape, layout), to.spec.shape
    if len(shape) != len(wanted) or shape[:-1] != wanted[:-1]:
        return ""
    return f"last layer of {shape[-1]:,} outputs in the file and {wanted[-1]:,} in the target"
