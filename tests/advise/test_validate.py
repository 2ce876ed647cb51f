"""Whether the advice is any good, on a made-up world and on what was measured."""

import dataclasses

import pytest
import scipy.stats

from transferjax import DataError
from transferjax.advise import Evidence, evidence, leave_one_out, optimizer_rule
from transferjax.advise._validate import _spearman


def test_in_a_world_without_surprises_nothing_is_lost(world):
    found = leave_one_out(world())
    assert set(found.losses) == {0, 32, 128}
    assert all(loss == pytest.approx(0, abs=1e-9) for loss in found.losses.values())
    assert found.tasks.column("advised")[-1] == found.tasks.column("best")[-1] == "net full adamw"
    assert found.tasks.columns[-1] == "points lost" and len(found.tasks.rows) == 12


def test_a_task_that_is_unlike_the_others_costs_what_was_lost_on_it(world):
    known = world()
    lower = lambda run: dataclasses.replace(run, accuracy=run.accuracy - 0.2)
    odd = lambda run: (run.target, run.optimizer) == ("task3", "adamw")
    runs = [lower(run) if odd(run) else run for run in known.runs]
    found = leave_one_out(Evidence(tuple(runs), known.tasks), [128])
    row = next(row for row in found.tasks.to_dicts() if row["task"] == "task3")
    assert row["advised"] == "net full adamw" and row["best"] == "net full sgd"
    assert row["points lost"] == pytest.approx(100 * (row["its best accuracy"] - row["its accuracy"]))
    lost = found.tasks.column("points lost")
    assert found.losses[128] == pytest.approx(sum(lost) / 4) and row["points lost"] == max(lost) > 1


def test_fixed_strategies_are_those_that_every_task_has(world, ways):
    more = {**ways, ("net", "finetune", "last 4", "", "sgd", 32): 0.01}
    known = world(ways=more)
    runs = tuple(run for run in known.runs if run.tuning != "last 4" or run.target == "task0")
    found = leave_one_out(Evidence(runs, known.tasks), [32])
    assert "net last 4 sgd" not in found.fixed.column("strategy")
    assert found.best_fixed[32] == min(found.fixed.column("points lost"))


def test_one_task_cannot_be_left_out(world):
    with pytest.raises(DataError, match=r"the evidence knows 1 tasks. Expected two or more, to leave one out"):
        leave_one_out(world(errors=(0.3,)))


def test_a_task_of_which_nothing_advised_was_measured_raises(world):
    known = world()
    odd = [dataclasses.replace(run, optimizer="other") if run.target == "task0" else run for run in known.runs]
    with pytest.raises(DataError, match=r"no run of task 'task0', draw 0, is of a strategy that was advised"):
        leave_one_out(Evidence(tuple(odd), known.tasks), [0])


def test_a_draw_without_runs_is_left_out(world):
    known = world()
    fewer = tuple(run for run in known.runs if (run.target, run.seed) != ("task1", 1))
    assert leave_one_out(Evidence(fewer, known.tasks), [0]).losses[0] == pytest.approx(0, abs=1e-9)


def test_tasks_of_one_data_set_are_left_out_together(world):
    known = world()
    tasks = tuple(dataclasses.replace(task, data="one" if task.target < "task2" else "two") for task in known.tasks)
    both = Evidence(known.runs, tasks)
    odd = [
        dataclasses.replace(run, accuracy=run.accuracy / 2) if (run.target, run.road) == ("task0", "features") else run
        for run in known.runs
    ]
    together = leave_one_out(Evidence(tuple(odd), tasks), [0], by_data=True)
    assert together.losses[0] >= 0 and len(together.tasks.rows) == 4
    assert together.tasks.metadata["first lines not measured at 0"] == "0 of 8"
    assert leave_one_out(both, [0], by_data=True).losses[0] == pytest.approx(0, abs=1e-9)
    with pytest.raises(DataError, match=r"all tasks of the evidence are of one data set. Expected two or more"):
        leave_one_out(Evidence(known.runs, tuple(dataclasses.replace(t, data="one") for t in tasks)), [0], by_data=True)


def test_steps_that_only_one_task_has_are_no_fixed_strategy_of_all(world):
    known = world()
    mine = dataclasses.replace(next(run for run in known.runs if run.optimizer == "adamw"), target="task1", steps=60)
    found = leave_one_out(Evidence((*known.runs, mine), known.tasks), [60])
    assert "net full adamw" in found.fixed.column("strategy")


def test_the_advice_on_measured_tasks_loses_at_most_a_point_and_no_more_than_a_fixed_choice():
    found = leave_one_out(evidence())
    assert len(found.losses) == 3
    for steps, loss in found.losses.items():
        assert loss <= 1.0 and loss <= found.best_fixed[steps], (steps, loss, found.best_fixed[steps])


def test_the_rule_of_optimizers_is_tested_by_rank(world):
    report = optimizer_rule(world())
    assert report.column("difficulty") == sorted(report.column("difficulty")[:4]) * 2
    assert report.metadata["adaptive is better at 32 steps"] == "4 of 4"
    assert report.metadata["rank correlation at 32 steps"] == pytest.approx(1)  # a share of a larger error is more
    with pytest.raises(DataError, match=r"the evidence has no task on which both sgd and rmsprop or adamw were tried"):
        optimizer_rule(Evidence((), ()))


def test_rank_correlation_is_that_of_scipy():
    a, b = [1.0, 2.0, 2.0, 5.0, 0.0], [3.0, 1.0, 4.0, 4.0, 0.0]
    assert _spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert _spearman([1.0, 1.0], [1.0, 2.0]) is None
