"""Layers: one bar each, in the order of the network."""

import pytest

from transferjax import Report, TransferError
from transferjax.report import layers

REPORT = Report("Relevance", ("layer", "share"), (("stem", 0.5), ("blocks/0", 0.9), ("blocks/1", 0.1)))


@pytest.mark.parametrize(("highlight", "text"), [(None, "0.9"), (2, "0.1")])
def test_bars_stand_in_order_and_one_stands_out(highlight, text):
    axes = layers(REPORT, "share", highlight=highlight).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.9, 0.1]
    assert [found.get_text() for found in axes.texts] == [text]
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2


def test_a_report_without_the_column_raises():
    with pytest.raises(TransferError, match=r"layers\(\) expects a report with rows and a column 'accuracy'"):
        layers(REPORT, "accuracy")
