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
    error = capsys.readouterr().err
    assert "the plan is bound to a source with fingerprint" in error
    assert "or make the plan again without --bind." in error and "with_source" not in error


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


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("foreign.npz", "'foreign.npz' is no text. Expected a plan, in JSON as `transferjax plan --output` writes it"),
        ("rules.json", "in 'rules.json': the JSON is no plan"),
    ],
)
def test_another_file_in_the_place_of_a_plan_is_named(foreign, workplace, capsys, plan, message):
    (workplace / "rules.json").write_text("[]")
    for arguments in (["transplant", "foreign.npz", plan, "out"], ["export", "foreign.npz", "out.npz", "--plan", plan]):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


def test_a_plan_that_may_not_be_read_says_so(foreign, monkeypatch, capsys):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refused)
    assert main(["transplant", "foreign.npz", "plan.json", "out"]) == 1
    assert "'plan.json' cannot be read: Permission denied. Expected a plan" in capsys.readouterr().err


def test_a_number_of_classes_without_a_target_is_not_ignored(foreign, capsys):
    assert main(["transplant", "foreign.npz", "plan.json", "out", "--num-classes", "2"]) == 1
    assert "--num-classes is for --target, which is not given. Add that, or leave it out." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["transplant", "foreign.npz", "plan.json", "foreign.npz"], "SRC, 'foreign.npz'"),
        (["transplant", "foreign.npz", "plan.json", "./plan.json"], "PLAN, 'plan.json'"),
        (["transplant", "foreign.npz", "plan.json", "."], "SRC, 'foreign.npz'"),
        (["transplant", "foreign.npz", "plan.json", "base1.npz", "--target", "base1.npz"], "--target, 'base1.npz'"),
        (["export", "base1.npz", "base1.npz", "--plan", "plan.json"], "SRC, 'base1.npz'"),
        (["export", "base1.npz", "plan.json", "--plan", "plan.json"], "--plan, 'plan.json'"),
    ],
)
def test_what_is_read_is_never_replaced(foreign, workplace, capsys, arguments, named):
    contents = lambda: {path.name: path.read_bytes() for path in workplace.iterdir() if path.is_file()}
    before = contents()
    assert main([*arguments, "--overwrite"]) == 1
    assert f"would replace {named}, which is never overwritten. Choose another path." in capsys.readouterr().err
    assert contents() == before


def test_what_only_shares_its_name_with_a_target_may_be_written(foreign, capsys):
    import tiny

    given = ["--target", "tiny:make", "--num-classes", "5"]
    assert main(["transplant", "foreign.npz", "wider.json", "tiny:make", *given]) == 0
    assert tj.io.diff(tj.io.open("tiny:make"), tiny.make(5, (), 8)).metadata.get("only in b") is None


def test_options_are_named_as_on_the_command_line(foreign, capsys):
    assert main(["transplant", "foreign.npz", "plan.json", "out.npz"]) == 0
    assert main(["transplant", "foreign.npz", "plan.json", "out.npz"]) == 1
    error = capsys.readouterr().err
    assert "out.npz' exists" in error and "--overwrite" in error and "overwrite=True" not in error
    assert main(["transplant", "foreign.npz", "plan.json", "out.npz", "--overwrite"]) == 0
    assert main(["transplant", "foreign.npz", "plan.json", "new.npz", "--format", "msgpack"]) == 1
    error = capsys.readouterr().err
    assert "--format msgpack was asked for. Leave --format out" in error and "format=" not in error
    assert main(["export", "out.npz", "back.npz", "--plan", "plan.json", "--leave-out", "zz.*"]) == 1
    assert "--leave-out 'zz.*' selects none of the" in capsys.readouterr().err


def test_a_checkpoint_is_exported_with_a_plan_only(bases, capsys):
    assert main(["export", bases[0], "out.npz"]) == 1
    expected = "'base0.npz' is no run directory. Add --plan, the plan that led to the names of a checkpoint."
    assert expected in capsys.readouterr().err
    assert main(["export", "nowhere", "out.npz"]) == 1
    error = capsys.readouterr().err
    assert "Expected a directory that `transferjax finetune --output` made." in error and "Run.create" not in error


def test_what_has_no_inverse_is_told_without_python(bases, workplace, capsys):
    import tiny

    np.savez("bare.npz", **{"stem/kernel": np.load(bases[0])["stem/kernel"]})
    made = tj.surgery.plan(tj.io.open("bare.npz").shapes, tiny.make(2, (), 8), fresh("head/fc/**"))
    (workplace / "bare.json").write_text(made.to_json())
    assert main(["export", bases[0], "back.npz", "--plan", "bare.json"]) == 1
    error = capsys.readouterr().err
    assert (
        "the plan has no inverse" in error and "Leave leaves out: --leave-out GLOB." in error and "Move(" not in error
    )
    assert main(["export", bases[0], "back.npz", "--plan", "bare.json", "--leave-out", "head/fc/*"]) == 0
    assert list(tj.io.open("back.npz")) == ["stem/kernel"]


@pytest.mark.parametrize("tuning", ["head", "lora:2"])
def test_a_run_is_exported_under_the_names_of_its_weights(finetune, bases, workplace, capsys, tuning):
    assert finetune("--weights", bases[0], tuning=tuning) == 0
    assert main(["export", "run", "tuned.safetensors"]) == 0
    report = tj.io.diff(tj.io.open(bases[0]), tj.io.open("tuned.safetensors"))
    changed = {row[0] for row in report.rows if row[1] == "values"}
    assert changed and changed <= {"head/fc/bias", "head/fc/kernel", "stem/kernel"}
    assert "stem/kernel" not in changed or tuning != "head"
    assert main(["export", "run", "tuned.safetensors"]) == 1
    assert "tuned.safetensors' exists" in capsys.readouterr().err
    before = (workplace / bases[0]).read_bytes()
    for output, read in ((bases[0], "the weights of the run, '"), ("run", "SRC, 'run'")):
        assert main(["export", "run", output, "--overwrite"]) == 1
        assert f"OUT '{output}' would replace {read}" in capsys.readouterr().err
    assert (workplace / bases[0]).read_bytes() == before and (workplace / "run" / "config.json").is_file()


def test_a_run_without_a_file_of_weights_has_no_names_to_go_back_to(finetune, capsys):
    assert finetune() == 0
    assert main(["export", "run", "out.npz"]) == 1
    assert "the run 'run' started from no file of weights, so there are no names to go back to." in (
        capsys.readouterr().err
    )
