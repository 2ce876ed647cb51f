"""What align has to settle: both sides without what given rules, and being a counter, settle beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transferjax._errors import PlanError, listing
from transferjax.surgery._align_blocks import Module, families
from transferjax.surgery._align_layout import SAME, Leaf, route
from transferjax.surgery._align_match import Link, Pair
from transferjax.surgery._align_names import BUFFERS, WEIGHT
from transferjax.surgery._align_scan import Scan, lifted, unroll, unrolled
from transferjax.surgery._checks import led, listed
from transferjax.surgery._ops import Op, Spec, infer, spec_of
from transferjax.surgery._rules import Fresh, Lead, Naming, Rule, Transform, Waive
from transferjax.surgery._structure import Tie
from transferjax.surgery._trees import leaves


class Task(NamedTuple):
    """Both sides whole, and what is left of them to pair.

    Attributes:
      source: leaves of the file that need a target.
      target: leaves of the target that need a source.
      sources: every leaf of the file.
      targets: every leaf of the target.
      rules: given ones.
      given: what they lead to each target, as leaves.
      buffers: leaves of the file that are no weights, with the reason.
      order: the place of each leaf in the file.
      kept: leaves of the target that given rules keep as they are.
      scan: layers that stand in ``source`` or ``target`` for the leaves that hold them.
    """

    source: dict[str, Spec]
    target: dict[str, Spec]
    sources: dict[str, Spec]
    targets: dict[str, Spec]
    rules: tuple[Rule, ...]
    given: tuple[tuple[Leaf, Leaf, Lead], ...]
    buffers: dict[str, str]
    order: dict[str, int]
    kept: frozenset[str]
    scan: Scan = Scan({}, False)

    def unrolled(self) -> list[Task]:
        """The same with scanned leaves of the target, or of the file, read as layers, where the other side has some."""
        out = []
        for of_source in (False, True):
            side, other = (self.source, self.target) if of_source else (self.target, self.source)
            parts = unroll(side, {len(family.blocks) for family in families(other).values()})
            if parts and of_source:
                order = self.order | {name: self.order[part.whole.name] for name, part in parts.items()}
                out.append(self._replace(source=unrolled(side, parts), order=order, scan=Scan(parts, True)))
            elif parts:
                out.append(self._replace(target=unrolled(side, parts), scan=Scan(parts, False)))
        return out

    def links(self, layout: str) -> list[Link]:
        """The given pairs with their operations under a layout."""
        changed = lambda leaf: any(isinstance(r, Transform) and r.selector(leaf.name, leaf.spec) for r in self.rules)
        return [_link(came, to, lead, layout) for came, to, lead in self.given if not changed(to)]


def task(source_shapes: Any, target: Any, rules: Sequence[Rule]) -> Task:
    """The task of two sides and given rules.

    Raises:
      PlanError: a rule is none, does not fit the leaf it matches, or changes leaves that are still to be paired.
    """
    sources = {name: spec_of(leaf, name, "source") for name, leaf in leaves(source_shapes).items()}
    targets = {path: spec_of(leaf, path, "target") for path, leaf in leaves(target).items()}
    flat = isinstance(source_shapes, Mapping) and set(source_shapes) == set(sources)
    order = {name: place for place, name in enumerate(source_shapes if flat else sources)}
    rules = listed(rules, "align()")
    for noun, side in (("source_shapes", sources), ("target", targets)):
        if not side:
            raise PlanError(f"align() found no leaf in {noun}. Pass Checkpoint.shapes as source, and a Model or tree.")
    waives = [rule for rule in rules if isinstance(rule, Waive)]
    keeps, ties = [rule for rule in rules if isinstance(rule, Fresh)], [rule for rule in rules if isinstance(rule, Tie)]
    waived = {name for name, spec in sources.items() if any(rule.selector(name, spec) for rule in waives)}
    leads = {name: _leads(rules, name, spec) for name, spec in sources.items() if name not in waived}
    kept = frozenset(path for path, spec in targets.items() if any(rule.selector(path, spec) for rule in keeps))
    tied = {path for path in targets if any(rule(path) is not None for rule in ties)}
    left = {path: spec for path, spec in targets.items() if path not in kept and path not in tied}
    settled = waived | kept  # a leaf of a fresh leaf's name is left behind with it
    source = {name: spec for name, spec in sources.items() if name not in settled and leads[name] is None}
    given = _given(leads, sources, left)
    left = {path: spec for path, spec in left.items() if all(path != to.name for _, to, _ in given)}
    _check(rules, left)
    buffers = {name: why for name, spec in source.items() if (why := _buffer(name, spec, left.values()))}
    source = {name: spec for name, spec in source.items() if name not in buffers}
    return Task(source, left, sources, targets, tuple(rules), tuple(given), buffers, order, kept)


def _check(rules: Sequence[Rule], left: Mapping[str, Spec]) -> None:
    for rule in rules:
        paths = [path for path, spec in left.items() if isinstance(rule, Transform) and rule.selector(path, spec)]
        if paths:
            raise PlanError(
                f"{rule!r} was given to align(), which pairs {listing([repr(path) for path in paths], 3)} itself and "
                "finds how to turn, reshape and cast what it pairs. Leave the rule out, make its selector narrower, or "
                "give the rename of these leaves too."
            )


def _leads(rules: Sequence[Rule], name: str, spec: Spec) -> tuple[Lead, ...] | None:
    """Where given rules lead a leaf, nowhere for a layer that ``select`` leaves behind; ``None``: they do not say."""
    naming = sorted((rule for rule in rules if isinstance(rule, Naming)), key=lambda rule: rule.otherwise)
    return next((found for rule in naming if (found := led(rule, name, spec)) is not None), None)


def _given(
    leads: Mapping[str, tuple[Lead, ...] | None], sources: Mapping[str, Spec], targets: Mapping[str, Spec]
) -> list[tuple[Leaf, Leaf, Lead]]:
    arrivals: dict[str, list[tuple[Lead, str]]] = {}
    for name, found in leads.items():
        for lead in found or ():
            arrivals.setdefault(lead.target, []).append((lead, name))
    out = []
    for path, found in arrivals.items():
        lead, name = min(found, key=lambda item: item[0].order)
        if path in targets:
            ops = tuple(op for op in (lead.cut, lead.join) if op is not None)
            came = infer(ops, [sources[other] for _, other in found]) if ops else sources[name]
            out.append((Leaf(name, came), Leaf(path, targets[path]), lead))
    return out


def _link(came: Leaf, to: Leaf, lead: Lead, layout: str) -> Link:
    layers = came.spec.shape[0] if lead.join == ("stack", 0) else 0
    one = lambda leaf: leaf._replace(spec=leaf.spec._replace(shape=leaf.spec.shape[1:])) if layers else leaf
    ways = (route(one(came), one(to), name) for name in (layout, SAME))
    ops: tuple[Op, ...] = next((way for way in ways if way is not None), ())
    pair = Pair(Module(came.name, frozenset(), (), {WEIGHT: (came,)}, 0), (), "given", 1.0)
    return Link(came, (to,), None, (lifted(ops, layers) if layers else ops,), pair)


def _buffer(name: str, spec: Spec, targets: Iterable[Spec]) -> str:
    """Why a leaf of the file is no weight; empty when it may be one."""
    whole = spec.dtype.startswith(("int", "uint", "bool"))
    if BUFFERS.fullmatch(name) or (whole and all(target.dtype != spec.dtype for target in targets)):
        return f"counter or buffer ({spec.dtype})"
    return ""
