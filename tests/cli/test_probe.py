"""probe: read-outs of a network's features beside those of the pixels."""

import json
import os

import pytest

from transferjax.cli import main

DATA = ["--data", "sample", "--split", "train[:60]", "--test", "test[:40]", "--size", "32"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_read_outs_are_listed_and_layers_are_drawn(place, capsys):
    options = ["--readouts", "ridge,nearest_mean", "--layers", "blocks/{3,11}", "--output", "out"]
    assert main(["probe", *DATA, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [row[0] for row in report["rows"]]
    assert names == [
        *("ridge on pixels", "ridge on the network's features", "nearest_mean on the network's features"),
        *("ridge on the best layer", "Head2Toe on all layers"),
    ]
    assert all(0.2 < row[1] <= 1 for row in report["rows"]) and "Head2Toe keeps" in report["metadata"]
    assert sorted(os.listdir("out")) == ["layers.png", "readouts.png", "report.md"]
    text = (place / "out" / "report.md").read_text()
    assert "| ridge on pixels |" in text and "| blocks/11 |" in text
    assert os.listdir(place) == ["out"]


def test_without_layers_there_are_none(place, capsys):
    assert main(["probe", *DATA]) == 0
    out = capsys.readouterr().out
    assert "knn on the network's features" in out and "Head2Toe" not in out
    assert os.listdir(place) == []


def test_what_cannot_be_probed_is_named(place, capsys):
    assert main(["probe", *DATA, "--readouts", "ridge,forest"]) == 2
    assert "'forest' is no read-out; expected some of ridge, logistic" in capsys.readouterr().err
    os.mkdir("out")
    assert main(["probe", *DATA, "--output", "out"]) == 1
    assert "--output 'out' exists already. Expected a new directory." in capsys.readouterr().err
    assert main(["probe", *DATA, "--layers", "nowhere/*", "--output", "new"]) == 1
    assert "matched none" in capsys.readouterr().err and os.listdir(place) == ["out"]
