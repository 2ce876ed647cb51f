"""The evidence table: what is read, kept and refused."""

import dataclasses

import pytest

from transferjax import DataError
from transferjax.advise import Evidence, Run, Task, evidence, open_local, record

RUN = Run("birds", 0, "net", "finetune", "full", "", "sgd", 0.1, 32, 8, 0.75, 1.5)
TASK = Task("birds", 0, "net", "image", 100, 4, 1000, 16, 0.7, None, 0.5, 0.6, -1.5, None, 0.65, "animals")


def test_every_run_of_the_package_has_its_task_and_cannot_be_mistaken():
    found = evidence()
    tasks = {(task.target, task.seed, task.source) for task in found.tasks}
    assert all((run.target, run.seed, "raw" if run.source == "none" else run.source) in tasks for run in found.runs)
    assert len(tasks) == len(found.tasks) and len({dataclasses.astuple(run) for run in found.runs}) == len(found.runs)
    assert [run.name for run in found.runs[:2]] == ["E1", "E2"]
    assert all(0 < run.accuracy <= 1 for run in found.runs) and all(0 < task.probe <= 1 for task in found.tasks)


def test_the_table_is_as_large_as_was_written_down():
    found = evidence()
    assert len(found.targets) >= 12
    for target in found.targets:
        runs = [run for run in found.runs if run.target == target]
        strategies = {(run.source, run.tuning, run.features, run.optimizer) for run in runs}
        assert len(strategies) >= 6 and {run.seed for run in runs} == {0, 1, 2}
        assert len({run.steps for run in runs}) == 3


def test_published_figures_say_where_they_stand():
    published = evidence().published
    assert [row.name for row in published] == [f"P{number}" for number in range(1, len(published) + 1)]
    assert all("/" in row.repository and row.finding for row in published)
    assert {row.topic for row in published} >= {"regularised fine-tuning", "scores", "optimizer", "distillation"}


def test_what_is_recorded_is_read_again(tmp_path):
    record(tmp_path / "mine", [RUN, TASK])
    record(tmp_path / "mine", [dataclasses.replace(RUN, seed=1)])
    found = open_local(tmp_path / "mine")
    assert found.tasks == (TASK,) and found.published == ()
    assert found.runs == (
        dataclasses.replace(RUN, name="local 1"),
        dataclasses.replace(RUN, seed=1, name="local 2"),
    )
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["runs.csv", "tasks.csv"]


def test_both_tables_grow_or_none_does(tmp_path):
    (tmp_path / "tasks.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"'.*tasks.csv' has other columns. Expected .*: give another folder"):
        record(tmp_path, [RUN, TASK])
    assert [path.name for path in tmp_path.iterdir()] == ["tasks.csv"]


def test_evidence_adds_up_and_forgets():
    mine = Evidence((RUN,), (TASK,))
    both = evidence() + mine
    assert both.targets == (*evidence().targets, "birds") and both.without("birds") == evidence()
    with pytest.raises(DataError, match=r"there is no evidence of a task 'fish'. Tasks: birds"):
        mine.without("fish")


def test_the_report_has_a_row_per_task_and_strategy():
    mine = Evidence((RUN, dataclasses.replace(RUN, seed=1, accuracy=0.85), dataclasses.replace(RUN, steps=64)), (TASK,))
    report = mine.report()
    assert report.columns == ("task", "strategy", "32 steps", "64 steps")
    assert report.rows == (("birds", "net full sgd", pytest.approx(0.8), 0.75),)


def test_a_run_is_of_a_known_road_and_its_accuracy_a_share():
    with pytest.raises(DataError, match=r"a run's road is 'fine-tune'; expected features, finetune, scratch"):
        dataclasses.replace(RUN, road="fine-tune")
    for accuracy in (95.0, -0.1, float("nan")):
        with pytest.raises(DataError, match=r"a run's accuracy is .*; expected a share of right answers from 0 to 1"):
            dataclasses.replace(RUN, accuracy=accuracy)


def test_what_cannot_be_kept_or_read_raises(tmp_path):
    with pytest.raises(DataError, match=r"record\(\) got 'birds'. Expected Run or Task"):
        record(tmp_path / "mine", ["birds"])
    assert not (tmp_path / "mine").exists()
    with pytest.raises(DataError, match=r"there is no folder '.*mine' of your own runs. Expected one that finetune"):
        open_local(tmp_path / "mine")
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"'.*runs.csv' has other columns. Expected target, seed, source, road"):
        open_local(tmp_path)
    with pytest.raises(DataError, match=r"'.*runs.csv' has other columns. Expected .*: give another folder"):
        record(tmp_path, [RUN])
    (tmp_path / "runs.csv").unlink()
    record(tmp_path, [RUN])
    with (tmp_path / "runs.csv").open("a") as file:
        file.write("birds,zero\n")
    with pytest.raises(DataError, match=r"line 3 of '.*runs.csv' cannot be read. Expected target, seed"):
        open_local(tmp_path)
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    (tmp_path / "runs.csv").write_text("\n".join([lines[0], lines[1].replace("0.75", "75")]) + "\n")
    with pytest.raises(DataError, match=r"line 2 of '.*runs.csv' cannot be used: a run's accuracy is 75"):
        open_local(tmp_path)
