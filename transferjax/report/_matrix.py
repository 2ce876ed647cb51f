"""A matrix of similarities as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from transferjax._errors import TransferError, describe
from transferjax.report._style import GREY, INK, new_figure, title

NUMBERED = 12
"""Cells in a row up to which each cell shows its number."""


def matrix(
    values: Any, rows: Sequence[str], columns: Sequence[str], *, name: str = "similarity", text: str = "Similarity"
) -> Any:
    """A matrix whose darker cells are larger: CKA between the layers of two networks, for one.

    Args:
      values: ``[R, C]`` numbers; NaN is left white.
      rows: the names of the rows, top to bottom.
      columns: the names of the columns.
      name: of what the colour says.
      text: the title.

    Returns:
      A ``matplotlib.figure.Figure``; nothing is written.

    Raises:
      TransferError: the names do not fit the matrix, it is empty, or matplotlib is missing.

    >>> figure = matrix([[1.0, 0.2], [0.2, 1.0]], ["a", "b"], ["x", "y"], name="CKA", text="Layers")
    >>> figure.axes[0].get_title(loc="left"), [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ('Layers', ['a', 'b'])
    """
    table = np.asarray(values, float)
    if table.ndim != 2 or table.shape != (len(rows), len(columns)) or not table.size:
        raise TransferError(
            f"matrix() got {describe(table)} for {len(rows)} rows and {len(columns)} columns. Expected [R, C] numbers "
            "with one name per row and one per column."
        )
    height, width = table.shape
    figure = new_figure(2.6 + 0.42 * width, 1.8 + 0.36 * height)
    axes = figure.subplots()
    image = axes.imshow(table, cmap="Blues", vmin=min(0.0, np.nanmin(table)), vmax=np.nanmax(table), aspect="auto")
    title(axes, text)
    axes.set_xticks(range(width), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_yticks(range(height), rows, fontsize=8.5)
    axes.tick_params(colors=GREY, labelcolor=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if max(height, width) <= NUMBERED:
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for row, column in np.argwhere(np.isfinite(table)):
            value = table[row, column]
            colour = "white" if value > middle else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(name, color=INK, fontsize=9)
    bar.ax.tick_params(colors=GREY, labelcolor=INK, length=2, labelsize=8)
    return figure
