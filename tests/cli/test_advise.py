"""advise: a ranked list of what to do, on the package's evidence and the user's own."""

import json
import os

import pytest

import transferjax as tj
from transferjax.cli import main

DATA = ["--data", "sample", "--split", "train[:60]", "--size", "32"]
MODEL = ["--model", "efficientnet_lite0"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_lines_are_ranked_and_reports_are_written(place, capsys):
    assert main(["advise", *DATA, *MODEL, "--steps", "32", "--output", "out", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = [dict(zip(report["columns"], row, strict=True)) for row in report["rows"]]
    assert [row["expected"] for row in rows] == sorted((row["expected"] for row in rows), reverse=True)
    assert {row["source"] for row in rows} == {"efficientnet_lite0", "raw", "none"}
    assert all(row["evidence"].startswith("E") for row in rows)
    full = [row for row in rows if row["source"] == "efficientnet_lite0" and row["tuning"] == "full"]
    assert full and all(row["seconds"] > 0 and row["epochs"] == pytest.approx(32 * 32 / 60) for row in full)
    assert sorted(os.listdir("out")) == ["learning_curves.png", "report.md"]
    text = (place / "out" / "report.md").read_text()
    assert "### Advice for 32 steps" in text and "### Sources" in text and "### Learning curves" in text


def test_runs_of_your_own_are_kept_and_cited(place, capsys):
    probed = ["probe", *DATA, "--test", "test[:40]", *MODEL, "--readouts", "ridge,logistic", "--evidence", "mine"]
    assert main(probed) == 0
    tuned = ["finetune", *DATA, *MODEL, "--validation", "test[:40]", "--epochs", "1", "--optimizer", "rmsprop"]
    assert main([*tuned, "--evidence", "mine", "--output", "run"]) == 0
    capsys.readouterr()
    found = tj.advise.open_local("mine")
    assert found.targets == ("sample train[:60] at 32",) and {task.source for task in found.tasks} == {"raw", MODEL[1]}
    assert [(run.source, run.road, run.tuning or run.features, run.optimizer, run.steps) for run in found.runs] == [
        ("raw", "features", "inputs", "closed form", 0),
        (MODEL[1], "features", "last", "closed form", 0),
        (MODEL[1], "features", "last", "l-bfgs", 0),
        (MODEL[1], "finetune", "head", "rmsprop", 1),
    ]
    assert main(["advise", *DATA, *MODEL, "--steps", "1", "--evidence", "mine", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert any("local 4" in row[-1] and row[2] == "head" for row in rows)


def test_what_cannot_be_advised_on_is_named(place, capsys):
    os.mkdir("out")
    assert main(["advise", *DATA, *MODEL, "--steps", "1", "--output", "out"]) == 1
    assert "--output 'out' exists already. Expected a new directory." in capsys.readouterr().err
    assert main(["advise", *DATA, *MODEL, "--steps", "1", "--evidence", "nowhere"]) == 1
    assert "there is no folder 'nowhere' of your own runs" in capsys.readouterr().err
    assert main(["finetune", *DATA, *MODEL, "--evidence", "mine", "--output", "run"]) == 1
    assert (
        "--evidence keeps what a run is worth on images it has not seen: give --validation" in capsys.readouterr().err
    )
    assert os.listdir(place) == ["out"]
