"""What can be wrong with a plan, said so that the next line to write is clear."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from transferjax._errors import PlanError, listing, nearest_hint
from transferjax.surgery._align_names import read
from transferjax.surgery._ops import Op, Spec, castable, show
from transferjax.surgery._patterns import raw
from transferjax.surgery._rules import TORCH_LAYOUT, Rule, Transform

LIMIT = 8  # problems told in full, per kind
FOREIGN = 3  # problems told of a source of another convention
REST = {
    "idle": "more rules that do nothing",
    "overlap": "more source names that two rules match",
    "two sources": "more target leaves with two sources",
    "tie": "more tied leaves that cannot be",
    "operation": "more operations that do not fit",
    "shape": "more target leaves of another shape",
    "dtype": "more target leaves of another dtype",
    "missing": "more target leaves without a source",
    "surplus": "more source leaves that nothing uses",
}

ALIGN = (
    "many leaves have no partner: surgery.align(source_shapes, target) proposes the rules that names and shapes tell."
)


class Problems:
    """Problems by kind; told all at once, the first of each kind in full."""

    def __init__(self):
        self._told: dict[str, list[Callable[[], str] | str]] = {kind: [] for kind in REST}
        self._names: dict[str, list[str]] = {kind: [] for kind in REST}
        self._first: list[str] = []

    def begin(self, text: str) -> None:
        """What is told before the list, when there are problems: their likely cause."""
        self._first.append(text)

    def add(self, kind: str, text: Callable[[], str] | str, name: str = "") -> None:
        """Notes a problem; the text may be a function, called only if it is told."""
        self._told[kind].append(text)
        self._names[kind].append(name)

    def raise_all(self) -> None:
        """Raises a PlanError if there is any problem."""
        total = sum(map(len, self._told.values()))
        if not total:
            return
        if self._first:
            raise PlanError("\n".join([*self._first, f"the plan has {total:,} problems:", *self._foreign(total)]))
        lines = []
        for kind, texts in self._told.items():
            lines += [text if isinstance(text, str) else text() for text in texts[:LIMIT]]
            if len(texts) > LIMIT:
                names = [name for name in self._names[kind][LIMIT:] if name]
                lines.append(f"{len(texts) - LIMIT} {REST[kind]}{': ' + listing(names) if names else ''}.")
        if total == 1:
            raise PlanError(lines[0])
        told = [f"the plan has {total:,} problems:", *(f"- {line}" for line in lines)]
        if len(self._told["missing"]) + len(self._told["surplus"]) > LIMIT:
            told.insert(0, ALIGN)
        raise PlanError("\n".join(told))

    def _foreign(self, total: int) -> list[str]:
        """One problem of a kind, leaves without a partner first: all others follow from them."""
        kinds = sorted(self._told, key=lambda kind: kind not in ("missing", "surplus"))
        found = [self._told[kind][0] for kind in kinds if self._told[kind]][:FOREIGN]
        lines = [f"- {text if isinstance(text, str) else text()}" for text in found]
        return [*lines, f"and {total - len(lines):,} more."] if total > len(lines) else lines


class Finder:
    """Nearest leaves by name and by shape up to a permutation; a cheap score first, spelling only for the best."""

    def __init__(self, pool: Mapping[str, Spec]):
        self.pool = dict(pool)
        self._tokens: dict[str, frozenset[str]] | None = None

    def nearest(self, name: str, spec: Spec, count: int = 3) -> list[str]:
        """The ``count`` best names of the pool, best first."""
        if self._tokens is None:
            self._tokens = {one: _tokens(one) for one in self.pool}
        mine, size = _tokens(name), sorted(spec.shape)
        fits = {one: sorted(other.shape) == size for one, other in self.pool.items()}
        words = lambda one: len(mine & self._tokens[one]) / (len(mine | self._tokens[one]) or 1)  # type: ignore[index]
        score = lambda one: words(one) + fits[one] + _role(name, one)
        best = sorted(self.pool, key=lambda one: (-score(one), one))[:24]
        spelled = lambda one: score(one) + SequenceMatcher(None, name, one).ratio()
        return sorted(best, key=lambda one: (-spelled(one), one))[:count]

    def hint(self, name: str, spec: Spec, back: Finder) -> tuple[str, str | None]:
        """`` Nearest: ...`` for a message, and the first candidate if its sizes fit and ``name`` is nearest to it.

        ``back`` finds among the names of the side of ``name``: so each leaf is offered to one other only.
        """
        found = self.nearest(name, spec)
        if not found:
            return "", None
        best = self.pool[found[0]]
        fits = sorted(best.shape) == sorted(spec.shape) and back.nearest(found[0], best, 1) == [name]
        return f" Nearest: {', '.join(f'{one!r} {self.pool[one]}' for one in found)}.", found[0] if fits else None


def idle(rule: Rule, selector: Any, side: Mapping[str, Any], noun: str) -> str:
    """A rule whose selector matches nothing."""
    near = nearest_hint(str(selector).strip("'"), _some(str(selector), side))
    return f"{rule!r} does nothing: it matched none of {len(side):,} {noun} leaves.{near} Correct it or remove it."


def idle_naming(rule: Rule, side: Mapping[str, Any], noun: str = "source") -> str:
    """A rule over names that matches none, or changes none."""
    patterns = getattr(rule, "patterns", None) or (getattr(rule, "pattern", re.compile("")),)
    plain = re.sub(r"\\(.)|\(\\d\+\)", lambda m: m[1] or "0", patterns[0].pattern)
    why = "no name that it alone is for" if getattr(rule, "otherwise", False) else "no name in full"
    near = nearest_hint(plain, _some(plain, side))
    return f"{rule!r} does nothing: it matched {why} of {len(side):,} {noun} leaves.{near} Correct it or remove it."


def foreign(count: int, sources: Sequence[str]) -> str:
    """A source of which no name is matched by any of several rules over names."""
    return (
        "the source does not look like one of the model and naming convention of these rules: none of its "
        f"{len(sources):,} names ({listing([repr(name) for name in sources], 3)}) is matched by any of the {count} "
        "rules over names. Pass another file, the rules of its convention, or those that surgery.align(...) proposes."
    )


def idle_transform(rule: Transform, chosen: Sequence[str]) -> str:
    """A transform that leaves each of its leaves as it is."""
    return f"{rule!r} does nothing: {listing([repr(p) for p in chosen], 3)} come in that form already. Remove it."


def overlap(name: str, rules: Sequence[str]) -> str:
    """Two rules over names that match one name."""
    return (
        f"source '{name}' is matched by {' and by '.join(rules)}. Expected one such rule per name: make one pattern "
        "narrower, or pass otherwise=True to the rename that is for all remaining names."
    )


def two_sources(path: str, both: Iterable[tuple[str, Rule | None]]) -> str:
    """Two source leaves that lead to one target leaf."""
    told = [f"'{name}' (by {rule!r})" if rule else f"'{name}' (its own name)" for name, rule in both]
    return f"target '{path}' has two sources: {' and '.join(told)}. Waive one, or rename it to another path."


def wrong_shape(path: str, expected: Spec, sources: Mapping[str, Spec], came: Spec, ops: Sequence[Op]) -> str:
    """A leaf of another shape than the target's."""
    was = listing([f"'{name}' is {spec}" for name, spec in sources.items()], 3)
    through = f" through {', '.join(map(show, ops))}, which makes {came.shape}" if ops else ""
    return f"target '{path}' expects {expected}; source {was}{through}. {_shape_advice(path, expected, came, ops)}"


def wrong_dtype(path: str, expected: Spec, sources: Sequence[str], came: Spec) -> str:
    """A leaf of another dtype than the target's."""
    write = (
        f"Write cast({_only(path)}, '{expected.dtype}') (cast('**', '{expected.dtype}') for all)."
        if castable(came.dtype, expected.dtype)
        else f"No cast keeps its numbers: give the target leaf the dtype {came.dtype}, or write fresh({_only(path)})."
    )
    return f"target '{path}' expects {expected}; {quoted(sources)} comes as {came}. {write}"


def missing(path: str, spec: Spec, unused: Finder, unfilled: Finder, waived: tuple[str, Rule] | None) -> str:
    """A target leaf without an origin."""
    near, fitting = unused.hint(path, spec, unfilled)
    near = near.replace(" Nearest:", " Nearest unused:") or " Every source leaf is used or waived."
    write = f"rename({raw(re.escape(fitting))}, '{path}') or " if fitting else ""
    if waived:
        near = f" Source '{waived[0]}' would fill it, but is waived by {waived[1]!r}."
    return f"target '{path}' {spec} has no source.{near} Write {write}fresh({_only(path)})."


def surplus(name: str, spec: Spec, path: str, unused: Finder, unfilled: Finder) -> str:
    """A source leaf that nothing uses."""
    near, fitting = unfilled.hint(name, spec, unused)
    near = near.replace(" Nearest:", " Nearest without a source:")
    to = "" if path == name else f", which a rule leads to '{path}',"
    write = f"rename({raw(re.escape(name))}, '{fitting}') or " if fitting else ""
    return f"source '{name}' {spec}{to} has no target.{near} Write {write}waive({_only(name)})."


def quoted(sources: Sequence[str]) -> str:
    """The names of sources as messages print them."""
    return f"source {listing([repr(name) for name in sources], 3)}"


def _only(name: str) -> str:
    """A selector, as it is written, for this name alone."""
    return f"regex({raw(re.escape(name))})" if set(name) & set("*?[{}") else f"'{name}'"


def _shape_advice(path: str, expected: Spec, came: Spec, ops: Sequence[Op]) -> str:
    keep = f"fresh({_only(path)}) to keep the target's own values"
    cut = next((op[1] for op in ops if op[0] in ("slice", "take")), None)
    if cut is not None and len(came.shape) > 1 and math.prod(came.shape) == math.prod(expected.shape):
        first = f"It is cut along axis {cut} of the source: if that is the wrong one, write another axis= in its rule. "
        return first + _shape_advice(path, expected, came, [op for op in ops if op[0] not in ("slice", "take")])
    if sorted(came.shape) == sorted(expected.shape):
        if any(op[0] == "permute" for op in ops):
            return f"The sizes are the same: write other axes in the permute rule of this leaf, or {keep}."
        return f"The sizes are the same: write permute({_only(path)}, {_axes(came.shape, expected.shape)}), or {keep}."
    if math.prod(came.shape) == math.prod(expected.shape):
        return f"The number of elements is the same: write reshape({_only(path)}, {expected.shape}), or {keep}."
    resize = _resize_advice(expected.shape, came.shape)
    return f"Write {f'adapt({_only(path)}, {resize}) to resize it, or ' if resize else ''}{keep}."


def _resize_advice(expected: tuple[int, ...], came: tuple[int, ...]) -> str:
    """How a leaf could be resized, as arguments of ``adapt``; empty where none is likely."""
    rank = len(came)
    axes = [axis for axis in range(rank) if len(expected) == rank and came[axis] != expected[axis]]
    if rank == 4 and axes and axes[-1] < 2 and came[2] == 3:  # a patch of RGB: other convolutions are not resized
        return "'patch_embedding'"
    if rank == 3 and came[0] == 1 and axes == [1]:
        return "'position_embedding'"
    if rank == 4 and axes == [2] and came[2] == 3:
        return "'input_channels'"
    if rank == 2 and axes == [0] and came[0] < expected[0]:
        return "'rows'"
    return ""


def _axes(came: tuple[int, ...], expected: tuple[int, ...]) -> tuple[int, ...]:
    """Axes that make one shape from the other: torch's convolution layout if it fits, else the first that do."""
    torch = TORCH_LAYOUT.get(len(came))
    if torch and tuple(came[a] for a in torch) == expected:
        return torch
    left = list(range(len(came)))
    out = []
    for size in expected:
        axis = next(a for a in left if came[a] == size)
        left.remove(axis)
        out.append(axis)
    return tuple(out)


def _role(a: str, b: str) -> float:
    """Whether two names say that their leaves play one part in their modules (weight, bias), or another."""
    one, two = read(a), read(b)
    return (0.5 if one.role == two.role else -0.5) if one.said and two.said else 0.0


def _tokens(name: str) -> frozenset[str]:
    return frozenset(token for token in re.split(r"[^A-Za-z0-9]+", name.lower()) if token)


def _some(name: str, side: Mapping[str, Any], limit: int = 200) -> list[str]:
    """At most ``limit`` names that share most words with ``name``, so that spelling stays cheap to compare."""
    words = _tokens(name)
    return sorted(side, key=lambda one: (-len(words & _tokens(one)), one))[:limit]
