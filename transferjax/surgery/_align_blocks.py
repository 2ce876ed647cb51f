"""Repeated blocks of both sides, in order, and the modules in them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from transferjax.surgery._align_assign import assign
from transferjax.surgery._align_layout import Leaf
from transferjax.surgery._align_names import Name, natural_key, read, similarity, words
from transferjax.surgery._ops import Spec

_NUMBER = re.compile(r"\d+")

Leaves = Mapping[str, Spec]
Block = dict[str, Leaf]
"""The leaves of one block, by the rest of their names."""


class Family(NamedTuple):
    """Blocks whose names differ in numbers only, such as ``layer#.#``, by these numbers in their order."""

    template: str
    blocks: tuple[Block, ...]

    def sizes(self) -> tuple[int, ...]:
        """The number of elements of each block."""
        return tuple(sum(math.prod(leaf.spec.shape) for leaf in block.values()) for block in self.blocks)


class Module(NamedTuple):
    """What holds a weight, a bias, statistics: by role, its leaf in each block (``None`` where a block has none)."""

    text: str
    terms: frozenset[str]
    numbers: tuple[int, ...]
    leaves: dict[str, tuple[Leaf | None, ...]]
    place: int

    @property
    def template(self) -> str:
        """The text with its numbers left open."""
        return _NUMBER.sub("#", self.text)

    def all(self) -> list[Leaf]:
        """Every leaf, of all roles and blocks."""
        return [leaf for row in self.leaves.values() for leaf in row if leaf is not None]


class Pool(NamedTuple):
    """Blocks of both sides, paired in order; the trunk, what belongs to no block, is a pool of one pair."""

    title: str
    source: tuple[Block, ...]
    target: tuple[Block, ...]


def pools(source: Leaves, target: Leaves) -> tuple[list[Pool], list[str]]:
    """The paired families of blocks, those of most blocks first, and at last the trunk.

    Blocks of equal numbers of elements are paired in their order. Where the source has more blocks than the target
    (a stem is often numbered with the blocks), sizes must leave one way only; what they leave over goes to the trunk.

    Returns:
      The pools, and what was found to be open, in words.
    """
    left, needed = dict(source), dict(target)
    found: list[Pool] = []
    notes: list[str] = []
    while True:
        new, notes = _round(left, needed)
        if not new:
            break
        for pool in new:
            for side, blocks in ((left, pool.source), (needed, pool.target)):
                for leaf in (leaf for block in blocks for leaf in block.values()):
                    side.pop(leaf.name, None)
        found += new
    trunk = lambda side: ({name: Leaf(name, spec) for name, spec in side.items()},)
    return [*found, Pool("", trunk(left), trunk(needed))], notes


def modules(blocks: Sequence[Block], places: Mapping[str, int]) -> list[Module]:
    """The modules of blocks that are of one family, in natural order."""
    table: dict[str, dict[str, list[Leaf | None]]] = {}
    for number, block in enumerate(blocks):
        taken: set[tuple[str, str]] = set()
        for rest, leaf in block.items():
            name = read(rest)
            if (name.module, name.role) in taken:  # a second weight of a module is one of its own
                name = Name(rest.strip("./_"), name.role, name.said)
            taken.add((name.module, name.role))
            row = table.setdefault(name.module, {}).setdefault(name.role, [None] * len(blocks))
            row[number] = leaf
    out = []
    for text, roles in table.items():
        leaves = {role: tuple(row) for role, row in roles.items()}
        names = [leaf.name for row in leaves.values() for leaf in row if leaf is not None]
        place = min((places[name] for name in names if name in places), default=-1)
        out.append(Module(text, *words(text), leaves, place))
    common = frozenset.intersection(*(m.terms for m in out)) if len(out) > 1 else frozenset()
    return [module._replace(terms=module.terms - common) for module in out]


def families(side: Leaves) -> dict[str, Family]:
    """Every family of two blocks or more, at every depth of names.

    >>> leaf = Spec((2,), "float32")
    >>> names = ("layer1.0.bn1.bias", "layer1.1.bn1.bias", "layer2.0.bn1.bias", "bn1.bias")
    >>> {template: len(family.blocks) for template, family in families(dict.fromkeys(names, leaf)).items()}
    {'layer#': 2, 'layer#.#': 3}
    """
    table: dict[str, dict[tuple[int, ...], Block]] = {}
    holds: set[str] = set()
    for name, spec in side.items():
        for number in _NUMBER.finditer(name):
            prefix, rest = name[: number.end()], name[number.end() :]
            template = _NUMBER.sub("#", prefix)
            key = natural_key(_NUMBER.findall(prefix))
            table.setdefault(template, {}).setdefault(key, {})[rest] = Leaf(name, spec)
            if re.split(r"[./]", rest)[:-1] not in ([], [""]):  # a number just before a leaf is no block's
                holds.add(template)
    return {
        template: Family(template, tuple(blocks[key] for key in sorted(blocks)))
        for template, blocks in table.items()
        if template in holds and len(blocks) > 1
    }


def _round(source: Leaves, target: Leaves) -> tuple[list[Pool], list[str]]:
    """The pools of the target families with most blocks that any source family fits."""
    ours, theirs = families(source), families(target)
    notes: list[str] = []
    for count in sorted({len(family.blocks) for family in theirs.values()}, reverse=True):
        here = [family for family in theirs.values() if len(family.blocks) == count]
        ways = {(a, b.template): _embedded(ours[a], b, notes) for a in ours for b in here}
        scores = np.array([[_score(ours[a], b, ways[a, b.template]) for b in here] for a in ours])
        if not scores.size or not np.isfinite(scores).any():
            continue
        found = assign(scores)
        out = []
        for row, a in enumerate(ours):
            column = found.columns[row]
            if column < 0:
                continue
            if row in found.tied:
                notes.append(
                    _open(a, here[column].template, [o for o, s in zip(ours, scores[:, column]) if s > -np.inf])
                )
                continue
            way = ways[a, here[column].template]
            assert way is not None
            title = f"{a} -> {here[column].template}"
            out.append(Pool(title, tuple(ours[a].blocks[i] for i in way), here[column].blocks))
        if out:
            return _disjoint(out), notes
    return [], notes


def _disjoint(found: Iterable[Pool]) -> list[Pool]:
    """Those pools that share no leaf with one before them; the next round looks at the others again."""
    out: list[Pool] = []
    seen: set[str] = set()
    for pool in found:
        names = {leaf.name for block in pool.source for leaf in block.values()}
        paths = {f"target {leaf.name}" for block in pool.target for leaf in block.values()}
        if not (names | paths) & seen:
            out.append(pool)
            seen |= names | paths
    return out


def _score(ours: Family, theirs: Family, way: Sequence[int] | None) -> float:
    if way is None:
        return -np.inf
    same = 1.0 if len(ours.blocks) == len(theirs.blocks) else 0.0
    return same + similarity(words(ours.template)[0], words(theirs.template)[0])


def _embedded(ours: Family, theirs: Family, notes: list[str]) -> tuple[int, ...] | None:
    """Which block of ours each of theirs is, by number of elements and in order; ``None``: none, or several ways."""
    sizes, wanted = ours.sizes(), theirs.sizes()
    first = _greedy(sizes, wanted)
    last = _greedy(sizes[::-1], wanted[::-1])
    if first is None or last is None:
        return None
    if first != tuple(len(sizes) - 1 - i for i in reversed(last)):
        notes.append(
            f"the source has {len(sizes)} blocks '{ours.template}' and the target {len(wanted)} blocks "
            f"'{theirs.template}' of the same sizes, so that several choices of blocks fit. "
            f"{_choose(ours.template, theirs.template, len(sizes), len(wanted))}"
        )
        return None
    return first


def _choose(ours: str, theirs: str, count: int, wanted: int) -> str:
    """What to write to use some of a file's blocks only: every second of twelve for six, say."""
    chosen = [number * count // wanted for number in range(wanted)]
    before, *after = map(re.escape, ours.split("#"))
    if len(after) != 1:
        return "Write waive(...) of those to leave behind"
    if ours == theirs:
        return f"Write, for example, select(r'{before}(?P<i>\\d+){after[0]}\\D.*', {chosen})"
    left = "|".join(str(number) for number in range(count) if number not in chosen)
    return (
        f"Write which to leave behind, for example waive(regex(r'{before}({left}){after[0]}\\D.*')); where the names "
        "are those of the target, select(...) says it shorter"
    )


def _greedy(sizes: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...] | None:
    out, at = [], 0
    for size in wanted:
        while at < len(sizes) and sizes[at] != size:
            at += 1
        if at == len(sizes):
            return None
        out.append(at)
        at += 1
    return tuple(out)


def _open(ours: str, theirs: str, rivals: Sequence[str]) -> str:
    return f"the target's blocks '{theirs}' fit the source's {' and '.join(map(repr, rivals or [ours]))} alike"
