"""Types of arguments, and the options that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def verb(verbs: Any, name: str, run: Any, summary: str, description: str, example: str) -> argparse.ArgumentParser:
    """A sub-parser with a description, an example and ``--json``."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
    parser.set_defaults(run=run)
    return parser


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def natural(text: str) -> int:
    """A whole number from 0 on."""
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def fraction(text: str) -> float:
    """A number in [0, 1)."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 up to 1")


def share(text: str) -> float:
    """A number in (0, 1]."""
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0, up to 1")


def positive(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def number(text: str) -> float:
    """A finite number."""
    return _number(text, float, lambda value: abs(value) < float("inf"), "a number")


def numbers(text: str) -> list[float]:
    """Finite numbers with commas between.

    >>> numbers("0.5,-1")
    [0.5, -1.0]
    """
    return [number(part) for part in text.split(",")]


def counts(text: str) -> list[int]:
    """Whole numbers with commas between."""
    return [natural(part) for part in text.split(",")]


def some_of(what: str, known: Sequence[str], usual: Sequence[str]) -> tuple[Callable[[str], list[str]], str]:
    """The type and the help of an option that takes names with commas between, each of those that are known.

    >>> some_of("score", ("logme", "gbc"), ("gbc",))[0]("gbc,logme")
    ['gbc', 'logme']
    """
    listed = f"of {', '.join(known)} ({','.join(usual)})"

    def names(text: str) -> list[str]:
        found = text.split(",")
        strange = [name for name in found if name not in known]
        if strange:
            raise argparse.ArgumentTypeError(f"'{strange[0]}' is no {what}; expected some {listed}")
        return found

    return names, listed


def _number(text: str, kind: Any, holds: Any, expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
    return value
