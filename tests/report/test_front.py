"""Front: a point per coefficient, a line through the best, and the chosen one."""

import numpy as np
import pytest

from transferjax import Report, TransferError, finetune
from transferjax.report import front

POINTS = {0.0: (0.1, 0.8), 0.5: (0.7, 0.79), 0.75: (0.6, 0.6), 1.0: (0.9, 0.4)}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_every_point_is_there_and_the_line_joins_the_front():
    axes = front(finetune.front(POINTS, keep=0.9)).axes[0]
    drawn = [points.get_offsets().data.tolist()[0] for points in axes.collections]
    assert drawn == [[source, target] for target, source in POINTS.values()]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0.4, 0.9], [0.79, 0.7], [0.8, 0.1]])
    assert axes.get_xlabel() == "accuracy on the source" and axes.get_ylabel() == "accuracy on the target"


def test_the_chosen_point_and_the_limit_stand_out():
    axes = front(finetune.front(POINTS, keep=0.9)).axes[0]
    sizes = [points.get_sizes()[0] for points in axes.collections]
    assert [size == max(sizes) for size in sizes] == [False, True, False, False]
    assert axes.lines[1].get_xdata()[0] == pytest.approx(0.72) and texts(axes)[-1] == "90 % kept"
    assert [text.get_text() for text in axes.texts if text.get_weight() == "bold"] == ["0.5"]


def test_points_that_fall_together_share_a_label():
    points = {**POINTS, 0.25: (0.1, 0.8), 0.9: (0.899, 0.401), (1, 2): (0.6, 0.6)}
    assert set(texts(front(finetune.front(points)).axes[0])) == {"0, 0.25", "0.5", "0.75, (1, 2)", "0.9", "1"}


def test_labels_do_not_overlap():
    alphas = np.linspace(0, 1, 11)
    points = {float(a): (0.3 + 0.5 * (1 - (1 - a) ** 3), 0.8 - 0.3 * a**3) for a in alphas}
    figure = front(finetune.front(points, keep=0.95))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts[:-1]]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_none_is_chosen_where_none_keeps_enough():
    axes = front(finetune.front(POINTS, keep=1.0, base=0.9)).axes[0]
    assert len({points.get_sizes()[0] for points in axes.collections}) == 1 and "100 % kept" in texts(axes)


def test_another_report_raises():
    with pytest.raises(
        TransferError, match=r"front\(\) draws what transferjax\.finetune\.front returns; 'Other' has 0"
    ):
        front(Report("Other", ("a", "b"), ()))
