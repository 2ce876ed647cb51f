"""Scanned layers: leaves with a leading axis of layers, read as one leaf of each layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from transferjax._errors import PlanError, listing
from transferjax.surgery._align_layout import Leaf
from transferjax.surgery._align_match import Link
from transferjax.surgery._align_patterns import Pattern, merged, patterns
from transferjax.surgery._ops import Op, Spec
from transferjax.surgery._rules import Naming
from transferjax.surgery._structure import stack, unstack

_SEPARATOR, _NUMBER = re.compile(r"[./]"), re.compile(r"\d+")
_MARK = "\n"  # between the number of a layer and the path of its leaf


class Part(NamedTuple):
    """One layer of a leaf: the leaf, and the number of the layer along its first axis."""

    whole: Leaf
    layer: int


class Scan(NamedTuple):
    """Layers by the names that they are given, as if their leaves were not scanned; of the source or of the target."""

    parts: Mapping[str, Part]
    of_source: bool

    def part(self, link: Link) -> Part | None:
        """The layer that a link is from or to."""
        return self.parts.get(link.source.name if self.of_source else link.targets[0].name)


def unroll(side: Mapping[str, Spec], counts: Collection[int]) -> dict[str, Part]:
    """The layers of every part of a tree whose leaves all have one of ``counts`` as their first size.

    >>> leaf = Spec((2, 8), "float32")
    >>> list(unroll({"layers/mlp/bias": leaf, "layers/norm/scale": leaf, "norm/scale": Spec((8,), "float32")}, {2}))
    ['layers/0/mlp/bias', 'layers/1/mlp/bias', 'layers/0/norm/scale', 'layers/1/norm/scale']
    """
    firsts: dict[str, list[int]] = {}
    for name, spec in side.items():
        for found in _SEPARATOR.finditer(name):
            firsts.setdefault(name[: found.start()], []).append(spec.shape[0] if spec.shape else 0)
    scanned = {p for p, sizes in firsts.items() if len(sizes) > 1 and len({*sizes}) == 1 and sizes[0] in counts}
    out = {}
    for name, spec in side.items():
        ends = [found.start() for found in _SEPARATOR.finditer(name) if name[: found.start()] in scanned]
        for layer in range(spec.shape[0] if ends else 0):
            end = ends[0]
            out[f"{name[:end]}{name[end]}{layer}{name[end:]}"] = Part(Leaf(name, spec), layer)
    return out


def unrolled(side: Mapping[str, Spec], parts: Mapping[str, Part]) -> dict[str, Spec]:
    """The side with layers in the place of the leaves that hold them."""
    whole = {part.whole.name for part in parts.values()}
    layers = {name: part.whole.spec._replace(shape=part.whole.spec.shape[1:]) for name, part in parts.items()}
    return {name: spec for name, spec in side.items() if name not in whole} | layers


def lifted(ops: Sequence[Op], layers: int) -> tuple[Op, ...]:
    """Operations on one layer, as those on all of them at once.

    >>> lifted([("permute", (1, 0)), ("reshape", (8, 2, 4))], 6)
    (('permute', (0, 2, 1)), ('reshape', (6, 8, 2, 4)))
    """
    all_axes = lambda axes: (0, *(axis + 1 for axis in axes))
    return tuple((op[0], all_axes(op[1]) if op[0] == "permute" else (layers, *op[1])) for op in ops)


def rejoined(links: Sequence[Link], scan: Scan) -> list[Link]:
    """One link for each target leaf as it is, with its operations."""
    if scan.of_source:
        return list(links)
    out: dict[str, Link] = {}
    for link in links:
        part = scan.part(link)
        whole = part.whole if part else link.targets[0]
        ops = (lifted(link.ops[0], whole.spec.shape[0]),) if part else link.ops
        out.setdefault(whole.name, link._replace(targets=(whole, *link.targets[1:]), ops=ops))
    return list(out.values())


class Joining(NamedTuple):
    """A rule that stacks or unstacks, and the links it is for."""

    rule: Naming
    links: tuple[Link, ...]


def joinings(links: Sequence[Link], scan: Scan, known: Collection[str]) -> list[Joining]:
    """The ``stack`` rules of links to layers, or the ``unstack`` rules of links from layers.

    Raises:
      PlanError: a rule would have to cut and stack at once, or the layers are not numbered one by one.
    """
    groups: dict[str, dict[int, Link]] = {}
    for link in links:
        part = scan.part(link)
        if part is not None:
            groups.setdefault(part.whole.name, {})[part.layer] = link
    every = [[group[layer] for layer in sorted(group)] for group in groups.values()]
    places = [_place(group, scan) for group in every]
    return _unstacks(every, places, scan, known) if scan.of_source else _stacks(every, places, scan, known)


def _stacks(
    groups: Sequence[Sequence[Link]], places: Sequence[int], scan: Scan, known: Collection[str]
) -> list[Joining]:
    by_name = {link.source.name: link for group in groups for link in group}
    made: list[Pattern] = []
    for group, place in zip(groups, places, strict=True):
        # The number of the layer stands before the target's path, so that the pattern keeps it as a group.
        path = _whole(group, scan)
        made += patterns({k.source.name: f"{_NUMBER.findall(k.source.name)[place]}{_MARK}{path}" for k in group}, known)
    out = []
    for pattern in merged(made):
        layer = pattern.target[0]
        assert isinstance(layer, int)
        text, new = pattern.written(layer)
        out.append(Joining(stack(text, new.split(_MARK)[1]), tuple(by_name[name] for name in pattern.names)))
    return out


def _unstacks(
    groups: Sequence[Sequence[Link]], places: Sequence[int], scan: Scan, known: Collection[str]
) -> list[Joining]:
    pairs: dict[str, str] = {}
    for group, place in zip(groups, places, strict=True):
        path = group[0].targets[0].name
        number = list(_NUMBER.finditer(path))[place]
        pairs[_whole(group, scan)] = f"{path[: number.start()]}{{i}}{path[number.end() :]}"
    by_name = {_whole(group, scan): tuple(group) for group in groups}
    return [
        Joining(unstack(*pattern.written()), tuple(link for name in pattern.names for link in by_name[name]))
        for pattern in patterns(pairs, known)
    ]


def _whole(group: Sequence[Link], scan: Scan) -> str:
    part = scan.part(group[0])
    assert part is not None
    return part.whole.name


def _place(group: Sequence[Link], scan: Scan) -> int:
    """Which of the numbers in the names of unrolled leaves is that of the layer."""
    names = [link.targets[0].name if scan.of_source else link.source.name for link in group]
    rows = [tuple(map(int, _NUMBER.findall(name))) for name in names]
    varies = [place for place, column in enumerate(zip(*rows, strict=False)) if len({*column}) > 1]
    column = [row[varies[0]] for row in rows] if len(varies) == 1 else []
    first = 0 if scan.of_source or not column else column[0]
    cut = any(link.cut for link in group)
    if cut or column != list(range(first, first + len(group))):
        why = "each would be cut as well" if cut else "they are not numbered one by one"
        raise PlanError(
            f"align() pairs the layers of the scanned '{_whole(group, scan)}' with "
            f"{listing([repr(name) for name in names], 3)}, but no rule can say so: {why}. "
            "Align with a tree whose layers are not scanned, and join them by a second plan."
        )
    return varies[0]
