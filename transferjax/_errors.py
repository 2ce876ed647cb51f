"""Errors that teach: what was expected, what came, at which path, what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class TransferError(Exception):
    """Base of every error that transferjax raises on purpose."""


class SelectionError(TransferError, ValueError):
    """A selector, label or group does not fit the tree it is applied to."""


class PlanError(TransferError, ValueError):
    """A surgery plan does not account for every leaf, or does not fit its trees."""


class LawError(TransferError, AssertionError):
    """A value breaks a law that its type promises."""


class CheckpointError(TransferError, ValueError):
    """A file or directory is damaged, unreadable, or not what its name says."""


class DataError(TransferError, ValueError):
    """A data set, an example or a batch cannot be used."""


class NonFiniteError(TransferError, ArithmeticError):
    """The loss or a gradient was NaN or infinite.

    Attributes:
      state: the ``FinetuneState`` from before the offending batch, untouched.
      step: the step number at which it happened.
      ids: the ``id`` entries of the offending batch, or ``None``.
    """

    def __init__(self, message: str, *, state: Any = None, step: int | None = None, ids: Any = None):
        super().__init__(message)
        self.state = state
        self.step = step
        self.ids = ids


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` candidates whose spelling is closest to ``name``, best first.

    >>> nearest("heda/bias", ["stem/kernel", "head/bias", "head/kernel"], 1)
    ['head/bias']
    """
    pool = list(dict.fromkeys(candidates))
    scored = sorted(pool, key=lambda c: (-difflib.SequenceMatcher(None, name, c).ratio(), c))
    return scored[:count]


def nearest_hint(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """``" Nearest: a, b."`` for an error message, or ``""`` when there is no candidate.

    >>> nearest_hint("haed", ["head", "stem"], 1)
    ' Nearest: head.'
    """
    found = nearest(name, candidates, count)
    return f" Nearest: {', '.join(found)}." if found else ""


def describe(leaf: Any) -> str:
    """Shape and type of a leaf as errors print it; never its values.

    >>> import numpy as np
    >>> describe(np.zeros((3, 3, 32, 64), np.float32))
    '(3, 3, 32, 64) float32'
    """
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{tuple(leaf.shape)} {leaf.dtype}"
    return type(leaf).__name__


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number of at least ``least``; ``True`` is none.

    >>> is_whole(3), is_whole(0), is_whole("8"), is_whole(True)
    (True, False, False, False)
    """
    return (
        hasattr(value, "__index__")
        and not isinstance(value, bool)
        and getattr(value, "ndim", 0) == 0
        and value >= least
    )


def listing(names: Sequence[str], limit: int = 5) -> str:
    """The first ``limit`` names, and how many more there are.

    >>> listing(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:limit])
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
