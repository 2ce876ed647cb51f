"""Rules that change how many leaves there are: one source for many targets, many for one, and ties."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from transferjax._errors import PlanError
from transferjax.surgery._ops import Spec, check_op, check_shape
from transferjax.surgery._patterns import compiled, raw
from transferjax.surgery._rules import Lead, Naming, Rule


@dataclasses.dataclass(frozen=True, repr=False)
class Split(Naming):
    """See :func:`split`."""

    pattern: re.Pattern[str]
    replacements: tuple[str | None, ...]
    axis: int
    sizes: tuple[int, ...] | None

    def __repr__(self) -> str:
        sizes = "" if self.sizes is None else f", sizes={self.sizes}"
        return f"split({raw(self.pattern.pattern)}, {_several(self.replacements)}, axis={self.axis}{sizes})"

    def leads(self, name: str, came: Spec) -> tuple[Lead, ...] | None:
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        sizes, size = self.sizes, _size(self, came, self.axis)
        if sizes is None:
            if size % len(self.replacements):
                raise PlanError(
                    f"{self!r} cannot cut axis {self.axis} of {came} into {len(self.replacements)} equal parts. "
                    "Write sizes=(...)."
                )
            sizes = (size // len(self.replacements),) * len(self.replacements)
        if sum(sizes) != size:
            raise PlanError(f"{self!r} has sizes that sum to {sum(sizes)}; axis {self.axis} of {came} has {size}.")
        stops = [sum(sizes[: n + 1]) for n in range(len(sizes))]
        cuts = [("slice", self.axis, stop - part, stop) for stop, part in zip(stops, sizes, strict=True)]
        return tuple(
            Lead(found.expand(r), cut) for r, cut in zip(self.replacements, cuts, strict=True) if r is not None
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Unstack(Naming):
    """See :func:`unstack`."""

    pattern: re.Pattern[str]
    replacement: str
    axis: int

    def __repr__(self) -> str:
        return f"unstack({raw(self.pattern.pattern)}, {raw(self.replacement)}, axis={self.axis})"

    def leads(self, name: str, came: Spec) -> tuple[Lead, ...] | None:
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        path = found.expand(self.replacement)
        count = _size(self, came, self.axis)
        return tuple(Lead(path.replace("{i}", str(i)), ("take", self.axis, i)) for i in range(count))


@dataclasses.dataclass(frozen=True, repr=False)
class Fuse(Naming):
    """See :func:`fuse`."""

    patterns: tuple[re.Pattern[str], ...]
    replacement: str
    axis: int

    def __repr__(self) -> str:
        patterns = _several([pattern.pattern for pattern in self.patterns])
        return f"fuse({patterns}, {raw(self.replacement)}, axis={self.axis})"

    def leads(self, name: str, came: Spec) -> tuple[Lead, ...] | None:
        found = [(n, m) for n, pattern in enumerate(self.patterns) if (m := pattern.fullmatch(name))]
        if len(found) > 1:
            raise PlanError(f"{self!r} has {len(found)} patterns that match it; expected one. Make them narrower.")
        return tuple(Lead(m.expand(self.replacement), None, ("concat", self.axis), n) for n, m in found) or None

    def check_parts(self, target: str, names: Sequence[str], orders: Sequence[int]) -> None:
        for number, pattern in enumerate(self.patterns):
            here = [name for name, order in zip(names, orders, strict=True) if order == number]
            if len(here) != 1:
                raise PlanError(
                    f"{self!r} found {len(here)} sources for its pattern {raw(pattern.pattern)}; "
                    "expected one per target."
                )


@dataclasses.dataclass(frozen=True, repr=False)
class Stack(Naming):
    """See :func:`stack`."""

    pattern: re.Pattern[str]
    replacement: str
    axis: int

    def __repr__(self) -> str:
        return f"stack({raw(self.pattern.pattern)}, {raw(self.replacement)}, axis={self.axis})"

    def leads(self, name: str, came: Spec) -> tuple[Lead, ...] | None:
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        if not (found["i"] or "").isdecimal():
            raise PlanError(f"{self!r} finds no number in its group i: {found['i']!r}. Write (?P<i>\\d+).")
        return (Lead(found.expand(self.replacement), None, ("stack", self.axis), int(found["i"])),)

    def check_parts(self, target: str, names: Sequence[str], orders: Sequence[int]) -> None:
        if list(orders) != list(range(orders[0], orders[0] + len(orders))):
            raise PlanError(f"{self!r} found the numbers {tuple(orders)}; expected each once, without a gap.")


@dataclasses.dataclass(frozen=True, repr=False)
class Tie(Rule):
    """See :func:`tie`."""

    pattern: re.Pattern[str]
    replacement: str

    def __repr__(self) -> str:
        return f"tie({raw(self.pattern.pattern)}, {raw(self.replacement)})"

    def __call__(self, path: str) -> str | None:
        """The path whose source this one shares, or ``None``."""
        found = self.pattern.fullmatch(path)
        return None if found is None else found.expand(self.replacement)


def split(pattern: str, replacements: Sequence[str | None], *, axis: int, sizes: Sequence[int] | None = None) -> Split:
    r"""One source leaf is cut along an axis into several target leaves.

    Args:
      pattern: a regular expression, matched against the full source name.
      replacements: one target path per part, with ``\1`` or ``\g<name>`` for groups; ``None`` drops a part.
      axis: the axis *of the source*, before any ``permute`` of the targets.
      sizes: of the parts along the axis; default: equal parts.

    Returns:
      A rule for :func:`plan`.

    Raises:
      PlanError: the pattern, a replacement, the axis or the sizes are malformed.

    >>> rule = split(r"(.*)\.qkv\.bias", (r"\1/query/bias", r"\1/key/bias", r"\1/value/bias"), axis=0)
    >>> [lead.target for lead in rule.leads("attn.qkv.bias", Spec((12,), "float32"))]
    ['attn/query/bias', 'attn/key/bias', 'attn/value/bias']
    """
    written = f"split({raw(pattern)}, {_several(replacements)})"
    parts = tuple(replacements) if isinstance(replacements, (list, tuple)) else ()
    if len(parts) < 2 or all(part is None for part in parts):
        raise PlanError(f"{written} expects a tuple of at least two replacements, one of them no None.")
    made = [_template(written, pattern, "" if part is None else part) for part in parts]
    lengths = None if sizes is None else check_shape(sizes)[0]
    if lengths is not None and (len(lengths) != len(parts) or -1 in lengths):
        raise PlanError(f"{written} has the sizes {lengths}; expected one of at least 0 for each replacement.")
    return Split(made[0], parts, _axis(axis), lengths)


def unstack(pattern: str, replacement: str, *, axis: int = 0) -> Unstack:
    r"""One source leaf holds a leaf of each layer along an axis; each layer's part goes to its own target leaf.

    Args:
      pattern: a regular expression, matched against the full source name.
      replacement: the target path, with ``{i}`` for the number of the layer and ``\1`` or ``\g<name>`` for groups.
      axis: the axis of the source that numbers the layers.

    Returns:
      A rule for :func:`plan`.

    Raises:
      PlanError: the pattern or the replacement is malformed.

    >>> rule = unstack(r"layers/(.*)", r"blocks/{i}/\1")
    >>> [lead.target for lead in rule.leads("layers/kernel", Spec((2, 4), "float32"))]
    ['blocks/0/kernel', 'blocks/1/kernel']
    """
    written = f"unstack({raw(pattern)}, {raw(replacement)})"
    made = _template(written, pattern, replacement)
    if "{i}" not in replacement:
        raise PlanError(f"{written} has no {{i}} in its replacement. Write it where the layer's number belongs.")
    return Unstack(made, replacement, _axis(axis))


def fuse(patterns: Sequence[str], replacement: str, *, axis: int) -> Fuse:
    r"""Several source leaves are joined along an axis into one target leaf; the inverse of :func:`split`.

    Args:
      patterns: one regular expression per part, in the order in which they are joined.
      replacement: the target path, the same for all parts of one target, with ``\1`` or ``\g<name>`` for groups.
      axis: the axis *of the sources*, before any ``permute`` of the target.

    Returns:
      A rule for :func:`plan`.

    Raises:
      PlanError: a pattern or the replacement is malformed.

    >>> rule = fuse((r"(.*)\.q\.bias", r"(.*)\.k\.bias"), r"\1/qk/bias", axis=0)
    >>> rule.leads("attn.k.bias", Spec((4,), "float32"))[0].target
    'attn/qk/bias'
    """
    written = f"fuse({_several(patterns)}, {raw(replacement)})"
    if not isinstance(patterns, (list, tuple)) or len(patterns) < 2:
        raise PlanError(f"{written} expects a tuple of at least two patterns.")
    return Fuse(tuple(_template(written, pattern, replacement) for pattern in patterns), replacement, _axis(axis))


def stack(pattern: str, replacement: str, *, axis: int = 0) -> Stack:
    r"""The numbered source leaves become one target leaf with a new axis; the inverse of :func:`unstack`.

    One rule over names acts on a leaf, so a fused leaf of each layer (qkv) is not split and stacked in one plan. Make
    two: first ``split`` into unrolled layers, ``plan(source, halfway, split(...))`` with ``halfway`` the
    ``jax.ShapeDtypeStruct`` of the parts by name; then ``stack`` what ``apply`` gave, ``plan(halfway, target,
    stack(...))``.

    Args:
      pattern: a regular expression with the group ``(?P<i>\d+)`` for the number of the layer.
      replacement: the target path, the same for all layers, with ``\1`` or ``\g<name>`` for other groups.
      axis: where the new axis lies, before any ``permute`` of the target.

    Returns:
      A rule for :func:`plan`.

    Raises:
      PlanError: the pattern or the replacement is malformed, or there is no group ``i``.

    >>> rule = stack(r"blocks\.(?P<i>\d+)\.(.*)", r"layers/\2")
    >>> rule.leads("blocks.3.bias", Spec((4,), "float32"))[0].target
    'layers/bias'
    """
    written = f"stack({raw(pattern)}, {raw(replacement)})"
    made = _template(written, pattern, replacement)
    if "i" not in made.groupindex:
        raise PlanError(f"{written} has no group i in its pattern. Write (?P<i>\\d+) where the layer's number stands.")
    return Stack(made, replacement, _axis(axis))


def tie(pattern: str, replacement: str) -> Tie:
    r"""Target leaves that are filled from the source of another target leaf, as an output layer from the embedding.

    ``permute``, ``reshape`` and ``cast`` apply to each of the two by its own path.

    Args:
      pattern: a regular expression, matched against the full *target* path of the leaf without a source of its own.
      replacement: the target path whose source it shares, with ``\1`` or ``\g<name>`` for groups.

    Returns:
      A rule for :func:`plan`.

    Raises:
      PlanError: the pattern or the replacement is malformed.

    >>> tie("head/kernel", "embed/embedding")("head/kernel")
    'embed/embedding'
    """
    return Tie(_template(f"tie({raw(pattern)}, {raw(replacement)})", pattern, replacement), replacement)


def _template(written: str, pattern: str, replacement: str) -> re.Pattern[str]:
    if not isinstance(replacement, str):
        raise PlanError(f"{written} expects a str as replacement, got {type(replacement).__name__}.")
    return compiled(written, pattern, replacement)


def _axis(axis: int) -> int:
    return check_op(("concat", axis))[1]


def _size(rule: Rule, came: Spec, axis: int) -> int:
    if axis >= len(came.shape):
        raise PlanError(f"{rule!r} needs an axis {axis}; {came} came.")
    return came.shape[axis]


def _several(parts: Any) -> str:
    if not isinstance(parts, (list, tuple)):
        return raw(parts)
    return f"({', '.join(map(raw, parts))}{',' if len(parts) == 1 else ''})"
