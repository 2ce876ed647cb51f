"""How far scores can be trusted, on made-up sources whose order is known."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from transferjax import DataError
from transferjax.advise import Evidence, Run, Task, evidence, score_agreement
from transferjax.advise._agreement import _tau, ranks

SOURCES = {"raw": 0.5, "small": 0.6, "large": 0.8}


def tasks(**scores):
    given = dict(zip(SOURCES, zip(*scores.values(), strict=True), strict=True))
    return [
        Task("t", 0, source, "image", 10, 2, 0, 4, 0.5, **dict(zip(scores, given[source], strict=True)))
        for source in SOURCES
    ]


def runs(road="features", tuning="", features="last"):
    spent = ("sgd", 0.1, 0, 8)
    return [Run("t", 0, source, road, tuning, features, *spent, accuracy, 1.0) for source, accuracy in SOURCES.items()]


def test_a_score_in_the_right_order_has_tau_one_and_in_the_wrong_one_minus_one():
    known = Evidence(tuple(runs()), tuple(tasks(logme=(1, 2, 3), gbc=(3, 2, 1), knn_accuracy=(1, 2, 3))))
    found = {row[0]: row[1:] for row in score_agreement(known).rows}
    assert found["logme"] == (1, None) and found["gbc"] == (-1, None)
    assert found["mean rank"] == (1, None)  # two to one


def test_fine_tuning_counts_by_its_best_run_and_all_layers_do_not_count():
    worse = [dataclasses.replace(run, accuracy=0.1) for run in runs("finetune", "full", "")]
    odd = [dataclasses.replace(run, accuracy=1 - run.accuracy) for run in runs(features="all layers")]
    known = Evidence((*runs("finetune", "full", ""), *worse, *odd), tuple(tasks(logme=(1, 2, 3))))
    assert score_agreement(known).rows[0] == ("logme", None, 1)


def test_a_score_that_a_source_lacks_gives_no_ranks():
    found = ranks(tasks(logme=(1, None, 3), knn_accuracy=(0.5, 0.7, 0.5)))
    assert found == {"raw": [2.5], "small": [1.0], "large": [2.5]}


def test_tau_is_that_of_scipy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 4, 8).tolist(), rng.integers(0, 4, 8).tolist()
        expected = scipy.stats.kendalltau(x, y).statistic
        assert _tau(list(zip(x, y, strict=True))) == pytest.approx(0 if np.isnan(expected) else expected)


def test_without_scores_there_is_nothing_to_compare():
    with pytest.raises(DataError, match=r"the evidence has no task on which two sources have a score and an accuracy"):
        score_agreement(Evidence(tuple(runs()), ()))


def test_on_measured_tasks_every_score_is_better_than_chance():
    assert all(row[1] > 0 for row in score_agreement(evidence()).rows)
