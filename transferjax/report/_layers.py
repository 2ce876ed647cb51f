"""A quantity of every layer, from the input to the output."""

from __future__ import annotations

from typing import Any

from transferjax._errors import TransferError
from transferjax._report import Report
from transferjax.report._style import BLUE, GREY, INK, bare, new_figure, title


def layers(report: Report, quantity: str, *, highlight: int | None = None) -> Any:
    """A bar per layer in the order of the report: how much of each was chosen, how well each reads out alone.

    Args:
      report: the first column names the layers, in their order in the network.
      quantity: the column to draw; values below 0 are drawn downwards.
      highlight: the number of the layer to draw in full colour; default: the largest.

    Returns:
      A ``matplotlib.figure.Figure``; nothing is written.

    Raises:
      TransferError: there is no such column or no row, or matplotlib is missing.

    >>> report = Report("Relevance", ("layer", "share"), (("blocks/0", 0.2), ("blocks/1", 0.8)))
    >>> [label.get_text() for label in layers(report, "share").axes[0].get_xticklabels()]
    ['blocks/0', 'blocks/1']
    """
    if quantity not in report.columns or not report.rows:
        raise TransferError(
            f"layers() expects a report with rows and a column '{quantity}'; '{report.title}' has {len(report.rows)} "
            f"rows and the columns {', '.join(report.columns)}."
        )
    names = [str(row[0]) for row in report.rows]
    values = [float(value) for value in report.column(quantity)]
    best = values.index(max(values)) if highlight is None else highlight
    figure = new_figure(2.4 + 0.42 * len(names), 3.6)
    axes = figure.subplots()
    bare(axes)
    axes.bar(range(len(names)), values, color=[BLUE if row == best else "#9FB8C9" for row in range(len(names))])
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_ylabel(quantity, color=GREY)
    text = f"{values[best]:.3g}"
    axes.annotate(text, (best, values[best]), (0, 3), textcoords="offset points", ha="center", fontsize=9, color=INK)
    title(axes, report.title)
    return figure
