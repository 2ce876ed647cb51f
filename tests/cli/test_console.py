"""What is said on a terminal, and elsewhere."""

import pytest

from transferjax import Report
from transferjax.cli._console import progress, show

REPORT = Report("Result [1]", ("method", "accuracy"), (("head", 0.8), ("full", None)), {"seconds": 3})


@pytest.fixture
def terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("transferjax.cli._console.on_terminal", lambda stream: True)
    return capsys


def test_a_table_is_drawn_on_a_terminal(terminal):
    show(REPORT, False)
    text = terminal.readouterr().out
    assert "━" in text and "Result [1]" in text and "seconds: 3" in text


def test_json_stays_json_on_a_terminal(terminal):
    show(REPORT, True)
    assert terminal.readouterr().out == REPORT.to_json() + "\n"


def test_plain_text_elsewhere(capsys):
    show(REPORT, False)
    assert capsys.readouterr().out == str(REPORT) + "\n"


def test_a_bar_on_a_terminal(terminal):
    bar = progress("demo")
    bar.start("training", 2)
    bar.advance(2, {"loss": 0.25})
    bar.finish()
    text = terminal.readouterr().err
    assert "demo: training" in text and "2/2" in text and "loss 0.25" in text


def test_about_ten_lines_elsewhere(capsys):
    lines = progress("demo")
    lines.start("training", 1000)
    for step in range(10, 1001, 10):
        lines.advance(step, {"loss": 0.5})
    lines.finish()
    text = capsys.readouterr().err.splitlines()
    assert text[0] == "demo: training, 1000 steps (the first one compiles)"
    assert 9 <= len(text) <= 12 and text[-1].startswith("demo: step 1000 of 1000, loss 0.5, ")
