"""Against: a point per row, and how far two columns rank alike."""

import numpy as np
import pytest
import scipy.stats

from transferjax import Report, TransferError
from transferjax.report import against
from transferjax.report._against import _tau

REPORT = Report("Sources", ("source", "score", "accuracy"), (("a", 0.1, 0.5), ("b", 0.3, 0.4), ("c", 0.2, 0.9)))


def test_every_row_is_a_named_point():
    axes = against(REPORT, "score", "accuracy", highlight=2).axes[0]
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c"]
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), [[0.1, 0.5], [0.3, 0.4], [0.2, 0.9]])
    assert axes.get_xlabel() == "score" and axes.get_ylabel() == "accuracy"
    colours = axes.collections[0].get_facecolors()
    assert (colours[0] == colours[1]).all() and (colours[0] != colours[2]).any()


def test_tau_is_that_of_scipy_with_ties_too():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 5, 12).astype(float), rng.integers(0, 5, 12).astype(float)
        assert _tau(x, y) == pytest.approx(scipy.stats.kendalltau(x, y).statistic)
    assert _tau(np.ones(3), np.arange(3.0)) == 0


def test_what_cannot_be_drawn_raises():
    with pytest.raises(TransferError, match=r"against\(\) expects a report with the columns 'score' and 'loss'"):
        against(REPORT, "score", "loss")
    with pytest.raises(TransferError, match="expects numbers in the columns 'source' and 'score' of 'Sources'"):
        against(REPORT, "source", "score")
