"""score: several sources ranked by their features."""

import json

import pytest

from transferjax.cli import main
from transferjax.cli._score import _ranks

DATA = ["--data", "sample", "--split", "train[:60]", "--size", "32"]


def test_sources_are_ranked_beside_the_pixels(capsys):
    models = ["--model", "efficientnet_lite0", "--model", "efficientnet_lite1", "--model", "efficientnet_lite0"]
    assert main(["score", *DATA, *models, "--scores", "logme,knn_accuracy", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["columns"] == ["source", "logme", "knn_accuracy", "mean rank", "ranks"]
    rows = {row[0]: row for row in report["rows"]}
    assert set(rows) == {"pixels", "efficientnet_lite0", "efficientnet_lite1"}
    means = [row[3] for row in report["rows"]]
    assert means == sorted(means) and sum(means) == pytest.approx(6)
    logme = sorted(rows.values(), key=lambda row: -row[1])
    assert logme[0][4].startswith("1")


def test_equal_values_share_their_ranks():
    assert _ranks([0.5, 0.9, 0.5, 0.1]).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_a_score_that_is_none_is_named(capsys):
    assert main(["score", *DATA, "--model", "efficientnet_lite0", "--scores", "magic"]) == 2
    assert "'magic' is no score; expected some of logme" in capsys.readouterr().err
