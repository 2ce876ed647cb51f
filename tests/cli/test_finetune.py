"""finetune: a run directory with everything in it; resuming gives the same bits; what does not fit raises."""

import json
import os
import pathlib

import numpy as np
import pytest

import transferjax as tj
from transferjax.cli import main


def last_weights(run="run"):
    path = tj.io.Run.open(run)
    manifest = json.loads((path.path / "checkpoints" / str(path.latest) / "manifest.json").read_text())
    return {name: leaf.get("sha256") for name, leaf in manifest["body"]["leaves"].items()}


def test_a_run_leaves_everything_behind(finetune, capsys):
    assert finetune("--validation", "train[:4]", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    values = dict(report["rows"])
    assert values["steps"] == 6 and values["trainable parameters"] == 16 * 2 + 2
    assert 0 <= values["validation accuracy"] <= 1
    assert sorted(os.listdir("run")) == ["checkpoints", "config.json", "curves.png", "metrics.jsonl", "report.md"]
    run = tj.io.Run.open("run")
    assert run.steps == (3, 6) and [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert "validation/accuracy" in run.metrics()[2] and "validation/accuracy" not in run.metrics()[1]
    assert run.config["class_names"] == ["dark", "light"]


def test_progress_is_plain_lines_where_there_is_no_terminal(finetune, capsys):
    assert finetune() == 0
    error = capsys.readouterr().err
    assert error.startswith("finetune: training, 6 steps (the first one compiles)\n")
    assert "finetune: step 6 of 6, loss " in error


@pytest.mark.parametrize("tuning", ["full", "last:1", "head+lora:2", "head+train:stem/**"])
def test_every_tuning_trains(finetune, tuning):
    assert finetune("--learning-rate", "3e-3", tuning=tuning) == 0


def test_every_option_of_the_objective_is_accepted(finetune):
    assert finetune("--augment", "flip,crop,resized-crop,mixup,cutmix", "--label-smoothing", "0.1") == 0
    assert np.isfinite([row["loss"] for row in tj.io.Run.open("run").metrics()]).all()


def test_a_plan_is_kept_when_weights_come_from_a_file(finetune, bases):
    assert finetune("--weights", bases[0]) == 0
    assert len(tj.io.Run.open("run").plan.moves) == 3


def test_resuming_ends_with_the_same_weights_and_log(finetune, monkeypatch):
    assert finetune(tuning="head+lora:2") == 0
    original = tj.io.Run.save

    def interrupted(self, state, *rest, **options):
        original(self, state, *rest, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tj.io.Run, "save", interrupted)
        assert finetune(output="stopped", tuning="head+lora:2") == 130
    assert tj.io.Run.open("stopped").latest == 3
    assert main(["finetune", "--resume", "--output", os.path.abspath("stopped")]) == 0
    assert last_weights("stopped") == last_weights("run")
    assert tj.io.Run.open("stopped").metrics() == tj.io.Run.open("run").metrics()


def test_resuming_a_finished_run_reports_again(finetune, capsys):
    assert finetune() == 0
    before = last_weights()
    report = pathlib.Path("run/report.md").read_text()
    assert main(["finetune", "--resume", "--output", "run", "--json"]) == 0
    assert dict(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"])["steps"] == 6
    assert last_weights() == before
    assert pathlib.Path("run/report.md").read_text() == report
    os.remove("run/report.md")
    assert main(["finetune", "--resume", "--output", "run"]) == 0
    assert os.path.exists("run/report.md")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", "1"), "was started with --seed 0, not 1 (another seed)"),
        (("--tuning", "full"), "was started with --tuning head, not full (another tuning)"),
        (("--batch-size", "2"), "was started with --batch-size 4, not 2 (another batch size)"),
        (("--weights", "base1.npz"), "was trained on another base"),
    ],
)
def test_resuming_into_something_else_raises(finetune, bases, options, message, capsys):
    assert finetune("--weights", bases[0]) == 0
    assert main(["finetune", "--resume", "--output", "run", *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("transferjax finetune: ") and message in error


def test_other_images_under_the_same_name_raise(finetune, photos, capsys):
    assert finetune() == 0
    (photos / "dark/0.png").unlink()
    assert main(["finetune", "--resume", "--output", "run"]) == 1
    assert "the state was taken with fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tuning", "train:heda/**"), "selector 'heda/**' matched none"),
        (("--tuning", "head+train:head/**"), "is claimed by the groups"),
        (("--tuning", "head+lora:2", "--learning-rate", "head=1e-3"), "gives none for the group 'lora'"),
        (("--learning-rate", "lora=1e-3"), "--learning-rate names the group 'lora'"),
        (("--data", "folder:nowhere"), "nowhere"),
        (("--split", "trian"), "trian"),
        (("--batch-size", "100"), "a batch of 100 is larger than the data"),
        (("--batch-size", "100"), "Use a smaller --batch-size."),
        (("--validation", "tset"), "tset"),
        (("--model", "efficientnet_lite9"), "no model is called 'efficientnet_lite9'"),
        (("--model", "nothing:here"), "'nothing:here' cannot be imported"),
        (("--model", "tiny:nothing"), "'tiny:nothing' cannot be imported"),
        (("--model", "tiny:broken"), "tiny:broken returned dict; expected a transferjax.Model"),
        (("--weights", "nowhere.npz"), "there is nothing at"),
    ],
)
def test_mistakes_end_with_one_clear_line_and_no_run(finetune, options, message, capsys):
    assert finetune(*options) == 1
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error
    assert not os.path.exists("run")


def test_data_must_be_named(workplace, capsys):
    assert main(["finetune", "--output", "run"]) == 1
    assert "--data is missing" in capsys.readouterr().err


def test_a_directory_in_use_is_left_alone(finetune, capsys):
    assert finetune() == 0
    assert finetune() == 1
    assert "already holds a run. Go on with --resume, or choose another --output" in capsys.readouterr().err


def test_a_foreign_run_cannot_be_resumed(workplace, capsys):
    tj.io.Run.create("other", {"seed": 0})
    assert main(["finetune", "--resume", "--output", "other"]) == 1
    assert "was not made by `transferjax finetune`" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_raises(finetune, workplace, capsys):
    (workplace / "file").write_text("")
    assert finetune(output="file/run") == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_damaged_image_is_named_and_left_out_when_asked(finetune, photos, capsys):
    (photos / "dark/0.png").write_bytes(b"no image")
    assert finetune("--size", "8", "--batch-size", "12") == 1
    error = capsys.readouterr().err
    assert "0.png" in error and "write --on-error skip to go on without them" in error
    assert not os.path.exists("run")
    assert finetune("--size", "8", "--on-error", "skip", output="skipping") == 0
    assert "left out 1 damaged images" in capsys.readouterr().err


def test_what_happens_with_damaged_images_may_change_on_resuming(finetune, photos, capsys):
    (photos / "dark/0.png").write_bytes(b"no image")
    assert finetune("--on-error", "skip") == 0
    assert main(["finetune", "--resume", "--output", "run", "--on-error", "skip"]) == 0
    assert main(["finetune", "--resume", "--output", "run", "--on-error", "raise"]) == 1
    assert "damaged ones among them are left out now" in capsys.readouterr().err


@pytest.mark.parametrize("tuning", ["head", "lora:2", "head+lora:2"])
def test_the_head_of_another_model_is_the_layer_it_uses_last(finetune, tuning):
    assert finetune("--model", "tiny:other_names", tuning=tuning) == 0
    learnt = set(last_weights())
    head = {"trainable/head/a_last/bias", "trainable/head/a_last/kernel"}
    assert head <= learnt if "head" in tuning else not any("a_last" in name for name in learnt)
    assert any(name.startswith("trainable/lora/z_first/kernel") for name in learnt) == ("lora" in tuning)


def test_without_matplotlib_there_is_no_picture_but_a_note(finetune, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert finetune() == 0
    assert "no curves.png: figures need matplotlib" in capsys.readouterr().err
    assert not os.path.exists("run/curves.png")
