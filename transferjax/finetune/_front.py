"""The front between what is learnt and what is kept: accuracy on the target against accuracy on the source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from transferjax._errors import DataError, describe
from transferjax._report import Report

COLUMNS = ("coefficient", "target", "source", "source kept", "on the front", "chosen")
ROUNDING = 1e-12


class _Point(NamedTuple):
    coefficient: Any
    target: float
    source: float


def front(points: Mapping[Any, tuple[Any, Any]], *, keep: float | None = None, base: float | None = None) -> Report:
    """Which coefficients are worth having, and which to take when the source task may lose no more than so much.

    For the strength of an L2-SP penalty, the coefficient of WiSE-FT (``tj.merging.wise_ft``) or any other dial between
    a source and a target: a point is on the front where no other is as good on both and better on one.

    Args:
      points: ``{coefficient: (accuracy on the target, accuracy on the source)}``, measured on examples that are not
        trained on; higher is better.
      keep: the share of ``base`` that has to be kept, in (0, 1]; the best on the target among those that keep it is
        chosen. ``None``: the best on the target is chosen, whatever it forgets.
      base: the accuracy on the source before fine-tuning; default: the highest among the points.

    Returns:
      A ``Report`` in the order of the points: coefficient, target, source, source kept (the share of ``base``), on the
      front, chosen. Its metadata hold the coefficient that is chosen, or ``None`` where none keeps enough, and why.

    Raises:
      DataError: there is no point, one is no pair of finite numbers, ``keep`` lies outside of (0, 1], or ``base`` is
        not above 0.

    >>> report = front({0.0: (0.1, 0.8), 0.5: (0.7, 0.795), 0.8: (0.6, 0.7), 1.0: (0.9, 0.4)}, keep=0.99)
    >>> report.column("on the front"), report.metadata["chosen"]
    ([True, True, False, True], 0.5)
    >>> report.metadata["why"]
    'the best on the target of 2 that keep 99 % of 0.8 on the source'
    """
    measured = _measured(points)
    if keep is not None and not (isinstance(keep, (int, float)) and 0 < keep <= 1):
        raise DataError(f"front() got keep={keep!r}. Expected a share in (0, 1], such as 0.99.")
    reference = max(point.source for point in measured) if base is None else _number(base, "base")
    if reference <= 0:
        raise DataError(
            f"front() measures what is kept as a share of {reference:g}, the source's accuracy before. Expected a "
            "number above 0: give accuracies, or base=..."
        )
    enough = [p for p in measured if keep is None or p.source >= keep * reference * (1 - ROUNDING)]
    best = max(enough, key=lambda p: (p.target, p.source), default=None)
    rows = [(*p, p.source / reference, not any(_beats(q, p) for q in measured), p is best) for p in measured]
    facts = {"chosen": None if best is None else best.coefficient, "why": _why(measured, len(enough), keep, reference)}
    return Report("Target against source", COLUMNS, tuple(rows), {**facts, "base": reference, "keep": keep})


def _measured(points: Any) -> list[_Point]:
    if not isinstance(points, Mapping) or not points:
        raise DataError(
            f"front() got {describe(points) if not isinstance(points, Mapping) else 'no point'}. Expected "
            "{coefficient: (target, source)} with at least one."
        )
    found = []
    for coefficient, pair in points.items():
        try:
            target, source = pair
        except (TypeError, ValueError):
            raise DataError(f"front() got {describe(pair)} at {coefficient!r}. Expected (target, source).") from None
        what = f"the {{}} accuracy at {coefficient!r}"
        found.append(
            _Point(coefficient, _number(target, what.format("target")), _number(source, what.format("source")))
        )
    return found


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        shown = value if isinstance(value, (int, float)) else describe(value)
        raise DataError(f"front(): {what} is {shown}. Expected a finite number.")
    return number


def _beats(one: _Point, other: _Point) -> bool:
    return one[1:] != other[1:] and one.target >= other.target and one.source >= other.source


def _why(points: list[_Point], enough: int, keep: float | None, base: float) -> str:
    if keep is None:
        return "the best on the target; nothing was asked of the source"
    asked = f"{100 * keep:g} % of {base:.4g} on the source"
    if enough:
        return f"the best on the target of {enough} that keep {asked}"
    most = max(points, key=lambda p: p.source)
    return f"none keeps {asked}; the most is {100 * most.source / base:.3g} % at {most.coefficient}"
