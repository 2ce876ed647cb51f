"""Images with what the network says about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from transferjax._errors import TransferError, describe
from transferjax.report._style import BLUE, INK, ORANGE, new_figure

LIMIT = 48


def predictions(images: Any, labels: Any, predicted: Any, names: Sequence[str] = (), *, columns: int = 8) -> Any:
    """A grid of images: the predicted class below each, and the true one where they differ.

    Args:
      images: ``[N, H, W, C]`` or ``[N, H, W]``; uint8, or floats in [0, 1]; grey (C = 1) or RGB. At most 48 are drawn.
      labels: ``[N]`` int, the true classes.
      predicted: ``[N]`` int.
      names: of the classes; numbers are shown without.
      columns: images per row.

    Returns:
      A ``matplotlib.figure.Figure``; nothing is written.

    Raises:
      TransferError: the lengths differ, there is no image, or matplotlib is missing.

    >>> import numpy as np
    >>> figure = predictions(np.zeros((2, 8, 8, 1)), [0, 1], [0, 0], ["shirt", "coat"])
    >>> [panel.get_xlabel() for panel in figure.axes]
    ['shirt', 'shirt\\nis: coat']
    """
    images, labels, predicted = np.asarray(images), np.asarray(labels), np.asarray(predicted)
    if images.ndim not in (3, 4) or not len(images) or not len(images) == len(labels) == len(predicted):
        raise TransferError(
            f"predictions() expects images [N, H, W, C] with N labels and predictions, N at least 1; got "
            f"{describe(images)}, {describe(labels)} and {describe(predicted)}."
        )
    right = int(np.sum(labels == predicted))
    heading = f"Predictions: {right} of {len(images)} right"
    images, labels, predicted = images[:LIMIT], labels[:LIMIT], predicted[:LIMIT]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(max(1.15 * columns, 3.2), 1.5 * rows + 0.5)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(images) :]:
        figure.delaxes(axes)
    for axes, image, label, guess in zip(panels, images, labels, predicted, strict=False):
        _tile(axes, image, _name(names, label), _name(names, guess), bool(label == guess))
    return figure


def _tile(axes: Any, image: np.ndarray, label: str, guess: str, right: bool) -> None:
    grey = image.ndim == 2 or image.shape[-1] == 1
    limits = {"cmap": "gray", "vmin": 0, "vmax": 255 if image.dtype == np.uint8 else 1} if grey else {}
    axes.imshow(image.reshape(image.shape[:2]) if grey else image, **limits)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(guess if right else f"{guess}\nis: {label}", fontsize=8, color=BLUE if right else ORANGE)
    for spine in axes.spines.values():
        spine.set_color(BLUE if right else ORANGE)
        spine.set_linewidth(0.8 if right else 2.2)


def _name(names: Sequence[str], number: Any) -> str:
    return str(names[int(number)]) if 0 <= int(number) < len(names) else str(int(number))
