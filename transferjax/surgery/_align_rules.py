"""Ordinary rules from pairs of leaves, each with its evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from transferjax.surgery._align_layout import AXES, SAME, TORCH, is_kernel, route
from transferjax.surgery._align_match import Link
from transferjax.surgery._align_patterns import cover, patterns
from transferjax.surgery._align_scan import Scan, joinings, rejoined
from transferjax.surgery._ops import Spec
from transferjax.surgery._rules import Rule, cast, fresh, permute, rename, reshape, torch_layout, waive
from transferjax.surgery._structure import split
from transferjax.tree import Selector

_JOINT = "\n"  # between the target paths of one source that is cut


class Told(NamedTuple):
    """A rule with the number of leaves that it is for, what speaks for it, and how much."""

    rule: Rule
    leaves: int
    evidence: str
    confidence: float


class Layout(NamedTuple):
    """The layout of the kernels, how many fit in no other, and how many would."""

    name: str
    forced: int
    square: int

    def __str__(self) -> str:
        turn = "(out, in) as in torch" if self.name == TORCH else "axes as in the target"
        found = f"{self.forced:,} kernels fit in no other layout" if self.forced else "as given or found by outputs"
        follow = f"; {self.square:,} square kernels follow them" if self.square and self.forced else ""
        return f"{turn}: {found}{follow}" if self.forced or self.square else "no kernel depends on it"


def layout_of(links: Iterable[Link], name: str) -> Layout:
    """How many kernels speak for a layout, and how many could be of either."""
    other, forced, square = SAME if name == TORCH else TORCH, 0, 0
    for link in links:
        if link.cut or not is_kernel(link.source, link.targets[0]):
            continue
        rival = route(link.source, link.targets[0], other)
        forced += rival is None
        square += rival is not None and rival != link.ops[0]
    return Layout(name, forced, square)


def rules_of(
    links: Sequence[Link],
    given: Sequence[Link],
    known: Collection[str],
    targets: Mapping[str, Spec],
    waived: Mapping[str, str],
    kept: Mapping[str, str],
    layout: Layout,
    scan: Scan,
    free: Collection[str] = (),
    heads: Sequence[Link] = (),
) -> list[Told]:
    """Every rule that a plan of these links needs.

    Args:
      links: pairs of leaves.
      given: those that have a rename rule already.
      known: every source name that a pattern may meet.
      targets: every leaf to fill.
      waived: source names to leave behind, with the reason.
      kept: target paths that stay as they are, with the reason.
      layout: of the kernels.
      scan: the layers among the sources or targets of ``links``.
      free: further target paths that stay as they are.
      heads: last layers of other sizes, among ``kept``: renamed, so that the way back knows their names.

    Returns:
      The rules in the order in which they are written.
    """
    whole = [*rejoined(links, scan), *given, *heads]
    return [
        *naming(links, known, scan),
        *_renames(heads, known),
        *_transforms(whole, targets, {*kept, *free}, layout),
        *_casts(whole, targets, {*kept, *free}),
        *_told(waive, waived, known),
        *_told(fresh, kept, targets),
    ]


def naming(links: Sequence[Link], known: Collection[str], scan: Scan) -> list[Told]:
    """The rules that say where leaves go."""
    plain = [link for link in links if scan.part(link) is None]
    return [
        *_renames([link for link in plain if len(link.targets) == 1], known),
        *_splits([link for link in plain if len(link.targets) > 1], known),
        *(Told(one.rule, len(one.links), *_evidence(one.links)) for one in joinings(links, scan, known)),
    ]


def _renames(links: Sequence[Link], known: Iterable[str]) -> list[Told]:
    pairs = {link.source.name: link.targets[0].name for link in links if link.source.name != link.targets[0].name}
    by_name = {link.source.name: link for link in links}
    out = []
    for pattern in patterns(pairs, known):
        evidence, confidence = _evidence([by_name[name] for name in pattern.names])
        out.append(Told(rename(*pattern.written()), len(pattern.names), evidence, confidence))
    return out


def _splits(links: Sequence[Link], known: Iterable[str]) -> list[Told]:
    groups: dict[tuple[int, tuple[int, ...] | None], dict[str, Link]] = {}
    for link in links:
        assert link.cut is not None
        axis, sizes = link.cut
        groups.setdefault((axis, sizes if len(set(sizes)) > 1 else None), {})[link.source.name] = link
    out = []
    for (axis, sizes), group in groups.items():
        pairs = {name: _JOINT.join(leaf.name for leaf in link.targets) for name, link in group.items()}
        for pattern in patterns(pairs, known):
            text, new = pattern.written()
            evidence, confidence = _evidence([group[name] for name in pattern.names])
            rule = split(text, tuple(new.split(_JOINT)), axis=axis, sizes=sizes)
            out.append(Told(rule, len(pattern.names), evidence, confidence))
    return out


def _transforms(
    links: Sequence[Link], targets: Mapping[str, Spec], kept: Collection[str], layout: Layout
) -> list[Told]:
    turned: list[str] = []
    permuted: dict[tuple[int, ...], list[str]] = {}
    shapes: dict[tuple[int, ...], list[str]] = {}
    for link in links:
        for leaf, ops in zip(link.targets, link.ops, strict=True):
            for name, argument in ops:
                if name == "reshape":
                    shapes.setdefault(argument, []).append(leaf.name)
                elif argument == AXES.get(len(argument)):
                    turned.append(leaf.name)
                else:  # of all layers at once
                    permuted.setdefault(argument, []).append(leaf.name)
    made: list[tuple[Callable[[Selector], Rule], list[str], str]] = [(torch_layout, turned, str(layout))]
    made += [(lambda one, axes=axes: permute(one, axes), names, str(layout)) for axes, names in permuted.items()]
    made += [(lambda one, shape=shape: reshape(one, shape), names, "shape") for shape, names in shapes.items()]
    return [
        Told(make(selector), sum(map(selector, names)), why, 1.0)
        for make, names, why in made
        for selector in cover(names, targets, kept)
    ]


def _casts(links: Sequence[Link], targets: Mapping[str, Spec], kept: Collection[str]) -> list[Told]:
    changed: dict[str, list[str]] = {}
    same = {leaf.name for link in links for leaf in link.targets}
    for link in links:
        for leaf in link.targets:
            if leaf.spec.dtype != link.source.spec.dtype:
                changed.setdefault(leaf.spec.dtype, []).append(leaf.name)
    out = []
    for dtype, names in changed.items():
        # A leaf that has the dtype already is left as it is, so that the rule may select it.
        free = {name for name in same if targets[name].dtype == dtype} | {*kept}
        selectors = ["**"] if free >= targets.keys() else cover(names, targets, free)
        out += [Told(cast(selector, dtype), len(names), "dtype", 1.0) for selector in selectors]
    return out


def _told(make, reasons: Mapping[str, str], everything: Iterable[str]) -> list[Told]:
    out = []
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, why in reasons.items() if why == reason]
        for selector in cover(names, everything):
            out.append(Told(make(selector), sum(map(selector, names)), reason, 1.0))
    return out


def _evidence(links: Sequence[Link]) -> tuple[str, float]:
    counts = Counter(link.pair.evidence for link in links)
    text = counts.most_common(1)[0][0] if len(counts) == 1 else ", ".join(f"{k} ({n})" for k, n in counts.most_common())
    return text, min(link.pair.confidence for link in links)
