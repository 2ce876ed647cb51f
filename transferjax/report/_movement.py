"""How far each part of a network moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transferjax._errors import SelectionError, TransferError, listing
from transferjax._report import Report
from transferjax.report._style import BLUE, GREY, INK, ORANGE, PALE, bare, new_figure, title
from transferjax.tree import Selector, as_order

NEEDED = ("path", "state", "norm", "change", "relative change")
FAINT = "#9FB8C9"
LIMIT = 40
"""Bars up to which every leaf has its own."""
WIDE = 30.0
"""The ratio of the longest bar to the shortest from which the axis is logarithmic."""

Part = tuple[str, list[dict[str, Any]]]


def movement(report: Report, *, order: Sequence[Selector | str] | None = None) -> Any:
    """A bar per part of a network with the relative change of its weights, top to bottom.

    Args:
      report: of :func:`transferjax.finetune.movement`.
      order: selectors or globs of the network's stages from input to output, for a bar per stage in that order:
        ``tj.models.stages(name)`` or ``tj.stages(model, inputs)``; leaves of none of them come last, as ``others``.
        ``None``: a bar per leaf in the order of the report, or per module where there are more than 40 leaves.

    Returns:
      A ``matplotlib.figure.Figure``; nothing is written. The relative change of several leaves is that of all their
      entries together. Parts in which a frozen leaf moved stand out; the axis is logarithmic where bars are of very
      different lengths.

    Raises:
      TransferError: the report is another, compares nothing, or matplotlib is missing.
      SelectionError: ``order`` is no list, or fits no leaf that was compared.

    >>> import numpy as np, transferjax as tj
    >>> base, tuned = {"head": np.ones(4), "stem": np.ones(4)}, {"head": np.full(4, 1.5), "stem": np.ones(4)}
    >>> figure = movement(tj.finetune.movement(base, tuned), order=["stem", "head"])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['equal', '0.5']
    """
    rows = [] if any(name not in report.columns for name in NEEDED) else report.to_dicts()
    rows = [row for row in rows if row["change"] is not None]
    if not rows:
        raise TransferError(
            f"movement() draws what transferjax.finetune.movement returns, with leaves of one shape in both; "
            f"'{report.title}' has {len(report.rows)} rows and the columns {', '.join(report.columns)}."
        )
    parts = _by_prefix(rows) if order is None else _by_stage(rows, order)
    sizes = [_relative(members) for _, members in parts]
    figure = new_figure(6.2, 1.0 + 0.24 * len(parts))
    axes = figure.subplots()
    bare(axes, left=False)
    colours = [_colour(members, size) for (_, members), size in zip(parts, sizes, strict=True)]
    _bars(axes, sizes, colours, [_text(members, size) for (_, members), size in zip(parts, sizes, strict=True)])
    axes.set_yticks(range(len(parts)), [name for name, _ in parts], fontsize=8.5)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_xlabel("relative change, |tuned - base| / |base|", color=GREY)
    title(axes, report.title + (" (orange: frozen ones)" if ORANGE in colours else ""))
    return figure


def _bars(axes: Any, sizes: Sequence[float], colours: Sequence[str], texts: Sequence[str]) -> None:
    drawn = [size for size in sizes if math.isfinite(size) and size > 0]
    low, high = (min(drawn), max(drawn)) if drawn else (1.0, 1.0)
    log = high > WIDE * low
    start = 10 ** math.floor(math.log10(low) - 0.3) if log else 0.0
    lengths = [(size if math.isfinite(size) else high) - start if size > 0 or size != size else 0.0 for size in sizes]
    axes.barh(range(len(sizes)), lengths, left=start, color=list(colours), height=0.66)
    if log:
        axes.set_xscale("log")
    axes.set_xlim(start, start * (high / start) ** 1.18 if log else 1.18 * high)
    axes.axvline(start, color=PALE, linewidth=1)
    axes.tick_params(axis="y", left=False)
    for row, (length, text) in enumerate(zip(lengths, texts, strict=True)):
        axes.annotate(
            text, (start + length, row), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK
        )


def _colour(members: Sequence[dict[str, Any]], size: float) -> str:
    if any(row.get("frozen") == "moved!" for row in members):
        return ORANGE
    return BLUE if math.isfinite(size) else FAINT


def _text(members: Sequence[dict[str, Any]], size: float) -> str:
    if all(row["state"] == "equal" for row in members):
        return "equal"
    return "from zero" if math.isinf(size) else f"{size:.2g}"


def _relative(members: Sequence[dict[str, Any]]) -> float:
    """The relative change of leaves together; infinite where all began at zero and one is no longer."""
    change, norm = (math.hypot(*(row[name] for row in members)) for name in ("change", "norm"))
    return change / norm if norm else math.inf if change else 0.0


def _by_stage(rows: Sequence[dict[str, Any]], order: Any) -> list[Part]:
    """The leaves of every stage; those of none last. A leaf belongs to the first stage that matches it."""
    stages = as_order(order, "movement")
    parts: dict[str, list[dict[str, Any]]] = {selector.name.strip("'"): [] for selector in stages}
    others = []
    for row in rows:
        name = next((one.name.strip("'") for one in stages if one(row["path"])), None)
        (others if name is None else parts[name]).append(row)
    found = [(name.removesuffix("/**").removesuffix("/*"), members) for name, members in parts.items() if members]
    if not found:
        raise SelectionError(
            f"movement(): order matches none of {len(rows)} leaves. It has {listing(list(parts), 3)}; the report has "
            f"{listing([row['path'] for row in rows], 3)}."
        )
    return [*found, *([("others", others)] if others else [])]


def _by_prefix(rows: Sequence[dict[str, Any]]) -> list[Part]:
    """A part per leaf; where those are many, per module at the greatest depth that leaves few enough."""
    if len(rows) <= LIMIT:
        return [(row["path"], [row]) for row in rows]
    split = [(row, row["path"].replace(".", "/").split("/")) for row in rows]
    found: dict[str, list[dict[str, Any]]] = {}
    for depth in range(1, max(len(names) for _, names in split)):
        parts: dict[str, list[dict[str, Any]]] = {}
        for row, names in split:
            parts.setdefault("/".join(names[: min(depth, len(names) - 1)] or names), []).append(row)
        if found and len(parts) > LIMIT:
            break
        found = parts
    return list((found or {row["path"]: [row] for row in rows}).items())
