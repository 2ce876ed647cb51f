"""Curves: one panel per metric, training and validation on it, each labelled where it ends."""

import pytest

from transferjax import TransferError
from transferjax.report import curves


def texts(panel):
    return [text.get_text() for text in panel.texts]


def test_training_and_validation_share_a_panel_and_loss_comes_first():
    rows = [
        {"step": 1, "accuracy": 0.5, "loss": 2.0, "finite": True, "note": "x"},
        {"step": 2, "accuracy": 0.75, "loss": 1.0, "validation/accuracy": 0.625, "validation/loss": None},
    ]
    figure = curves(rows, name="digits")
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["Loss", "Accuracy"]
    assert texts(figure.axes[0]) == ["training\n1"]
    assert texts(figure.axes[1]) == ["training\n75.0 %", "validation\n62.5 %"]
    assert figure.get_suptitle() == "digits"


def test_labels_of_lines_that_end_together_are_moved_apart():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "validation/loss": 1.01}]
    panel = curves(rows).axes[0]
    training, validation = (text.xy[1] for text in panel.texts)
    low, high = panel.get_ylim()
    assert validation - training > 0.12 * (high - low)


def test_long_runs_are_smoothed_and_shown_raw_behind():
    panel = curves([{"step": step, "loss": float(step % 2)} for step in range(200)]).axes[0]
    raw, smooth = (line.get_ydata() for line in panel.lines)
    assert max(raw) == 1.0 and abs(smooth[100] - 0.5) < 0.1


@pytest.mark.parametrize("rows", [[], [{"step": 1, "finite": True, "loss": None}], [{"step": 1, "loss": float("nan")}]])
def test_nothing_to_draw_raises(rows):
    with pytest.raises(TransferError, match=r"found no number to draw among \d rows \(keys: (none|finite|loss)"):
        curves(rows)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(TransferError, match=r"pip install 'transferjax\[plots\]'"):
        curves([{"step": 1, "loss": 1.0}])
