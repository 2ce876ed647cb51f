"""A report renders the same facts everywhere."""

import json

import numpy as np
import pytest

import transferjax as tj
from transferjax._report import format_cell

REPORT = tj.Report(
    "Sizes", ["path", "bytes"], [["a|b<i>", 1234567], ["c", None]], {"total": np.float32(2.5), "all": True}
)


def test_text():
    assert str(REPORT) == ("Sizes\npath        bytes\n------  ---------\na|b<i>  1,234,567\nc\ntotal: 2.5\nall: yes")
    assert str(tj.Report("Nothing", (), ())) == "Nothing"
    assert str(tj.Report("Empty", ("a",), ())) == "Empty\na\n-"


def test_markdown_and_html_escape():
    assert REPORT.to_markdown() == (
        "### Sizes\n\n| path | bytes |\n|---|---|\n| a\\|b<i> | 1,234,567 |\n| c |  |\n\n- total: 2.5\n- all: yes"
    )
    assert (
        REPORT.to_html()
        == REPORT._repr_html_()
        == (
            "<h3>Sizes</h3><table><thead><tr><th>path</th><th>bytes</th></tr></thead><tbody>"
            "<tr><td>a|b&lt;i&gt;</td><td>1,234,567</td></tr><tr><td>c</td><td></td></tr></tbody></table>"
            "<ul><li>total: 2.5</li><li>all: yes</li></ul>"
        )
    )


def test_json_keeps_numbers():
    assert json.loads(REPORT.to_json()) == {
        "title": "Sizes",
        "columns": ["path", "bytes"],
        "rows": [["a|b<i>", 1234567], ["c", None]],
        "metadata": {"total": 2.5, "all": True},
    }
    assert json.loads(tj.Report("t", ("a",), ((tj.glob("x"),),)).to_json())["rows"] == [["'x'"]]


def test_rows_and_columns():
    assert REPORT.rows == (("a|b<i>", 1234567), ("c", None)) and REPORT.column("bytes") == [1234567, None]
    assert REPORT.to_dicts()[1] == {"path": "c", "bytes": None}
    with pytest.raises(KeyError, match=r"report 'Sizes' has no column 'byte'\. Columns: path, bytes\."):
        REPORT.column("byte")
    with pytest.raises(ValueError) as error:
        tj.Report("Sizes", ("path", "bytes"), (("a", 1), ("b",)))
    assert str(error.value) == "row 1 of report 'Sizes' has 1 cells; expected 2, one per column (path, bytes)."


@pytest.mark.parametrize(
    "value, text",
    [(None, ""), (True, "yes"), (False, "no"), (1234567, "1,234,567"), (0.123456, "0.1235"), (123456.7, "123,457"),
     (float("nan"), "nan"), ("text", "text")],
)  # fmt: skip
def test_cells(value, text):
    assert format_cell(value) == text
