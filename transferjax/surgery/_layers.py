"""Rules that number layers anew: a few of the source's layers, or some of them several times."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transferjax._errors import PlanError
from transferjax.surgery._ops import Spec
from transferjax.surgery._patterns import compiled, raw
from transferjax.surgery._resize import whole
from transferjax.surgery._rules import Lead, Naming


@dataclasses.dataclass(frozen=True, repr=False)
class Renumber(Naming):
    """See :func:`select` and :func:`repeat`; ``layers`` holds the old number of each new one, or how often."""

    written: str
    pattern: re.Pattern[str]
    layers: tuple[tuple[int, int], ...] | int

    def __repr__(self) -> str:
        return self.written

    def names(self, name: str) -> tuple[str, ...] | None:
        """The name with each of its new numbers, none for a layer left behind; ``None`` when it does not match."""
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        text = found["i"] or ""
        if not text.isdecimal():
            raise PlanError(f"{self!r} finds no number in its group i: {found['i']!r}. Write (?P<i>\\d+).")
        start, stop = found.span("i")
        width = len(text) if text.startswith("0") else 0
        return tuple(f"{name[:start]}{str(new).zfill(width)}{name[stop:]}" for new in self._new(int(text)))

    def leads(self, name: str, came: Spec) -> tuple[Lead, ...] | None:
        names = self.names(name)
        return None if names is None else tuple(map(Lead, names))

    def _new(self, old: int) -> Iterable[int]:
        if isinstance(self.layers, int):
            return range(old * self.layers, (old + 1) * self.layers)
        return [new for new, source in self.layers if source == old]


def select(pattern: str, layers: Sequence[int]) -> Renumber:
    r"""Only some layers of the source are used, under new numbers; the others are waived.

    Args:
      pattern: a regular expression with the group ``(?P<i>\d+)`` for the number of the layer, matched against the
        full source name.
      layers: the numbers of the layers to use, each once: ``layers[0]`` becomes layer 0.

    Returns:
      A rule for :func:`plan`.

    Raises:
      PlanError: the pattern or the layers are malformed, a layer comes twice, or there is no group ``i``.

    >>> rule = select(r"blocks/(?P<i>\d+)/.*", [0, 2, 4])
    >>> rule.names("blocks/4/kernel"), rule.names("blocks/3/kernel")
    (('blocks/2/kernel',), ())

    Source: V. Sanh et al., "DistilBERT, a distilled version of BERT", 2019 (every other layer of the teacher).
    """
    if not isinstance(layers, (list, tuple, range)):
        raise PlanError(f"select({raw(pattern)}, ...) expects a list of layers, got {type(layers).__name__}.")
    written = f"select({raw(pattern)}, {list(layers)})"
    twice = [layer for number, layer in enumerate(layers) if layer in layers[:number]]
    if twice:
        raise PlanError(f"{written} names layer {twice[0]!r} twice. Write repeat(...) to use a layer several times.")
    return Renumber(written, _numbered(written, pattern), _table(written, enumerate(layers)))


def repeat(pattern: str, layers: int | Sequence[int] | Mapping[int, int]) -> Renumber:
    r"""Layers of the source fill several layers of the target each.

    Args:
      pattern: a regular expression with the group ``(?P<i>\d+)`` for the number of the layer, matched against the
        full source name.
      layers: how many times in a row each layer comes (2: 0, 0, 1, 1); the old layer of each new one
        (``[0, 1, 0, 1]`` stacks the network on itself); or ``{new layer: old layer}``. Layers that a list or dict
        does not name are waived.

    Returns:
      A rule for :func:`plan`.

    Raises:
      PlanError: the pattern or the layers are malformed, or there is no group ``i``.

    >>> repeat(r"blocks/(?P<i>\d+)/.*", 2).names("blocks/1/kernel")
    ('blocks/2/kernel', 'blocks/3/kernel')
    >>> repeat(r"blocks/(?P<i>\d+)/.*", [0, 1, 0, 1]).names("blocks/1/kernel")
    ('blocks/1/kernel', 'blocks/3/kernel')

    Source: L. Gong et al., "Efficient Training of BERT by Progressively Stacking", 2019 (the list that stacks).
    """
    told = list(layers) if isinstance(layers, (tuple, range)) else layers
    written = f"repeat({raw(pattern)}, {told})"
    if isinstance(layers, Mapping):
        return Renumber(written, _numbered(written, pattern), _table(written, layers.items()))
    if isinstance(layers, (list, tuple, range)):
        return Renumber(written, _numbered(written, pattern), _table(written, enumerate(layers)))
    if not whole(layers) or layers < 2:
        raise PlanError(f"{written} expects a number of at least 2, a list of old layers, or {{new layer: old layer}}.")
    return Renumber(written, _numbered(written, pattern), int(layers))


def _numbered(written: str, pattern: Any) -> re.Pattern[str]:
    made = compiled(written, pattern, "")
    if "i" not in made.groupindex:
        raise PlanError(f"{written} has no group i in its pattern. Write (?P<i>\\d+) where the layer's number stands.")
    return made


def _table(written: str, pairs: Iterable[tuple[Any, Any]]) -> tuple[tuple[int, int], ...]:
    table = tuple(pairs)
    if not table or not all(whole(n) and n >= 0 for pair in table for n in pair):
        raise PlanError(f"{written} expects at least one layer, and whole numbers of at least 0.")
    return tuple(sorted((int(new), int(old)) for new, old in table))
