"""From pairs of names to a few regular expressions, and from sets of names to a few globs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from transferjax.tree import Selector, glob, regex

_TOKEN = re.compile(r"\d+|[A-Za-z]+|[^A-Za-z0-9]+")
_NUMBER = re.compile(r"\d+")


class Group(NamedTuple):
    """A part of a pattern that differs between names: one of ``options``, or any number (``None``)."""

    options: tuple[str, ...] | None

    def admits(self, text: str) -> bool:
        """Whether this part of a name may be ``text``."""
        return text.isdecimal() if self.options is None else text in self.options


Part = str | Group


class Pattern(NamedTuple):
    """A regular expression and its replacement in parts; an int of the target is the place of a part of the source."""

    source: tuple[Part, ...]
    target: tuple[str | int, ...]
    names: tuple[str, ...]

    def written(self, layer: int | None = None) -> tuple[str, str]:
        """The two strings that ``rename`` takes; ``layer``: the place of the group that ``stack`` calls i."""
        numbers, texts = {}, []
        for place, part in enumerate(self.source):
            if isinstance(part, str):
                texts.append(re.escape(part))
                continue
            numbers[place] = len(numbers) + 1
            options = r"\d+" if part.options is None else "|".join(map(re.escape, part.options))
            texts.append(f"({'?P<i>' if place == layer else ''}{options})")
        out = ""
        for part, after in zip(self.target, (*self.target[1:], "")):
            digit = isinstance(after, str) and after[:1].isdecimal()
            if isinstance(part, str):
                out += part.replace("\\", "\\\\")
            else:
                out += rf"\g<{numbers[part]}>" if digit else rf"\{numbers[part]}"
        return "".join(texts), out


def patterns(pairs: Mapping[str, str], names: Iterable[str]) -> list[Pattern]:
    r"""As few patterns as carry every pair, and no other of ``names``.

    Numbers that agree on both sides become ``(\d+)``, words that do ``(a|b)``; where a number changes on the way
    (``layer1`` to ``stages/0``), each of its values gets its own pattern.

    >>> made = patterns({f"layer.{i}.{n}.w": f"blocks/{i}/{n}/kernel" for i in (0, 1) for n in "qk"}, [])
    >>> made[0].written()
    ('layer\\.(\\d+)\\.(q|k)\\.w', 'blocks/\\1/\\2/kernel')
    """
    known: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for name in {*names, *pairs}:
        known.setdefault(_open(_split(name)), set()).add(_split(name))
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[tuple[str, str]]] = {}
    for name, path in pairs.items():
        groups.setdefault((_open(_split(name)), _open(_split(path))), []).append((name, path))
    made = [one for (template, _), group in groups.items() for one in _fitted(group, known[template])]
    place = {name: n for n, name in enumerate(pairs)}
    return sorted(merged(made), key=lambda one: min(place[name] for name in one.names))


def cover(wanted: Iterable[str], everything: Iterable[str], free: Iterable[str] = ()) -> list[Selector]:
    """A few globs that select every wanted name, any of the free ones, and none else.

    >>> cover(["a/0/kernel", "a/1/kernel"], ["a/0/kernel", "a/1/kernel", "a/0/bias"])
    ['**/kernel']
    """
    left, free = dict.fromkeys(wanted), set(free)
    forbidden = [name for name in everything if name not in left and name not in free]
    out: list[str] = []
    for numbered in (False, True):  # globs of one block only where none of all blocks will do
        reach: dict[str, set[str]] = {}
        for pattern in dict.fromkeys(p for name in left for p in _globs(name, numbered)):
            chosen = glob(pattern)
            if not any(map(chosen, forbidden)):
                reach[pattern] = {name for name in left if chosen(name)}
        rank = {pattern: n for n, pattern in enumerate(reach)}
        while best := max(reach, key=lambda p: (len(reach[p] & left.keys()), -rank[p]), default=None):
            if not reach[best] & left.keys():
                break
            out.append(best)
            left = {name: None for name in left if name not in reach[best]}
    return [*map(glob, _braced(out)), *(regex(re.escape(name)) for name in left)]


def _globs(name: str, numbered: bool) -> list[str]:
    """Globs that select a name, those first that a reader would write first; ``numbered``: with its numbers."""
    if set(name) & set("*?[]{}"):
        return []
    separator = "/" if "/" in name else "."
    parts = [part if numbered else _NUMBER.sub("*", part) for part in name.split(separator)]
    out = [f"**/{parts[-1]}"] if separator == "/" else [f"*.{parts[-1]}"] if len(parts) > 1 else []
    out.append(separator.join(parts))
    for size in range(len(parts) - 1, 0, -1):
        out.append(separator.join(parts[:size]) + ("/**" if separator == "/" else ".*"))
    return out


def _braced(globs: Sequence[str]) -> list[str]:
    """Globs that differ in one segment only, as one."""
    out = list(globs)
    for place in range(max((g.count("/") for g in globs), default=0), -1, -1):
        groups: dict[tuple[str, ...], list[str]] = {}
        for one in out:
            parts = one.split("/")
            plain = place < len(parts) and not set(parts[place]) & set("*{")
            key = (*parts[:place], "{}", *parts[place + 1 :]) if plain and len(parts) > 1 else (one,)
            groups.setdefault(key, []).append(parts[place] if plain else one)
        out = []
        for key, words in groups.items():
            word = words[0] if len(words) == 1 else f"{{{','.join(words)}}}"
            out.append("/".join(word if part == "{}" else part for part in key))
    return out


def _split(name: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(name))


def _open(tokens: Sequence[str]) -> tuple[str, ...]:
    return tuple("#" if token.isdecimal() else token for token in tokens)


def _fitted(group: Sequence[tuple[str, str]], known: set[tuple[str, ...]]) -> list[Pattern]:
    """Patterns for pairs of one template; ``known``: every name of the source's template."""
    came, to = [_split(name) for name, _ in group], [_split(path) for _, path in group]
    varies = [place for place in range(len(came[0])) if len({tokens[place] for tokens in came}) > 1]
    target: list[str | int] = []
    for place in range(len(to[0])):
        column = [tokens[place] for tokens in to]
        same = [p for p in varies if [tokens[p] for tokens in came] == column]
        if len(set(column)) == 1:
            target.append(column[0])
        elif same:
            target.append(same[0])
        else:
            return _divided(group, varies, known)
    if set(varies) - set(target):
        return _divided(group, varies, known)
    for options in (False, True):
        column = lambda place: tuple(dict.fromkeys(tokens[place] for tokens in came))
        source = tuple(
            Group(column(place) if options else None) if place in varies else came[0][place]
            for place in range(len(came[0]))
        )
        if {tokens for tokens in known if _admits(source, tokens)} <= set(came):
            return [Pattern(source, tuple(target), tuple(name for name, _ in group))]
    return _divided(group, varies, known)


def _divided(group: Sequence[tuple[str, str]], varies: Sequence[int], known: set[tuple[str, ...]]) -> list[Pattern]:
    """The group cut by the values of that number which leaves fewest patterns."""
    best: list[Pattern] = []
    for place in varies:
        parts: dict[str, list[tuple[str, str]]] = {}
        for pair in group:
            parts.setdefault(_split(pair[0])[place], []).append(pair)
        made = [one for part in parts.values() for one in _fitted(part, known)]
        best = made if not best or len(made) < len(best) else best
    return best


def _admits(source: Sequence[Part], tokens: Sequence[str]) -> bool:
    return all(part.admits(t) if isinstance(part, Group) else part == t for part, t in zip(source, tokens, strict=True))


def merged(made: Sequence[Pattern]) -> list[Pattern]:
    """Patterns that differ in one word only, the same on both sides, become one, the largest groups first."""
    made = list(made)
    while True:
        groups: dict[tuple[object, ...], list[Pattern]] = {}
        for one in made:
            for i, word in enumerate(one.source):
                if not isinstance(word, str) or not word.isalpha():
                    continue
                for j in (j for j, other in enumerate(one.target) if other == word):
                    key = (i, j, one.source[:i], one.source[i + 1 :], one.target[:j], one.target[j + 1 :])
                    groups.setdefault(key, []).append(one)
        best = max(groups, key=lambda key: len(groups[key]), default=None)
        if best is None or len(groups[best]) < 2:
            return made
        i, j = int(str(best[0])), int(str(best[1]))
        group = groups[best]
        words = Group(tuple(str(one.source[i]) for one in group))
        first = group[0]
        names = tuple(name for one in group for name in one.names)
        new = Pattern(
            (*first.source[:i], words, *first.source[i + 1 :]), (*first.target[:j], i, *first.target[j + 1 :]), names
        )
        made = [one for one in made if one not in group] + [new]
