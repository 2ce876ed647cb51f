"""Which module of the target each module of the source is, within one pool, under one layout of kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from transferjax.surgery._align_assign import Assignment, assign
from transferjax.surgery._align_blocks import Module
from transferjax.surgery._align_layout import AXES, TORCH, Leaf, is_kernel, parts, route
from transferjax.surgery._align_names import WEAK, similarity, usual_place
from transferjax.surgery._ops import Op

FUSED = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}
_LATER = 0.3  # what numbers, order and neighbours count beside names
_ALONE = 0.5  # confidence in a pair that only its shape speaks for

STAGES = ("names", "numbers", "order", "neighbours")
"""What speaks for a pair beside its shape, in the order in which it is asked."""


class Pair(NamedTuple):
    """A source module, the target modules made of it (several: it is cut), and why."""

    source: Module
    targets: tuple[Module, ...]
    evidence: str
    confidence: float


class Choice(NamedTuple):
    """Modules that nothing tells apart, and every way to pair them (none listed: too many)."""

    sources: tuple[Module, ...]
    targets: tuple[Module, ...]
    ways: tuple[tuple[Pair, ...], ...]


class Matching(NamedTuple):
    """The pairs of a pool, what is open, and the modules without a partner."""

    pairs: tuple[Pair, ...]
    choices: tuple[Choice, ...]
    left: tuple[Module, ...]
    missing: tuple[Module, ...]


class Link(NamedTuple):
    """A pair of leaves: what the target leaf is made of, how it is cut from it, and the operations after that."""

    source: Leaf
    targets: tuple[Leaf, ...]
    cut: tuple[int, tuple[int, ...]] | None
    ops: tuple[tuple[Op, ...], ...]
    pair: Pair


def match(sources: Sequence[Module], targets: Sequence[Module], layout: str, ordered: bool, trust: int) -> Matching:
    """Pairs the modules of a pool.

    Args:
      sources: modules of the file.
      targets: modules to fill.
      layout: of the file's kernels.
      ordered: whether the places of the source modules in the file say anything.
      trust: how many of :data:`STAGES` may decide; 0: shapes only.

    Returns:
      A :class:`Matching`. A pair needs the same roles with shapes that fit in every block; among those that fit,
      names decide, then numbers, then order, then neighbours in the file.
    """
    pairs = _cut(sources, targets, layout)
    alone = STAGES.index("neighbours")  # these can be asked once the rest is known
    ours = [m for m in sources if all(m is not pair.source for pair in pairs)]
    theirs = [m for m in targets if all(m is not t for pair in pairs for t in pair.targets)]
    fits = np.array([[_fits(s, t, layout) for t in theirs] for s in ours], bool).reshape(len(ours), len(theirs))
    judge = _Judge(ours, theirs, ordered)
    open_: list[tuple[list[int], list[int]]] = []
    for rows, columns in _components(fits):
        found, why = judge.assign(rows, columns, fits, min(trust, alone))
        if found.tied:
            open_.append((rows, columns))
        else:
            pairs += judge.pairs(rows, columns, found, why)
    known, choices = list(pairs), []
    for rows, columns in open_:
        judge.known = {id(pair.source): pair.targets[0] for pair in known}
        found, why = judge.assign(rows, columns, fits, trust)
        if found.tied:
            choices.append(judge.choice(rows, columns, found))
            found = found._replace(columns=_settled(found))
        pairs += judge.pairs(rows, columns, found, why)
    used = {id(pair.source) for pair in pairs} | {id(s) for choice in choices for s in choice.sources}
    filled = {id(t) for pair in pairs for t in pair.targets} | {id(t) for choice in choices for t in choice.targets}
    left = tuple(m for m in sources if id(m) not in used)
    return Matching(tuple(pairs), tuple(choices), left, tuple(m for m in targets if id(m) not in filled))


def links(pair: Pair, layout: str) -> list[Link]:
    """The pairs of leaves of a pair of modules."""
    out = []
    for role, row in pair.source.leaves.items():
        for number, leaf in enumerate(row):
            if leaf is None:
                continue
            to = tuple(t for target in pair.targets if (t := target.leaves[role][number]) is not None)
            cut = parts(leaf, to, layout) if len(to) > 1 else None
            ops = tuple(_ops(leaf, to, cut, layout))
            out.append(Link(leaf, to, cut, ops, pair))
    return out


def head_links(pair: Pair, layout: str) -> list[Link]:
    """As ``links``, of two last layers of other sizes: what the target's would be made of, were it not fresh."""
    out = []
    for role, row in pair.source.leaves.items():
        for leaf, to in zip(row, pair.targets[0].leaves[role], strict=True):
            if leaf is not None and to is not None:
                turn = layout == TORCH and is_kernel(leaf, to)
                ops: tuple[Op, ...] = (("permute", AXES[len(leaf.spec.shape)]),) if turn else ()
                out.append(Link(leaf, (to,), None, (ops,), pair))
    return out


def _ops(leaf: Leaf, to: Sequence[Leaf], cut: tuple[int, tuple[int, ...]] | None, layout: str) -> list[tuple[Op, ...]]:
    came = [leaf]
    if cut:
        axis, sizes = cut
        shape = leaf.spec.shape
        shapes = [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]
        came = [Leaf(leaf.name, leaf.spec._replace(shape=one)) for one in shapes]
    return [route(one, target, layout) or () for one, target in zip(came, to, strict=True)]


class _Judge:
    """What speaks for each pair: names, numbers, order, neighbours; each is asked only where those before tie."""

    def __init__(self, ours: Sequence[Module], theirs: Sequence[Module], ordered: bool):
        self.ours, self.theirs, self.ordered = list(ours), list(theirs), ordered
        self.known: Mapping[int, Module] = {}
        self.ranks = {**_ranks(self.ours), **_ranks(self.theirs)}
        by_place = sorted(self.ours, key=lambda m: m.place)
        self.before = {id(b): a for a, b in itertools.pairwise(by_place)} if ordered else {}

    def assign(
        self, rows: list[int], columns: list[int], fits: np.ndarray, stages: int
    ) -> tuple[Assignment, list[str]]:
        """The best pairing by as few kinds of evidence as it needs, and the kind that decided for each row."""
        ours, theirs = [self.ours[r] for r in rows], [self.theirs[c] for c in columns]
        scores = np.where(fits[np.ix_(rows, columns)], 0.0, -np.inf)
        found, why = assign(scores), ["shape"] * len(rows)
        for stage in STAGES[:stages]:
            open_ = found.tied
            if not open_:
                break
            scores = _fixed(scores, found)
            ask = self._ask(
                stage, [ours[r] for r in open_], [theirs[found.columns[r]] for r in open_ if found.columns[r] >= 0]
            )
            for row in open_:
                why[row] = stage
                scores[row] += (1.0 if stage == "names" else _LATER) * np.array([ask(ours[row], t) for t in theirs])
            new = assign(scores)
            margins = [new.margins[row] if row in open_ else margin for row, margin in enumerate(found.margins)]
            found = new._replace(margins=tuple(margins))
        return found, why

    def _ask(self, stage: str, ours: list[Module], theirs: list[Module]) -> Callable[[Module, Module], float]:
        asked = {"names": _names, "numbers": self._numbers, "neighbours": self._neighbours}
        return asked.get(stage) or self._order(ours, theirs)

    def pairs(self, rows: list[int], columns: list[int], found: Assignment, why: list[str]) -> list[Pair]:
        """The pairs that an assignment makes."""
        out = []
        for row, column, margin, stage in zip(rows, found.columns, found.margins, why, strict=True):
            if column < 0:
                continue
            s, t = self.ours[row], self.theirs[columns[column]]
            sure = min(margin, 1.0) if stage != "shape" else (1.0 if _names(s, t) else _ALONE)
            out.append(Pair(s, (t,), stage, round(sure, 2)))
        return out

    def choice(self, rows: list[int], columns: list[int], found: Assignment) -> Choice:
        """The tied part of an assignment."""
        tied = found.tied
        taken = {way[row] for way in (found.ties or (found.columns,)) for row in tied}
        paired = lambda way: tuple(
            Pair(self.ours[rows[row]], (self.theirs[columns[way[row]]],), "outputs", 1.0)
            for row in tied
            if way[row] >= 0
        )
        return Choice(
            tuple(self.ours[rows[row]] for row in tied),
            tuple(self.theirs[columns[column]] for column in sorted(taken) if column >= 0),
            tuple(map(paired, found.ties)),
        )

    def _numbers(self, s: Module, t: Module) -> float:
        (mine, many), (its, much) = self.ranks[id(s)], self.ranks[id(t)]
        same = mine == its if many == much > 1 else s.numbers == t.numbers
        return float(bool(s.numbers and t.numbers) and same)

    def _order(self, ours: list[Module], theirs: list[Module]) -> Callable[[Module, Module], float]:
        mine, its = _sorted(ours, self.ordered), _sorted(theirs, False)
        if mine is None or its is None or len(mine) != len(its):
            return lambda s, t: 0.0
        return lambda s, t: float(mine[id(s)] == its.get(id(t)))

    def _neighbours(self, s: Module, t: Module) -> float:
        """Whether what stands before the source module in the file went to what the target's is named after."""
        before = self.before.get(id(s))
        partner = self.known.get(id(before)) if before is not None else None
        own = partner.terms - WEAK if partner is not None else frozenset()
        return float(bool(own) and own <= t.terms)


def _names(s: Module, t: Module) -> float:
    return similarity(s.terms, t.terms)


def _fixed(scores: np.ndarray, found: Assignment) -> np.ndarray:
    """The scores with nothing left to choose for the rows that do not tie."""
    out = scores.copy()
    for row, column in enumerate(found.columns):
        if row not in found.tied:
            out[row] = -np.inf
            if column >= 0:
                out[:, column] = -np.inf
                out[row, column] = scores[row, column]
    return out


def _settled(found: Assignment) -> tuple[int, ...]:
    """The columns of the rows that are not tied."""
    return tuple(-1 if row in found.tied else column for row, column in enumerate(found.columns))


def _fits(s: Module, t: Module, layout: str) -> bool:
    if s.leaves.keys() != t.leaves.keys():
        return False
    both = ((a, b) for role, row in s.leaves.items() for a, b in zip(row, t.leaves[role], strict=True))
    return all(a is b is None or (a and b and route(a, b, layout) is not None) for a, b in both)


def _cut(sources: Sequence[Module], targets: Sequence[Module], layout: str) -> list[Pair]:
    """The modules of the file that hold several of the target's, such as qkv, as their names say."""
    out: list[Pair] = []
    for s in sources:
        word = next((word for word in FUSED if word in s.terms), None)
        if word is None or any(word in t.terms for t in targets):
            continue
        fitting = []
        for first in targets:
            rest = first.terms - {FUSED[word][0]}
            alike = [[t for t in targets if t.terms == rest | {part}] for part in FUSED[word]]
            group = [found[0] for found in alike if len(found) == 1]
            if FUSED[word][0] in first.terms and len(group) == len(alike) and _fits_cut(s, group, layout):
                fitting.append((similarity(s.terms - {word}, rest), group))
        fitting.sort(key=lambda item: -item[0])
        if fitting and (len(fitting) == 1 or fitting[0][0] > fitting[1][0]):
            margin = fitting[0][0] - fitting[1][0] if len(fitting) > 1 else 1.0
            out.append(Pair(s, tuple(fitting[0][1]), f"names: {word} is {', '.join(FUSED[word])}", round(margin, 2)))
    return out


def _fits_cut(s: Module, group: Sequence[Module], layout: str) -> bool:
    if any(t.leaves.keys() != s.leaves.keys() for t in group):
        return False
    for role, row in s.leaves.items():
        for number, leaf in enumerate(row):
            to = [t.leaves[role][number] for t in group]
            present = [t for t in to if t is not None]
            if leaf is None or len(present) < len(to):
                if leaf is not None or present:
                    return False
            elif parts(leaf, present, layout) is None:
                return False
    return True


def _components(fits: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Rows and columns that fit one another, directly or through others."""
    out, left = [], set(range(fits.shape[0]))
    while left:
        rows, columns, fresh = {min(left)}, set[int](), True
        while fresh:
            columns = {int(c) for r in rows for c in np.flatnonzero(fits[r])}
            more = {int(r) for c in columns for r in np.flatnonzero(fits[:, c])} | rows
            fresh, rows = more != rows, more
        left -= rows
        if columns:
            out.append((sorted(rows), sorted(columns)))
    return out


def _ranks(modules: Sequence[Module]) -> dict[int, tuple[int, int]]:
    """The place of each module among those whose names differ in numbers only, and how many these are."""
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.template, []).append(module)
    out = {}
    for group in groups.values():
        for rank, module in enumerate(sorted(group, key=lambda m: m.numbers)):
            out[id(module)] = (rank, len(group))
    return out


def _sorted(modules: Sequence[Module], ordered: bool) -> dict[int, int] | None:
    """The order of modules, where their numbers, the field's usual order or the file says one."""
    one_template = len({m.template for m in modules}) == 1
    keys: list[Callable[[Module], Any]] = [usual, lambda m: m.place]
    keys = ([lambda m: m.numbers] if one_template else []) + keys[: 2 if ordered else 1]
    for key in keys:
        values = [key(m) for m in modules]
        if all(v != () for v in values) and len(set(values)) == len(values):
            return {id(m): n for n, m in enumerate(sorted(modules, key=key))}
    return None


def usual(module: Module) -> tuple[int, ...]:
    """Where the field's usual order puts a module."""
    return usual_place(module.terms)
