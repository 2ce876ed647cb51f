"""Regular expressions in rules: compiled, expanded, and shown as they are written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from transferjax._errors import PlanError


def compiled(written: str, pattern: str, replacement: Any) -> re.Pattern[str]:
    """The compiled pattern, once the replacement is known to fit it; errors show the rule as ``written``."""
    if not isinstance(replacement, str) and not callable(replacement):
        raise PlanError(
            f"{written} expects a str or a function of the match as replacement, got {type(replacement).__name__}."
        )
    try:
        made = re.compile(pattern)
        if isinstance(replacement, str):
            made.sub(replacement, "")  # parses the template, and so finds a wrong group now
    except (re.error, IndexError, TypeError) as error:
        raise PlanError(
            f"{written} is malformed: {error}. Write a regular expression, and a replacement with "
            r"\1 or \g<name> for its groups."
        ) from None
    return made


def expand(rule: Any, found: re.Match[str], replacement: str | Callable[[re.Match[str]], str]) -> str:
    """The target path that a replacement makes of a match."""
    if isinstance(replacement, str):
        return found.expand(replacement)
    try:
        new = replacement(found)
    except LookupError as error:
        raise PlanError(f"{rule!r} raised {error!r} for '{found[0]}'. Write a narrower pattern.") from None
    if not isinstance(new, str):
        raise PlanError(f"{rule!r} made {type(new).__name__} from '{found[0]}'; expected a str, the target path.")
    return new


def raw(text: Any) -> str:
    r"""A string as it would be written: ``r'\d'`` rather than ``'\\d'``."""
    if not isinstance(text, str):
        return repr(text)
    return f"r'{text}'" if "\\" in text and "'" not in text and not text.endswith("\\") else repr(text)


def name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))
