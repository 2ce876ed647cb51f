"""evaluate: the last checkpoint of a run, on its data or other data with the same classes."""

import json

import pytest

import transferjax as tj
from transferjax.cli import main


def evaluate(capsys, *options):
    code = main(["evaluate", "run", "--json", *options])
    captured = capsys.readouterr()
    return json.loads(captured.out) if code == 0 else captured.err


def test_it_agrees_with_the_validation_of_the_run(finetune, capsys):
    assert finetune("--validation", "train[4:]") == 0
    capsys.readouterr()
    report = evaluate(capsys, "--split", "train[4:]")
    values, logged = dict(report["rows"]), tj.io.Run.open("run").metrics()[-1]
    assert values["accuracy"] == logged["validation/accuracy"] and values["examples"] == 8
    assert values["loss"] == pytest.approx(logged["validation/loss"], rel=1e-6)


def test_other_classes_raise(finetune, photos, capsys):
    assert finetune() == 0
    (photos / "dark").rename(photos / "dim")
    assert "has other classes (dim, light) than the run (dark, light)" in evaluate(capsys, "--split", "train")


def test_a_damaged_image_is_left_out_when_asked(finetune, photos, capsys):
    assert finetune() == 0
    (photos / "dark/0.png").write_bytes(b"no image")
    assert "0.png" in evaluate(capsys, "--split", "train")
    report = evaluate(capsys, "--split", "train", "--on-error", "skip")
    assert dict(report["rows"])["examples"] == 11


def test_what_is_no_run_raises(workplace, capsys):
    assert "is no run directory" in evaluate(capsys)
    tj.io.Run.create("run", {"seed": 0})
    assert "was not made by `transferjax finetune`" in evaluate(capsys)


def test_weights_that_moved_are_found_and_others_refused(finetune, bases, workplace, capsys):
    assert finetune("--weights", bases[0]) == 0
    (workplace / bases[0]).rename(workplace / "moved.npz")
    assert "there is nothing at" in evaluate(capsys, "--split", "train")
    assert evaluate(capsys, "--split", "train", "--weights", "moved.npz")["title"] == "Evaluation"
    assert "was trained on another base" in evaluate(capsys, "--split", "train", "--weights", bases[1])
