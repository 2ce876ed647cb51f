"""finetune --sweep: the table of all runs, the best one kept as a run, and what does not fit."""

import json

import pytest

import transferjax as tj
from transferjax.cli import main

AXIS = "lr=1e-4..1e-1:4"


@pytest.mark.parametrize("hoist", ["--hoist", "--no-hoist"])
def test_the_best_run_is_kept_and_can_be_used(finetune, capsys, hoist):
    assert finetune("--sweep", AXIS, "--validation", "train", hoist, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    rows = [dict(zip(report["columns"], row)) for row in report["rows"]]
    assert [row["lr"] for row in rows] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert ("computed once" in report["metadata"]) == (hoist == "--hoist")
    best = rows[report["metadata"]["best run"]]
    assert best["validation/accuracy"] == max(row["validation/accuracy"] for row in rows)
    run = tj.io.Run.open("run")
    assert run.config["learning_rate"] == f"head={best['lr']!r}" and run.latest == 6
    assert main(["evaluate", "run", "--split", "train", "--json"]) == 0
    found = dict(json.loads(capsys.readouterr().out)["rows"])
    assert found["accuracy"] == pytest.approx(best["validation/accuracy"])


def test_hoisting_does_not_change_what_is_found(finetune, capsys):
    tables = []
    for hoist in ("--hoist", "--no-hoist"):
        assert finetune("--sweep", AXIS, hoist, "--json", output=hoist.strip("-")) == 0
        tables.append([row[:3] for row in json.loads(capsys.readouterr().out)["rows"]])
    for ours, theirs in zip(*tables, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_one_rate_per_group(finetune, capsys):
    axes = ("--sweep", "lr.head=1e-3,1e-2", "--sweep", "lr.lora=1e-4,1e-3")
    assert finetune(*axes, "--json", tuning="head+lora:2") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 4
    assert tj.io.Run.open("run").config["learning_rate"].startswith("head=0.01,lora=0.00")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--sweep", "epochs=1,2"), 2, "sweeps over 'epochs'; expected lr=... or lr.GROUP=..."),
        (("--sweep", "lr=1e-2..1e-4:4"), 2, "is no axis of a sweep; expected numbers above 0"),
        (("--sweep", "lr=fast"), 2, "is no axis of a sweep; expected numbers above 0"),
        (("--sweep", "lr=1e-2", "--sweep", "lr=1e-3"), 1, "--sweep is given twice for 'lr'. Write all its values"),
        (("--sweep", "lr.lora=1e-2"), 1, "--sweep names the group 'lora', but the tuning has: head."),
        (("--sweep", AXIS, "--output", "photos"), 1, "--output 'photos' holds something already. Expected a new or"),
        (("--sweep", AXIS, "--hoist", "--tuning", "full"), 1, "--hoist: nothing of this run can be computed once: "),
    ],
)
def test_what_does_not_fit_says_so(finetune, capsys, options, code, message):
    assert finetune(*options) == code
    assert message in capsys.readouterr().err


def test_the_best_run_of_a_sweep_has_no_steps_to_resume(finetune, capsys):
    assert finetune("--sweep", AXIS) == 0
    assert main(["finetune", "--resume", "--output", "run"]) == 1
    assert "run' holds the best run of a sweep, which has no steps of its own to resume" in capsys.readouterr().err


def test_a_sweep_is_not_resumed(finetune, capsys):
    assert finetune() == 0
    assert main(["finetune", "--resume", "--sweep", AXIS, "--output", "run"]) == 1
    assert "--sweep cannot go on with --resume: a sweep is kept when it is done." in capsys.readouterr().err
