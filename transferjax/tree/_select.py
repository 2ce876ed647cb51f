"""Selectors: predicates over (path, leaf) that print, compare and combine."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from transferjax._errors import SelectionError, listing, nearest_hint
from transferjax.tree._paths import SEPARATOR, flatten


@dataclasses.dataclass(frozen=True)
class Selector:
    """A predicate ``(path, leaf) -> bool`` with ``|``, ``&``, ``~``, ``repr``, ``==`` and ``hash``.

    Attributes:
      name: how it prints, in errors and reports too; equal names and equal functions are equal selectors.
      function: the predicate.
    """

    name: str
    function: Callable[[str, Any], bool] = dataclasses.field(repr=False)

    def __call__(self, path: str, leaf: Any = None) -> bool:
        return bool(self.function(path, leaf))

    def __or__(self, other: Selector | str) -> Selector:
        return _combine("|", self, as_selector(other))

    def __and__(self, other: Selector | str) -> Selector:
        return _combine("&", self, as_selector(other))

    def __ror__(self, other: str) -> Selector:
        return as_selector(other) | self

    def __rand__(self, other: str) -> Selector:
        return as_selector(other) & self

    def __invert__(self) -> Selector:
        return Selector(f"~{self.name}", _Not(self))

    def __repr__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class _Not:
    inner: Selector

    def __call__(self, path, leaf):
        return not self.inner(path, leaf)


@dataclasses.dataclass(frozen=True)
class _Both:
    operator: str
    a: Selector
    b: Selector

    def __call__(self, path, leaf):
        if self.operator == "|":
            return self.a(path, leaf) or self.b(path, leaf)
        return self.a(path, leaf) and self.b(path, leaf)


@dataclasses.dataclass(frozen=True)
class _Matches:
    pattern: str

    def __call__(self, path, leaf):
        return re.fullmatch(self.pattern, path) is not None


def _combine(operator: str, a: Selector, b: Selector) -> Selector:
    return Selector(f"({a.name} {operator} {b.name})", _Both(operator, a, b))


def glob(pattern: str) -> Selector:
    """Selects paths by whole segments.

    ``*`` stands for any characters within one segment, ``?`` for one, ``[0-3]`` for one of a set, ``**`` for any
    number of whole segments (also none), ``{a,b}`` for alternatives and ``{2..5}`` or ``{02..11}`` for a range of
    numbers. A plain ``str`` is taken as a glob wherever a selector is expected.

    What does *not* match: ``head`` does not match ``head/kernel`` (write ``head/**``), ``lora`` does not match
    ``notlora`` or ``lora1``, and ``blocks/*`` does not match ``blocks/0/kernel``.

    Args:
      pattern: segments separated by ``/``.

    Returns:
      A :class:`Selector`.

    Raises:
      SelectionError: the pattern is empty, a brace or bracket is not closed, or a range or set is empty or incomplete.

    >>> glob("blocks/{0..9}/**/kernel")("blocks/3/attn/kernel")
    True
    """
    expression = _glob_regex(pattern)
    try:
        re.compile(expression)
    except re.error as error:
        raise SelectionError(
            f"glob '{pattern}' has a set that does not compile: {error}. Write sets like '[0-3]' or '[!ab]'."
        ) from None
    return Selector(f"'{pattern}'", _Matches(expression))


def regex(pattern: str) -> Selector:
    """Selects paths that a regular expression matches as a whole (``re.fullmatch``).

    Args:
      pattern: a Python regular expression over the full path.

    Returns:
      A :class:`Selector`.

    Raises:
      SelectionError: the expression does not compile.

    >>> regex(r"blocks/[0-3]/.*")("blocks/2/kernel")
    True
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise SelectionError(
            f"regex '{pattern}' does not compile: {error}. Write a Python regular expression."
        ) from None
    raw = "\\" in pattern and "'" not in pattern and not pattern.endswith("\\")
    return Selector(f"regex(r'{pattern}')" if raw else f"regex({pattern!r})", _Matches(pattern))


def where(predicate: Callable[[str, Any], bool], name: str | None = None) -> Selector:
    """Selects leaves by any function of path and leaf.

    Args:
      predicate: ``(path, leaf) -> bool``; the leaf may be abstract (shape and dtype only).
      name: how the selector prints; default: the function's name.

    Returns:
      A :class:`Selector`.

    >>> import numpy as np
    >>> where(lambda path, leaf: leaf.ndim == 1, "vectors")("head/bias", np.zeros(3))
    True
    """
    if not callable(predicate):
        raise SelectionError(f"where() expects a function (path, leaf) -> bool, got {type(predicate).__name__}.")
    return Selector(f"where({name or getattr(predicate, '__name__', repr(predicate))})", predicate)


def _always(path: str, leaf: Any) -> bool:
    return True


everything = Selector("everything", _always)
"""Selects every leaf."""


def as_selector(value: Selector | str) -> Selector:
    """A selector as it is; a ``str`` as a glob.

    Raises:
      SelectionError: ``value`` is neither.

    >>> as_selector("head/**")
    'head/**'
    """
    if isinstance(value, Selector):
        return value
    if isinstance(value, str):
        return glob(value)
    raise SelectionError(
        f"expected a selector or a glob such as 'head/**', got {type(value).__name__}. "
        "Build one with transferjax.glob, regex, where or everything."
    )


def matches(tree: Any, selector: Selector | str) -> list[str]:
    """The paths that a selector matches, in tree order.

    Raises:
      SelectionError: it matches nothing; the nearest paths are named.

    >>> matches({"head": {"bias": 1.0, "kernel": 2.0}, "stem": 3.0}, "head/**")
    ['head/bias', 'head/kernel']
    """
    flat, _ = flatten(tree)
    selector = as_selector(selector)
    found = [path for path, leaf in flat if selector(path, leaf)]
    if not found:
        hint = nearest_hint(selector.name.strip("'"), [p for p, _ in flat])
        noun = "parameter" if len(flat) == 1 else "parameters"
        raise SelectionError(f"selector {selector!r} matched none of {len(flat)} {noun}.{hint}")
    return found


def mask(tree: Any, selector: Selector | str) -> Any:
    """Booleans in the structure of a tree: ``True`` where selected. ``optax.masked`` takes it as it is.

    Args:
      tree: any pytree.
      selector: a :class:`Selector` or a glob.

    Returns:
      A pytree of ``bool`` with the treedef of ``tree``.

    Raises:
      SelectionError: the selector matches nothing.

    >>> mask({"head": {"bias": 1.0}, "stem": {"bias": 2.0}}, "head/**")
    {'head': {'bias': True}, 'stem': {'bias': False}}
    """
    chosen = set(matches(tree, selector))
    flat, treedef = flatten(tree)
    return jax.tree.unflatten(treedef, [path in chosen for path, _ in flat])


def label(tree: Any, selectors: Mapping[str, Selector | str], default: str | None = None) -> Any:
    """One name per leaf, in the structure of a tree. ``optax.partition`` takes it as it is.

    Args:
      tree: any pytree.
      selectors: ``{name: selector}``; no leaf may be selected twice.
      default: the name of leaves that no selector matches; ``None``: such leaves raise.

    Returns:
      A pytree of ``str`` with the treedef of ``tree``.

    Raises:
      SelectionError: a selector matches nothing, two match the same leaf, or a leaf has no name.

    >>> label({"head": {"bias": 1.0}, "stem": {"bias": 2.0}}, {"new": "head/**"}, default="frozen")
    {'head': {'bias': 'new'}, 'stem': {'bias': 'frozen'}}
    """
    names: dict[str, str] = {}
    for name, selector in selectors.items():
        for path in matches(tree, selector):
            if path in names:
                raise SelectionError(
                    f"'{path}' is selected by both '{names[path]}' and '{name}'. Expected each leaf in one group: "
                    f"narrow one of the selectors, for example with & ~glob('{path}')."
                )
            names[path] = name
    flat, treedef = flatten(tree)
    missing = [path for path, _ in flat if path not in names]
    if missing and default is None:
        raise SelectionError(
            f"{len(missing)} of {len(flat)} leaves have no label: {listing(missing)}. "
            "Add a selector for them or pass default='...'."
        )
    return jax.tree.unflatten(treedef, [names.get(path, default) for path, _ in flat])


@functools.lru_cache(maxsize=4096)
def _glob_regex(pattern: str) -> str:
    if not pattern:
        raise SelectionError("the glob is empty. Write '**' for everything.")
    split_up = _split_outside_braces(pattern)
    segments = [s for i, s in enumerate(split_up) if s != "**" or split_up[i - 1 : i] != ["**"]]
    out = ""
    for number, segment in enumerate(segments):
        last = number == len(segments) - 1
        if segment == "**":
            out += "(?:.*)" if last and number == 0 else ("(?:/.*)?" if last else "(?:[^/]+/)*")
        else:
            out += _segment_regex(segment, pattern)
            if not last and segments[number + 1 :] != ["**"]:
                out += SEPARATOR
    return out


def _split_outside_braces(pattern: str) -> list[str]:
    parts, depth = [""], 0
    for character in pattern:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            break
        if character == SEPARATOR and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth != 0:
        raise SelectionError(f"glob '{pattern}' has a brace without its partner. Write alternatives as '{{a,b}}'.")
    return parts


def _segment_regex(segment: str, pattern: str) -> str:
    out, rest = "", segment
    while rest:
        if rest[0] == "{":
            end = _closing_brace(rest)
            out += _brace_regex(rest[1:end], pattern)
            rest = rest[end + 1 :]
        elif rest[0] == "[":
            if "]" not in rest[2:]:
                raise SelectionError(
                    f"glob '{pattern}' has a bracket that is not closed. Write sets like '[0-3]', or regex() for a "
                    "bracket in a name."
                )
            end = rest.index("]", 2)
            body = rest[1:end]
            escaped = re.sub(r"[\\\[&|~]", r"\\\g<0>", body[1:] if body[0] in "!^" else body)
            out += "[" + ("^/" if body[0] in "!^" else "") + escaped + "]"
            rest = rest[end + 1 :]
        else:
            out += {"*": "[^/]*", "?": "[^/]"}.get(rest[0], re.escape(rest[0]))
            rest = rest[1:]
    return out


def _closing_brace(text: str) -> int:
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
    raise AssertionError("braces were balanced by _split_outside_braces")


def _brace_regex(body: str, pattern: str) -> str:
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if bounds:
        first, last = map(int, bounds.groups())
        if first > last:
            raise SelectionError(f"glob '{pattern}' has the empty range {{{body}}}. Write the smaller number first.")
        width = len(bounds.group(1)) if body[0] == "0" else 0
        return "(?:" + "|".join(str(number).zfill(width) for number in range(first, last + 1)) + ")"
    if re.fullmatch(r"[^{},/]*\.\.[^{},/]*", body):
        raise SelectionError(
            f"glob '{pattern}' has the incomplete range {{{body}}}. Write two whole numbers, like '{{2..5}}'."
        )
    options, depth = [""], 0
    for character in body:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            options.append("")
        else:
            options[-1] += character
    return "(?:" + "|".join(_glob_regex(o) if SEPARATOR in o else _segment_regex(o, pattern) for o in options) + ")"
