"""What is learnt against what is kept, and the points that are worth having."""

from __future__ import annotations

from typing import Any

from transferjax._errors import TransferError
from transferjax._report import Report
from transferjax.report._style import BLUE, GREY, INK, ORANGE, bare, new_figure, title

NEEDED = ("coefficient", "target", "source", "on the front", "chosen")
FAINT = "#9FB8C9"
NEAR = 0.06
"""The share of both axes within which points share a label."""


def front(report: Report) -> Any:
    """The target's accuracy over the source's, a point per coefficient, with a line through those on the front.

    Args:
      report: of :func:`transferjax.finetune.front`.

    Returns:
      A ``matplotlib.figure.Figure``; nothing is written. The chosen point stands out; a dotted line shows how much of
      the source was to be kept.

    Raises:
      TransferError: the report is another, or matplotlib is missing.

    >>> import transferjax as tj
    >>> report = tj.finetune.front({0.0: (0.1, 0.8), 0.5: (0.7, 0.79), 1.0: (0.9, 0.4)}, keep=0.9)
    >>> [text.get_text() for text in front(report).axes[0].texts]
    ['1', '0', '0.5', '90 % kept']
    """
    missing = [name for name in NEEDED if name not in report.columns]
    if missing or not report.rows:
        raise TransferError(
            f"front() draws what transferjax.finetune.front returns; '{report.title}' has {len(report.rows)} rows and "
            f"the columns {', '.join(report.columns)}."
        )
    rows = report.to_dicts()
    figure = new_figure(5.6, 4.4)
    axes = figure.subplots()
    bare(axes)
    best = sorted((row["source"], row["target"]) for row in rows if row["on the front"])
    axes.plot(*zip(*best, strict=True), color=BLUE, linewidth=1.4, zorder=2)
    for row in rows:
        colour = ORANGE if row["chosen"] else BLUE if row["on the front"] else FAINT
        axes.scatter([row["source"]], [row["target"]], c=colour, s=64 if row["chosen"] else 34, zorder=3)
    axes.margins(0.12, 0.12)
    axes.grid(color="#EEEEEE", zorder=0)
    axes.set_xlabel("accuracy on the source", color=GREY)
    axes.set_ylabel("accuracy on the target", color=GREY)
    title(axes, report.title)
    _label(axes, rows)
    keep, base = report.metadata.get("keep"), report.metadata.get("base")
    if keep is not None and base is not None:
        _limit(axes, keep * base, f"{100 * keep:g} % kept")
    return figure


def _label(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The coefficients: of points on the front above and to the right, of all others below and to the left.

    Points that nearly fall together share one label; the chosen one has its own.
    """
    spans = [max(row[name] for row in rows) - min(row[name] for row in rows) for name in ("source", "target")]
    near = lambda a, b: all(
        abs(a[name] - b[name]) <= NEAR * span for name, span in zip(("source", "target"), spans, strict=True)
    )
    groups: list[list[dict[str, Any]]] = []
    kind = lambda row: (row["chosen"], row["on the front"])
    for row in sorted(rows, key=lambda row: (*kind(row), row["source"], row["target"])):
        if groups and kind(groups[-1][0]) == kind(row) and near(groups[-1][-1], row):
            groups[-1].append(row)
        else:
            groups.append([row])
    for group in groups:
        chosen, last = group[0]["chosen"], group[-1]
        up = last["on the front"] and not chosen
        names = [row["coefficient"] for row in sorted(group, key=rows.index)]
        text = ", ".join(f"{name:g}" if isinstance(name, (int, float)) else str(name) for name in names)
        axes.annotate(
            text, (last["source"], last["target"]), (5, 4) if up else (-6, -5), textcoords="offset points",
            fontsize=8.5, ha="left" if up else "right", va="bottom" if up else "top", zorder=4,
            color=ORANGE if chosen else INK, weight="bold" if chosen else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
        )  # fmt: skip


def _limit(axes: Any, source: float, text: str) -> None:
    axes.axvline(source, color=GREY, linewidth=1, linestyle=":", zorder=1)
    low, high = axes.get_xlim()
    left = source > (low + high) / 2
    axes.annotate(
        text, (source, 0), (-4 if left else 4, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
        fontsize=8.5, color=GREY, ha="right" if left else "left", va="bottom",
    )  # fmt: skip
