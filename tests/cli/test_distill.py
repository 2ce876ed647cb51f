"""distill: a student learns what a teacher says, in a run directory that every other verb takes."""

import json
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.cli import main

TEACHERS = """
import jax
import jax.numpy as jnp
import tiny
import transferjax as tj

calls = []

def counting(num_classes):
    def apply(params, inputs):
        jax.debug.callback(lambda: calls.append(1))
        return tiny.apply(params, inputs)
    model = tiny.make(num_classes)
    return tj.interop.pure(apply, model.params, preprocess=model.preprocess)

def wide(num_classes):
    return tiny.make(num_classes + 1)

def blind(num_classes):
    return tj.interop.pure(lambda params, inputs: inputs.reshape(len(inputs), -1) @ params, jnp.ones((5, num_classes)))
"""


@pytest.fixture
def teachers(photos, workplace):
    """A module of networks that teach, or cannot."""
    (workplace / "teachers.py").write_text(TEACHERS)
    yield "teachers"
    sys.modules.pop("teachers", None)


@pytest.fixture
def teacher(finetune, capsys):
    """The directory of a run that can teach."""
    assert finetune("--epochs", "4", "--learning-rate", "1e-2", output="teacher", tuning="full") == 0
    capsys.readouterr()
    return "teacher"


def distill(*options, teacher="tiny:make", output="run"):
    given = ["--student", "tiny:make", "--data", "folder:photos", "--batch-size", "4", "--epochs", "2"]
    return main(["distill", "--teacher", teacher, *given, "--output", output, *options])


def report_of(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def last_weights(run="run"):
    path = tj.io.Run.open(run)
    manifest = json.loads((path.path / "checkpoints" / str(path.latest) / "manifest.json").read_text())
    return {name: leaf.get("sha256") for name, leaf in manifest["body"]["leaves"].items()}


def test_the_report_has_the_student_beside_its_teacher(teacher, capsys):
    assert distill("--teacher", teacher, "--validation", "train", "--learning-rate", "1e-2", "--json") == 0
    report = report_of(capsys)
    rows = dict(report["rows"])
    assert report["title"] == "Distilled tiny:make" and report["metadata"]["temperature"] == 4.0
    assert rows["trainable parameters"] == rows["teacher parameters"] == 192 * 16 + 16 * 2 + 2
    assert rows["validation agreement"] >= 0.75 and rows["steps"] == 6
    for run, name in (("run", "validation accuracy"), ("teacher", "teacher validation accuracy")):
        assert main(["evaluate", run, "--split", "train", "--json"]) == 0
        assert dict(report_of(capsys)["rows"])["accuracy"] == pytest.approx(rows[name])
    assert sorted(os.listdir("run")) == ["checkpoints", "config.json", "curves.png", "metrics.jsonl", "report.md"]
    assert {"accuracy", "agreement", "distillation"} <= set(tj.io.Run.open("run").metrics()[0])


def test_the_loss_is_that_of_the_formula(teacher, capsys):
    options = ["--student", "tiny:other_names", "--batch-size", "12", "--epochs", "1", "--warmup", "0"]
    assert distill("--teacher", teacher, *options, "--alpha", "0.75", "--temperature", "2") == 0
    import tiny

    source = tj.data.open("folder:photos", "train")
    batch = next(iter(tj.data.batches(source, 12, shuffle=False)))
    run = tj.io.Run.open("teacher")
    params = tj.tree.nest({
        path.removeprefix("trainable/full/"): leaf
        for path, leaf in tj.paths(tj.io.load(run.path / "checkpoints" / str(run.latest) / "arrays")).items()
        if path.startswith("trainable")
    })  # fmt: skip
    theirs = tj.data.on_images(tiny.make(2)).apply(params, {}, batch["inputs"])[0]
    student = tiny.other_names(2)
    own = student.apply(student.params, {}, batch["inputs"])[0]
    soft = lambda logits: jax.nn.log_softmax(logits / 2)
    kd = 4 * jnp.mean(jnp.sum(jnp.exp(soft(theirs)) * (soft(theirs) - soft(own)), axis=-1))
    labels = jnp.mean(-jax.nn.log_softmax(own)[jnp.arange(12), batch["labels"]])
    assert tj.io.Run.open("run").metrics()[0]["loss"] == pytest.approx(float(0.75 * kd + 0.25 * labels), rel=1e-4)


@pytest.mark.parametrize("loss", ["kd", "dkd", "dist", "logit-standardised-kd", "hard"])
def test_every_loss_teaches_without_labels(bases, capsys, loss):
    given = ["--loss", loss, "--alpha", "1", "--learning-rate", "1e-2", "--epochs", "4", "--weights", bases[1]]
    assert distill(*given) == 0
    metrics = tj.io.Run.open("run").metrics()
    assert "accuracy" not in metrics[0] and metrics[-1]["distillation"] < metrics[0]["distillation"]
    assert "training agreement, last batch" in capsys.readouterr().out


def test_the_largest_logits_are_enough(photos, capsys):
    assert distill("--top-k", "1", "--label-smoothing", "0.1", "--json") == 0
    assert report_of(capsys)["metadata"]["top_k"] == 1
    assert distill("--top-k", "3", output="more") == 1
    assert "top_k() expects k from 1 to 2, the number of classes" in capsys.readouterr().err


@pytest.mark.parametrize("variants", [1, 2])
def test_the_teacher_looks_once_at_each_variant(teachers, variants):
    options = ["--augment", "flip,crop", "--variants", str(variants), "--epochs", "4"]
    assert distill(*options, teacher="teachers:counting") == 0
    import teachers as module

    jax.effects_barrier()
    assert len(module.calls) == 3 * variants  # batches of an epoch


def stopped(monkeypatch, method, number, *options):
    """A run that is interrupted when a method of its directory is called so many times."""
    original, left = getattr(tj.io.Run, method), [number]

    def interrupted(self, *given, **named):
        original(self, *given, **named)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tj.io.Run, method, interrupted)
        assert distill(*options, output="stopped") == 130


@pytest.mark.parametrize(("method", "number"), [("save", 1), ("log", 8)])
def test_resuming_ends_with_the_same_weights_and_log(photos, monkeypatch, method, number):
    options = ["--augment", "resized-crop,flip", "--variants", "2", "--epochs", "4", "--validation", "train[:4]"]
    assert distill(*options) == 0
    stopped(monkeypatch, method, number, *options)
    assert os.listdir("stopped/teacher") and tj.io.Run.open("stopped").latest == {"save": 3, "log": 6}[method]
    assert main(["distill", "--resume", "--output", "stopped"]) == 0
    assert last_weights("stopped") == last_weights("run")
    assert tj.io.Run.open("stopped").metrics() == tj.io.Run.open("run").metrics()
    assert not os.path.exists("stopped/teacher")


def test_what_the_teacher_said_before_a_checkpoint_is_not_asked_again(teachers, monkeypatch):
    stopped(monkeypatch, "save", 1, "--teacher", "teachers:counting", "--epochs", "3")
    import teachers as module

    jax.effects_barrier()
    before = len(module.calls)
    assert main(["distill", "--resume", "--output", "stopped"]) == 0
    jax.effects_barrier()
    assert len(module.calls) == before == 3


def test_resuming_with_another_teacher_raises_and_one_that_moved_is_found(teacher, finetune, monkeypatch, capsys):
    stopped(monkeypatch, "save", 1, "--teacher", teacher)
    assert finetune(output="other") == 0
    shutil.move("teacher", "moved")
    assert main(["distill", "--resume", "--output", "stopped"]) == 1
    assert "neither a run directory nor a model of the zoo" in capsys.readouterr().err
    assert main(["distill", "--resume", "--output", "stopped", "--teacher", "other"]) == 1
    assert "is another one than the run was started with: its fingerprint is" in capsys.readouterr().err
    assert main(["distill", "--resume", "--output", "stopped", "--student", "tiny:fixed"]) == 1
    assert "was started with --student tiny:make, not tiny:fixed (another student)" in capsys.readouterr().err
    assert main(["distill", "--resume", "--output", "stopped", "--temperature", "3"]) == 1
    assert "was started with --temperature 4.0, not 3.0" in capsys.readouterr().err
    assert main(["distill", "--resume", "--output", "stopped", "--teacher", "moved"]) == 0


def test_runs_of_both_verbs_are_told_apart(teacher, capsys):
    assert main(["distill", "--resume", "--output", "teacher"]) == 1
    assert "teacher' was not made by `transferjax distill`: no teacher in it." in capsys.readouterr().err
    assert distill() == 0
    assert main(["finetune", "--resume", "--output", "run"]) == 1
    expected = "run' learns from a teacher. Go on with it by `transferjax distill`."
    assert expected in capsys.readouterr().err


def test_other_verbs_take_the_run_without_its_teacher_and_it_teaches_in_turn(bases, capsys):
    assert distill("--teacher-weights", bases[1], "--weights", bases[0], "--tuning", "head+lora:2") == 0
    os.remove(bases[1])
    assert main(["predict", "run", "photos/dark/0.png"]) == 0
    assert "photos/dark/0.png" in capsys.readouterr().out
    assert main(["export", "run", "student.safetensors"]) == 0
    assert set(tj.io.open("student.safetensors")) == set(tj.io.open(bases[0]))
    assert distill(teacher="run", output="pupil") == 0


def test_weights_make_a_teacher_of_a_function_or_a_model_of_the_zoo(bases, capsys):
    assert distill("--teacher-weights", bases[1], "--json", teacher="tiny:make") == 0
    assert report_of(capsys)["metadata"]["teacher"] == "tiny:make"
    model = tj.models.create("convnet_small", num_classes=2, key=jax.random.key(0))
    tj.io.save("zoo.safetensors", tj.surgery.leaves(model))
    given = ["--teacher-weights", "zoo.safetensors", "--epochs", "1", "--validation", "train"]
    assert distill(*given, teacher="convnet_small", output="zoo") == 0
    assert "teacher validation accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("nowhere", (), "there is no teacher 'nowhere': neither a run directory nor a model of the zoo."),
        ("efficientnet_lite9", (), "Nearest: efficientnet_lite0"),
        ("convnet_small", ("--teacher-weights", "none"), "convnet_small without weights has nothing to teach."),
        ("efficientnet_lite0", (), "the weights of efficientnet_lite0 have no outputs for the 2 classes of folder:"),
        ("teachers:wide", (), "the teacher gives (1, 3) for one image, and folder:"),
        ("teachers:blind", (), "the teacher cannot take images of (8, 8, 3): "),
        ("tiny:nothing", (), "'tiny:nothing' cannot be imported"),
        (
            "tiny:make",
            ("--temperature", "2", "--loss", "hard"),
            "--temperature would do nothing: --loss hard has none.",
        ),
        ("tiny:make", ("--top-k", "1", "--loss", "dist"), "--top-k is for --loss kd; dist needs all logits."),
        ("tiny:make", ("--label-smoothing", "0.1", "--alpha", "1"), "--label-smoothing would do nothing: with --alpha"),
        ("tiny:make", ("--augment", "flip,mixup"), "--augment mixup mixes images, so that what a teacher says of one"),
        ("tiny:make", ("--variants", "2"), "--variants 2 are all the same without --augment. Add that, or leave it"),
        ("tiny:make", ("--batch-size", "100"), "a batch of 100 is larger than the data"),
        ("tiny:make", ("--tuning", "train:heda/**"), "selector 'heda/**' matched none"),
    ],
)
def test_what_does_not_fit_ends_with_one_clear_line_and_no_run(teachers, given, options, message, capsys):
    assert distill(*options, teacher=given) == 1
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and error.count("\n") == 1
    assert not os.path.exists("run")


def test_a_teacher_of_other_classes_raises(teacher, photos, capsys):
    (photos / "dark").rename(photos / "dim")
    assert distill("--teacher", teacher) == 1
    assert "the teacher knows other classes (dark, light) than folder:" in capsys.readouterr().err


def test_a_teacher_must_be_named_and_options_make_sense(workplace, capsys):
    assert main(["distill", "--data", "folder:photos", "--output", "run"]) == 1
    assert "--teacher is missing. Expected a directory that `transferjax finetune` made" in capsys.readouterr().err
    for option, value in (("--alpha", "0"), ("--temperature", "-1"), ("--alpha", "2")):
        assert main(["distill", "--output", "run", option, value]) == 2
        assert f"expected a number above 0{', up to 1' * (option == '--alpha')}, got" in capsys.readouterr().err


def test_images_have_the_size_of_the_network_that_sees_more(finetune):
    assert finetune("--size", "16", output="sharp") == 0
    from transferjax.cli._distillation import distillation

    run = tj.io.Run.open("sharp")
    more = {"teacher": os.path.abspath("sharp"), "teacher_weights": "auto", "augment": "", "alpha": 1.0, "loss": "kd"}
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    recipe = distillation({**run.config, **more, "size": 4}, images)
    source = tj.data.arrays(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64))
    shape = lambda **options: next(iter(recipe.batches(source, **options)))["inputs"].shape
    assert shape(train=True) == (4, 16, 16, 3) and shape(train=False) == (4, 4, 4, 3)
