"""Learning curves: a line per row over numbers of examples."""

import numpy as np
import pytest

from transferjax import Report, TransferError
from transferjax.report import learning_curves
from transferjax.report._learning import _apart

REPORT = Report("Probe", ("source", "25", "50", "100"), (("net", 0.5, 0.6, 0.7), ("raw", None, 0.4, 0.69)))


def test_every_row_is_a_line_with_its_name_at_the_end():
    axes = learning_curves(REPORT, quality="left-out accuracy").axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[25, 0.5], [50, 0.6], [100, 0.7]])
    np.testing.assert_array_equal(axes.lines[1].get_xydata(), [[50, 0.4], [100, 0.69]])
    assert [text.get_text() for text in axes.texts] == ["net", "raw"]
    assert axes.get_ylabel() == "left-out accuracy" and axes.get_xlabel() == "examples"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["25", "50", "100"]


def test_names_keep_apart_and_in_order():
    rng = np.random.default_rng(0)
    for _ in range(50):
        heights = list(rng.uniform(0, 1, 6))
        moved = np.array(_apart(heights, 0.1))[np.argsort(heights)]
        assert np.diff(moved).min() >= 0.1 - 1e-9
    assert _apart([0.0, 1.0], 0.1) == [0.0, 1.0]


def test_what_has_no_numbers_raises():
    for report in (Report("Probe", ("source", "accuracy"), (("net", 0.5),)), Report("Probe", ("source", "25"), ())):
        with pytest.raises(TransferError, match=r"learning_curves\(\) expects columns named after numbers of examples"):
            learning_curves(report)
