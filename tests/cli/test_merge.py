"""merge: several files become one, as the functions of tj.merging make it of whole trees."""

import json
import pathlib

import jax
import numpy as np
import pytest

import transferjax as tj
from transferjax.cli import main
from transferjax.cli._merge import METHODS

TORCH = str(pathlib.Path(__file__).parent.parent / "fixtures" / "torch" / "nested.pth")
LISTED = [0.75, 0.25]
CASES = {
    "soup": (["--weights", "0.75,0.25"], lambda m, base, models: m.soup(models, LISTED)),
    "task-arithmetic": (
        ["--weights=-1,0.5", "--scale", "2"],
        lambda m, base, models: m.task_arithmetic(base, models, [-1.0, 0.5], 2.0),
    ),
    "ties": (["--density", "0.5"], lambda m, base, models: m.ties(base, models, density=0.5)),
    "dare": (
        ["--density", "0.5", "--seed", "3", "--scale", "0.5"],
        lambda m, base, models: m.dare(base, models, None, 0.5, jax.random.key(3), scale=0.5),
    ),
    "breadcrumbs": (["--gamma", "0.1"], lambda m, base, models: m.breadcrumbs(base, models, gamma=0.1)),
    "slerp": (["--alpha", "0.3"], lambda m, base, models: m.slerp(*models, 0.3)),
    "karcher": (["--weights", "0.75,0.25"], lambda m, base, models: m.karcher(models, LISTED)),
    "model-stock": ([], lambda m, base, models: m.model_stock(base, models)),
    "wise-ft": (["--alpha", "0.25"], lambda m, base, models: m.wise_ft(base, models[0], 0.25)),
}


@pytest.fixture
def files(workplace):
    """A base and two models of it in three formats, and the trees that they hold."""
    rng = np.random.default_rng(0)
    tree = lambda: {"kernel": rng.normal(size=(6, 4)).astype(np.float32), "steps": np.array(7)}
    trees = [tree() for _ in range(3)]
    names = ["base.npz", "a.safetensors", "b"]
    for name, one in zip(names, trees):
        tj.io.save(name, {"head": one})
    return names, [{"head": one} for one in trees]


def merge(*arguments, output="out.npz"):
    return main(["merge", *arguments, "--output", output])


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_what_the_function_makes_of_whole_trees(files, capsys, method):
    (base, *models), trees = files
    options, expected = CASES[method]
    models = models[:1] if method == "wise-ft" else models
    given = ["--base", base] if METHODS[method].base else []
    assert merge(method, *models, *given, *options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    wanted = expected(tj.merging, trees[0], trees[1:])
    found = tj.io.load("out.npz")
    assert jax.tree.all(jax.tree.map(np.array_equal, found, wanted))
    assert report["title"] == f"Merged {len(models)} checkpoints by {method}"


def test_the_report_and_the_file_say_what_was_merged_and_how(files, workplace, capsys):
    (base, *models), _ = files
    assert merge("ties", *models, "--base", base, "--weights", "1,0.5", "--json", output="out.safetensors") == 0
    report = json.loads(capsys.readouterr().out)
    facts = dict(report["rows"])
    prints = {name: tj.io.open(path).fingerprint() for name, path in zip(("base", "model 0", "model 1"), files[0])}
    assert {name: facts[f"fingerprint of {name}"] for name in prints} == prints
    assert (facts["weights"], facts["density"], facts["scale"]) == ("1, 0.5", 0.2, 1.0)
    assert (facts["leaves"], facts["parameters"], facts["bytes"], facts["model 1"]) == (2, 25, 104, "b")
    assert report["metadata"]["path"] == str(workplace / "out.safetensors")
    written = tj.io.open("out.safetensors")
    options = {"weights": [1.0, 0.5], "density": 0.2, "scale": 1.0}
    assert written.metadata["merge"] == {"method": "ties", "options": options, "sources": prints}
    assert facts["fingerprint"] == written.fingerprint()


def test_files_of_torch_are_read_and_written_as_safetensors(workplace, capsys):
    assert merge("soup", TORCH, TORCH, output="out.safetensors") == 0
    assert tj.io.diff(tj.io.open(TORCH), tj.io.open("out.safetensors")).metadata["equal"]
    assert merge("soup", TORCH, TORCH, output="out.pth") == 1
    assert "out.pth' ends with .pth, which is not written here. Expected .safetensors" in capsys.readouterr().err
    assert merge("soup", TORCH, TORCH, "--format", "npz", output="out.msgpack") == 1
    assert "Leave --format out" in capsys.readouterr().err
    assert merge("soup", TORCH, TORCH, output="folder") == 0
    assert tj.io.open("folder").format == "orbax"


def test_counters_that_differ_are_left_out_when_asked(files, capsys):
    (_, a, _), _ = files
    tj.io.save("later.npz", {"head": {"kernel": np.zeros((6, 4), np.float32), "steps": np.array(8)}})
    assert merge("soup", a, "later.npz") == 1
    error = capsys.readouterr().err
    assert "'head/steps'" in error and error.endswith("are not merged. Leave it out: --leave-out GLOB.\n")
    assert merge("soup", a, "later.npz", "--leave-out", "*/steps") == 0
    assert list(tj.io.open("out.npz")) == ["head/kernel"]
    assert merge("soup", a, "later.npz", "--leave-out", "*/stepz", "--overwrite") == 1
    assert "selector '*/stepz' matched none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["soup", "a", "b", "--density", "0.2"], "soup takes no --density: it takes --weights. Leave --density out."),
        (["soup", "a", "b", "--base", "base.npz"], "soup takes no --base: it takes --weights. Leave --base out."),
        (["ties", "a", "b", "--base", "c", "--seed", "0"], "ties takes no --seed: it takes --base, --weights, --dens"),
        (["ties", "a", "b"], "ties needs the weights that the models were tuned from. Add --base."),
        (["soup", "a"], "soup merges 2 or more of CHECKPOINT; there are 1."),
        (["slerp", "a", "b", "c"], "slerp merges 2 of CHECKPOINT; there are 3."),
        (["wise-ft", "a", "b", "--base", "c"], "wise-ft merges 1 of CHECKPOINT, and --base; there are 2."),
        (["soup", "a.safetensors", "b", "--weights", "0.5,0.6"], "weights that sum to 1.1. Expected a sum of one"),
        (["ties", "b", "--base", "base.npz", "--density", "2"], "density=2.0. Expected a share of the elements"),
        (["soup", "nowhere.npz", "b"], "there is nothing at"),
        (["soup", "b", "other.npz"], "in model 1. Expected equal shapes"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(files, workplace, capsys, arguments, message):
    np.savez("other.npz", **{"head/kernel": np.zeros((6, 5), np.float32), "head/steps": np.array(7)})
    assert merge(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (workplace / "out.npz").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tise", "a"], "invalid choice: 'tise'"),
        (["soup", "a", "b", "--weights", "1,x"], "expected a number, got 'x'"),
        (["soup", "a", "b", "--scale", "inf"], "expected a number, got 'inf'"),
    ],
)
def test_arguments_that_make_no_sense_end_with_2(options, message, capsys):
    assert merge(*options) == 2
    assert message in capsys.readouterr().err


def test_what_is_read_is_never_replaced_and_other_files_only_when_asked(files, capsys):
    (base, *models), _ = files
    before = pathlib.Path(base).read_bytes()
    assert merge("ties", *models, "--base", base, "--overwrite", output=base) == 1
    assert "--output 'base.npz' would replace base, 'base.npz', which is never overwritten." in capsys.readouterr().err
    assert merge("soup", *models, "--overwrite", output=models[1]) == 1
    assert "--output 'b' would replace model 1, 'b'" in capsys.readouterr().err
    assert pathlib.Path(base).read_bytes() == before
    assert merge("soup", *models) == 0 and merge("soup", *models) == 1
    assert "out.npz' exists" in capsys.readouterr().err
    assert merge("soup", *models, "--overwrite") == 0
