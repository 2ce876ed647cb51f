"""Ways of fine-tuning beside each other: how good, and at what cost."""

from __future__ import annotations

from typing import Any

from transferjax._errors import TransferError
from transferjax._report import Report
from transferjax.report._style import BLUE, GREY, INK, PALE, bare, new_figure, title


def comparison(report: Report, *, quality: str = "accuracy", highlight: int | None = None) -> Any:
    """Bars of the quality of each row, with one narrow panel per cost beside them.

    Args:
      report: the first column names the rows; ``quality`` is a fraction in [0, 1]; every other column of numbers is a
        cost, where shorter is better.
      quality: the name of the column that matters.
      highlight: the number of the row to draw in colour; default: the best one.

    Returns:
      A ``matplotlib.figure.Figure``; nothing is written.

    Raises:
      TransferError: there is no such column or no row, or matplotlib is missing.

    >>> report = Report("Result", ("method", "accuracy", "seconds"), (("head", 0.8, 10), ("full", 0.9, 60)))
    >>> [panel.get_title(loc="left") for panel in comparison(report).axes]
    ['Accuracy', 'Seconds']
    """
    if quality not in report.columns or not report.rows:
        raise TransferError(
            f"comparison() expects a report with rows and a column '{quality}'; '{report.title}' has "
            f"{len(report.rows)} rows and the columns {', '.join(report.columns)}."
        )
    costs = [name for name in report.columns[1:] if name != quality and all(_is_number(v) for v in report.column(name))]
    names = [str(row[0]) for row in report.rows]
    values = [float(value) for value in report.column(quality)]
    best = values.index(max(values)) if highlight is None else highlight
    figure = new_figure(5.2 + 2.2 * len(costs), 1.1 + 0.55 * len(names))
    panels = figure.subplots(1, 1 + len(costs), width_ratios=[2.0, *[1.0] * len(costs)], squeeze=False)[0]
    figure.suptitle(report.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    _bars(panels[0], quality, values, [f"{100 * value:.1f} %" for value in values], best)
    panels[0].set_yticks(range(len(names)), names, fontsize=10)
    for axes, name in zip(panels[1:], costs, strict=True):
        numbers = [float(value) for value in report.column(name)]
        _bars(axes, name, numbers, [_short(value) for value in numbers], best)
        axes.set_yticks([])
    return figure


def _bars(axes: Any, name: str, values: list[float], texts: list[str], best: int) -> None:
    bare(axes, left=False)
    title(axes, name[:1].upper() + name[1:])
    colours = [BLUE if row == best else "#9FB8C9" for row in range(len(values))]
    axes.barh(range(len(values)), values, color=colours, height=0.62)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.32 * max([1e-12, *values]))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.axvline(0, color=PALE, linewidth=1)
    axes.tick_params(left=False)
    for row, (value, text) in enumerate(zip(values, texts, strict=True)):
        weight = "bold" if row == best else "normal"
        axes.annotate(
            text, (value, row), (4, 0), textcoords="offset points", va="center", fontsize=9.5, color=INK, weight=weight
        )
    axes.set_facecolor("none")
    axes.tick_params(axis="y", labelcolor=INK, color=GREY)


def _short(value: float) -> str:
    """A number in three digits, with the unit that shortens it.

    >>> _short(4652008.0), _short(75.31), _short(2.4e10), _short(4.21e8)
    ('4.65 M', '75.3', '24.0 G', '421 M')
    """
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:#.3g}".rstrip(".") + unit
    return f"{value:.3g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
