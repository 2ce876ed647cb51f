"""Loss and accuracy over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transferjax._errors import TransferError, listing
from transferjax.report._style import BLUE, GREY, INK, ORANGE, bare, new_figure, title

VALIDATION = "validation/"
FIRST = ("loss", "accuracy")


def curves(metrics: Sequence[Mapping[str, Any]], *, name: str = "") -> Any:
    """One small panel per metric over the steps: training as a line, validation as dots on it.

    Args:
      metrics: one dict per step with ``"step"`` and numbers, from ``Run.metrics()``; ``validation/<metric>`` shares
        the panel of ``<metric>``. Values that are missing or ``None`` leave a gap; truth values and texts are left out.
      name: of the run, put above the panels.

    Returns:
      A ``matplotlib.figure.Figure``; nothing is written.

    Raises:
      TransferError: no number to draw, or matplotlib is missing.

    >>> figure = curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    >>> [panel.get_title(loc="left") for panel in figure.axes]
    ['Loss']
    """
    panels = _panels(metrics)
    figure = new_figure(4.6 * len(panels), 3.2 + 0.3 * bool(name))
    for axes, (metric, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _panel(axes, metric, lines)
    if name:
        figure.suptitle(name, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def _panels(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """``{metric: {"training" or "validation": [(step, value)]}}``, loss and accuracy first."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in metrics:
        for key, value in row.items():
            if key == "step" or isinstance(value, (bool, str)) or value is None or not math.isfinite(value):
                continue
            kind = "validation" if key.startswith(VALIDATION) else "training"
            lines = found.setdefault(key.removeprefix(VALIDATION), {})
            lines.setdefault(kind, []).append((row["step"], float(value)))
    if not found:
        keys = sorted({key for row in metrics for key in row})
        raise TransferError(
            f"curves() found no number to draw among {len(metrics)} rows (keys: {listing(keys) or 'none'}). "
            'Expected rows such as {"step": 1, "loss": 0.5}.'
        )
    return {m: found[m] for m in sorted(found, key=lambda m: (FIRST.index(m) if m in FIRST else len(FIRST), m))}


def _panel(axes: Any, metric: str, lines: Mapping[str, list[tuple[int, float]]]) -> None:
    bare(axes)
    title(axes, metric.replace("_", " ").capitalize())
    axes.set_xlabel("step", color=INK)
    ends = []
    if "training" in lines:
        steps, values = zip(*lines["training"], strict=True)
        crowded = len(values) > 40
        if crowded:
            axes.plot(steps, values, color=BLUE, linewidth=0.6, alpha=0.25)
        smooth = _smooth(values) if crowded else list(values)
        axes.plot(steps, smooth, color=BLUE, linewidth=1.8)
        ends.append(("training", steps[-1], smooth[-1], BLUE))
    if "validation" in lines:
        steps, values = zip(*lines["validation"], strict=True)
        axes.plot(steps, values, color=ORANGE, linewidth=1.8, marker="o", markersize=4)
        ends.append(("validation", steps[-1], values[-1], ORANGE))
    if metric.endswith("accuracy"):
        axes.set_ylim(top=1.0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    if all(step == int(step) for line in lines.values() for step, _ in line):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=GREY, alpha=0.15)
    _label_ends(axes, metric, ends)


def _label_ends(axes: Any, metric: str, ends: list[tuple[str, float, float, str]]) -> None:
    """The name and last value of each line, beside its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    apart = 0.13 * (high - low)
    places = [min(max(value, low + apart / 2), high - apart / 2) for _, _, value, _ in ends]
    if len(ends) == 2 and abs(places[0] - places[1]) < apart:
        middle, up = (places[0] + places[1]) / 2, ends[0][2] >= ends[1][2]
        middle = min(max(middle, low + apart / 2), high - apart / 2)
        places = [middle + apart / 2, middle - apart / 2][:: 1 if up else -1]
    right = max((step for _, step, _, _ in ends), default=0)
    for (kind, _, value, colour), place in zip(ends, places, strict=True):
        text = f"{100 * value:.1f} %" if metric.endswith("accuracy") else f"{value:.3g}"
        axes.annotate(
            f"{kind}\n{text}", (right, place), (6, 0), textcoords="offset points", color=colour, fontsize=9, va="center"
        )


def _smooth(values: Sequence[float]) -> list[float]:
    """A centred mean over a twentieth of the steps."""
    reach = max(1, len(values) // 40)
    out = []
    for place in range(len(values)):
        window = values[max(0, place - reach) : place + reach + 1]
        out.append(sum(window) / len(window))
    return out
