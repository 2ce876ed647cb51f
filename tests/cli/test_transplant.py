"""transplant and export: files through a plan, and back."""

import json

import numpy as np
import pytest

import transferjax as tj
from transferjax.cli import main
from transferjax.surgery import fresh, rename, torch_layout, waive


@pytest.fixture
def foreign(bases, workplace):
    """A file under torch's names, the plan from it, and one with a fresh head."""
    import tiny

    arrays = np.load(bases[0])
    np.savez("foreign.npz", **{"stem.weight": arrays["stem/kernel"].T, "fc.weight": arrays["head/fc/kernel"].T},
             **{"fc.bias": arrays["head/fc/bias"], "steps": np.zeros(1, np.int64)})  # fmt: skip
    source = tj.io.open("foreign.npz")
    rules = [rename(r"stem\.weight", "stem/kernel"), rename(r"fc\.weight", "head/fc/kernel"), torch_layout(),
             rename(r"fc\.bias", "head/fc/bias"), waive("steps")]  # fmt: skip
    made = tj.surgery.plan(source.shapes, tiny.make(2, (), 8), *rules)
    (workplace / "plan.json").write_text(made.with_source(source.fingerprint()).to_json())
    wider = tj.surgery.plan(source.shapes, tiny.make(5, (), 8), *rules, fresh("head/fc/**"))
    (workplace / "wider.json").write_text(wider.to_json())
    return bases[0]


@pytest.mark.parametrize(("output", "options"), [("out", []), ("out.npz", []), ("out", ["--format", "safetensors"])])
def test_a_file_goes_through_a_plan_and_back(foreign, capsys, output, options):
    assert main(["transplant", "foreign.npz", "plan.json", output, *options]) == 0
    assert "permute(1, 0)" in capsys.readouterr().out
    assert tj.io.diff(tj.io.open(output), tj.io.open(foreign)).metadata["equal"]
    assert main(["export", output, "back.npz", "--plan", "plan.json"]) == 0
    report = tj.io.diff(tj.io.open("back.npz"), tj.io.open("foreign.npz"))
    assert dict(report.metadata) == {"equal": False, "equal leaves": 3, "only in b": 1}  # what was waived: steps


def test_weights_are_left_out_of_what_is_exported(foreign, capsys):
    assert main(["transplant", "foreign.npz", "plan.json", "out"]) == 0
    assert main(["export", "out", "back.npz", "--plan", "plan.json", "--leave-out", "fc.*"]) == 0
    assert list(tj.io.open("back.npz")) == ["stem.weight"]


def test_a_bound_plan_refuses_another_source(foreign, capsys):
    arrays = {name: array + 1 for name, array in np.load("foreign.npz").items()}
    np.savez("other.npz", **arrays)
    assert main(["transplant", "other.npz", "plan.json", "out"]) == 1
    assert "the plan is bound to a source with fingerprint" in capsys.readouterr().err


def test_fresh_leaves_come_from_the_target(foreign, capsys):
    assert main(["transplant", "foreign.npz", "wider.json", "out"]) == 1
    assert "2 leaves of the plan are fresh, and nothing says their values. Add --target" in capsys.readouterr().err
    given = ["--target", "tiny:make", "--num-classes", "5"]
    assert main(["transplant", "foreign.npz", "wider.json", "out", *given, "--json"]) == 0
    rows = {row[0]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["head/fc/kernel"][1] == "(16, 5)"
    assert main(["transplant", "foreign.npz", "wider.json", "again", "--target", "out"]) == 0
    assert tj.io.diff(tj.io.open("out"), tj.io.open("again")).metadata["equal"]


def test_a_missing_plan_says_how_one_is_made(foreign, capsys):
    assert main(["transplant", "foreign.npz", "nowhere.json", "out"]) == 1
    expected = "there is no plan at 'nowhere.json'. Write one: transferjax plan SRC TARGET --output nowhere.json"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("tuning", ["head", "lora:2"])
def test_a_run_is_exported_under_the_names_of_its_weights(finetune, bases, capsys, tuning):
    assert finetune("--weights", bases[0], tuning=tuning) == 0
    assert main(["export", "run", "tuned.safetensors"]) == 0
    report = tj.io.diff(tj.io.open(bases[0]), tj.io.open("tuned.safetensors"))
    changed = {row[0] for row in report.rows if row[1] == "values"}
    assert changed and changed <= {"head/fc/bias", "head/fc/kernel", "stem/kernel"}
    assert "stem/kernel" not in changed or tuning != "head"
    assert main(["export", "run", "tuned.safetensors"]) == 1
    assert "tuned.safetensors' exists" in capsys.readouterr().err


def test_a_run_without_a_file_of_weights_has_no_names_to_go_back_to(finetune, capsys):
    assert finetune() == 0
    assert main(["export", "run", "out.npz"]) == 1
    assert "the run 'run' started from no file of weights, so there are no names to go back to." in (
        capsys.readouterr().err
    )
