"""How quality grows with the number of examples."""

from __future__ import annotations

from typing import Any

import numpy as np

from transferjax._errors import TransferError
from transferjax._report import Report
from transferjax.report._style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, bare, new_figure, title

COLOURS = (BLUE, ORANGE, GREEN, PURPLE)


def learning_curves(report: Report, *, quality: str = "accuracy") -> Any:
    """A line per row over the numbers of examples that the columns are named after.

    Args:
      report: the first column names the rows; the others are named after numbers of examples, such as
        ``Advice.curves()`` makes. Cells that are ``None`` leave a gap.
      quality: what the cells are.

    Returns:
      A ``matplotlib.figure.Figure``; nothing is written. The axis of examples is logarithmic.

    Raises:
      TransferError: no column is named after a number, no cell holds one, or matplotlib is missing.

    >>> report = Report("Probe", ("source", "25", "50"), (("net", 0.5, 0.7), ("inputs", 0.4, None)))
    >>> [text.get_text() for text in learning_curves(report).axes[0].texts]
    ['net', 'inputs']
    """
    counts = [(place, float(name)) for place, name in enumerate(report.columns) if place and _is_count(name)]
    number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
    lines = [(row[0], [(n, row[place]) for place, n in counts if number(row[place])]) for row in report.rows]
    if not any(points for _, points in lines):
        raise TransferError(
            f"learning_curves() expects columns named after numbers of examples, and numbers in them; '{report.title}' "
            f"has {len(report.rows)} rows and the columns {', '.join(report.columns)}."
        )
    figure = new_figure(5.6, 4.0)
    axes = figure.subplots()
    bare(axes)
    drawn = [(name, points) for name, points in lines if points]
    for place, (_, points) in enumerate(drawn):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=COLOURS[place % len(COLOURS)], linewidth=1.8, marker="o", markersize=4)
    axes.set_xscale("log")
    ticks = [n for _, n in counts]
    axes.set_xticks(ticks, [f"{n:g}" for n in ticks])
    axes.minorticks_off()
    axes.grid(color="#EEEEEE", zorder=0)
    axes.set_xlabel("examples", color=GREY)
    axes.set_ylabel(quality, color=GREY)
    title(axes, report.title)
    low, high = axes.get_ylim()
    heights = _apart([points[-1][1] for _, points in drawn], 0.055 * (high - low))
    for place, ((name, points), height) in enumerate(zip(drawn, heights, strict=True)):
        colour = COLOURS[place % len(COLOURS)]
        x = points[-1][0]
        axes.annotate(
            str(name), (x, height), (8, 0), textcoords="offset points", fontsize=9, color=colour or INK, va="center",
            annotation_clip=False,
        )  # fmt: skip
    return figure


def _is_count(name: str) -> bool:
    try:
        return float(name) > 0
    except ValueError:
        return False


def _apart(heights: list[float], least: float) -> list[float]:
    """The heights, moved as little as keeps them ``least`` apart, in their order.

    >>> _apart([1.0, 1.0, 5.0], 1.0)
    [0.5, 1.5, 5.0]
    """
    order = np.argsort(heights, kind="stable")
    groups: list[list[int]] = []
    middle = lambda group: float(np.mean([heights[n] for n in group]))
    for number in order:
        groups.append([int(number)])
        while (
            len(groups) > 1
            and middle(groups[-1]) - middle(groups[-2]) < least * (len(groups[-2]) + len(groups[-1])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    out = list(heights)
    for group in groups:
        for place, number in enumerate(group):
            out[number] = middle(group) + (place - (len(group) - 1) / 2) * least
    return out
