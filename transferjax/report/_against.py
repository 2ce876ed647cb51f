"""One column of a report against another."""

from __future__ import annotations

from typing import Any

import numpy as np

from transferjax._errors import TransferError
from transferjax._report import Report
from transferjax.report._style import BLUE, GREY, INK, ORANGE, bare, new_figure, title


def against(report: Report, x: str, y: str, *, highlight: int | None = None) -> Any:
    """A point per row, named after the first column: a score against the accuracy that was reached, for one.

    Args:
      report: the first column names the rows; ``x`` and ``y`` are columns of numbers.
      x: the column along the bottom.
      y: the column up the side.
      highlight: the number of a row to draw in another colour.

    Returns:
      A ``matplotlib.figure.Figure``; nothing is written. The title says the rank correlation (Kendall's tau).

    Raises:
      TransferError: a column is missing or holds something else than numbers, there are fewer than two rows, or
        matplotlib is missing.

    >>> report = Report("Sources", ("source", "LogME", "accuracy"), (("a", 0.1, 0.5), ("b", 0.2, 0.7)))
    >>> against(report, "LogME", "accuracy").axes[0].get_title(loc="left")
    "Sources: Kendall's tau 1.00"
    """
    missing = [name for name in (x, y) if name not in report.columns]
    if missing or len(report.rows) < 2:
        raise TransferError(
            f"against() expects a report with the columns '{x}' and '{y}' and at least two rows; '{report.title}' has "
            f"{len(report.rows)} and the columns {', '.join(report.columns)}."
        )
    try:
        across, up = (np.array([float(value) for value in report.column(name)]) for name in (x, y))
    except (TypeError, ValueError):
        raise TransferError(f"against() expects numbers in the columns '{x}' and '{y}' of '{report.title}'.") from None
    figure = new_figure(5.6, 4.2)
    axes = figure.subplots()
    bare(axes)
    colours = [ORANGE if row == highlight else BLUE for row in range(len(across))]
    axes.scatter(across, up, c=colours, s=34, zorder=3)
    for row, name in enumerate(report.column(report.columns[0])):
        place = (across[row], up[row])
        axes.annotate(str(name), place, (5, 4), textcoords="offset points", fontsize=8.5, color=INK)
    axes.margins(0.16, 0.12)
    axes.grid(color="#EEEEEE", zorder=0)
    axes.set_xlabel(x, color=GREY)
    axes.set_ylabel(y, color=GREY)
    title(axes, f"{report.title}: Kendall's tau {_tau(across, up):.2f}")
    return figure


def _tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b.

    >>> _tau(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))
    0.3333333333333333
    """
    first, second = np.triu_indices(len(x), 1)
    a, b = np.sign(x[first] - x[second]), np.sign(y[first] - y[second])
    scale = float(np.sqrt(np.sum(a != 0) * np.sum(b != 0)))
    return float(np.sum(a * b)) / scale if scale else 0.0
