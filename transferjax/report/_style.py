"""What all figures share: matplotlib when it is there, colours that everyone can tell apart, bare axes."""

from __future__ import annotations

from typing import Any

from transferjax._errors import TransferError

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
"""From the palette of Okabe and Ito, which colour-blind readers can tell apart."""
INK, GREY, PALE = "#222222", "#767676", "#DDDDDD"


def new_figure(width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure``, in inches, that belongs to no window.

    Raises:
      TransferError: matplotlib is not installed; names the extra that has it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TransferError(
            "figures need matplotlib, which is not installed. Install it with `pip install 'transferjax[plots]'`."
        ) from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def bare(axes: Any, *, left: bool = True) -> None:
    """Removes the frame but for the axes that carry numbers."""
    for side in ("top", "right", *(() if left else ("left",))):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK, length=3)


def title(axes: Any, text: str) -> None:
    """A title at the left, where reading starts."""
    axes.set_title(text, loc="left", fontsize=11, color=INK, pad=8)
