"""Comparison: the quality of each row, and its costs beside it."""

import pytest

from transferjax import Report, TransferError
from transferjax.report import comparison

REPORT = Report(
    "Result",
    ("method", "accuracy", "seconds", "how", "trainable parameters"),
    (("head", 0.8, 10.0, "probe", 12_810), ("full", 0.9, 60.0, "all", 3_384_000)),
)


def test_numbers_become_panels_and_words_do_not():
    figure = comparison(REPORT)
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["Accuracy", "Seconds", "Trainable parameters"]
    assert [[text.get_text() for text in panel.texts] for panel in figure.axes] == [
        ["80.0 %", "90.0 %"],
        ["10", "60"],
        ["12.8 k", "3.38 M"],
    ]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["head", "full"]


@pytest.mark.parametrize(("highlight", "bold"), [(None, "90.0 %"), (0, "80.0 %")])
def test_one_row_stands_out(highlight, bold):
    texts = comparison(REPORT, highlight=highlight).axes[0].texts
    assert [text.get_text() for text in texts if text.get_weight() == "bold"] == [bold]


@pytest.mark.parametrize("report", [Report("Empty", ("method", "accuracy"), ()), Report("Other", ("a",), (("b",),))])
def test_a_report_without_the_column_or_rows_raises(report):
    with pytest.raises(TransferError, match="expects a report with rows and a column 'accuracy'"):
        comparison(report)
