"""``transferjax finetune``: teach a pretrained network your classes."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

from transferjax.cli._arguments import count, fraction, natural, verb
from transferjax.cli._console import note, progress, show
from transferjax.cli._sweeping import SWEEP_HELP, sweep_text
from transferjax.cli._tuning import ALLOWED, OPTIMIZERS, rates_text, tuning_text

DEFAULTS: dict[str, Any] = {
    "model": "efficientnet_lite0",
    "weights": "auto",
    "data": None,
    "data_dir": None,
    "split": "train",
    "validation": "",
    "tuning": "head",
    "learning_rate": None,
    "optimizer": "adam",
    "warmup": 0.1,
    "epochs": 5,
    "batch_size": 32,
    "seed": 0,
    "size": None,
    "label_smoothing": 0.0,
    "augment": "",
    "on_error": "raise",
    "quantise": "",
    "hoist": None,
}
AUGMENTATIONS = ("flip", "crop", "resized-crop", "mixup", "cutmix")
MOVABLE = ("weights", "data", "data_dir", "on_error", "teacher", "teacher_weights")
"""Places of files may move between a run and its resumption, since their contents are compared; what to do with a
damaged image may change, since the images that remain are compared too."""


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "finetune",
        run,
        "teach a pretrained network your classes",
        "Takes a network with pretrained weights, replaces its last layer by one for your classes, and trains the\n"
        "part that --tuning names. Everything is kept in the directory --output: settings, metrics, checkpoints, a\n"
        "report.\n"
        "A run that was stopped goes on with --resume, and ends with the same weights as one that was not.\n"
        "With --sweep several runs share one program, one frozen network and one pass over the data; the best is kept.",
        "  transferjax finetune --data sample --validation test --size 64 --tuning head --output runs/first\n"
        "  transferjax finetune --data folder:photos --tuning head+lora:8 --learning-rate head=1e-2,lora=1e-3 \\\n"
        "      --augment flip,crop --output runs/photos\n"
        "  transferjax finetune --data sample --validation test --sweep lr=1e-4..1e-2:16 --output runs/sweep\n"
        "  transferjax finetune --resume --output runs/photos",
    )
    add_inputs(parser.add_argument_group("what"))
    how = parser.add_argument_group("how")
    add_training(how)
    how.add_argument("--sweep", type=sweep_text, action="append", metavar="NAME=VALUES", help=SWEEP_HELP)
    where = parser.add_argument_group("where")
    where.add_argument("--output", required=True, metavar="DIR", help="directory of the run; must be new")
    where.add_argument(
        "--evidence", metavar="DIR", help="your own runs, which advise rests on; this one is added (none)"
    )
    where.add_argument("--resume", action="store_true", help="go on with the run in --output; needs no other option")


def add_inputs(group: Any, model: str = "--model", defaults: Mapping[str, Any] = DEFAULTS) -> None:
    """The options that say what learns from what."""
    group.add_argument("--data", metavar="SPEC", help="'sample', 'folder:PATH' (one sub-folder per class), or TFDS")
    group.add_argument("--data-dir", metavar="DIR", help="where TFDS keeps its data sets")
    group.add_argument("--split", help="training part of the data, for example 'train[:80%%]' (train)")
    group.add_argument("--validation", metavar="SPLIT", help="part to evaluate on after every epoch (none)")
    which = f"a model of the zoo, or module:function that returns a Model ({defaults['model']})"
    group.add_argument(model, dest="model", metavar="MODEL", help=which)
    weights = f"weight file, 'auto' (installed package) or 'none' ({defaults['weights']})"
    group.add_argument("--weights", metavar="PATH", help=weights)
    group.add_argument("--size", type=count, metavar="PIXELS", help="side of the images (the model's own)")
    group.add_argument("--on-error", choices=("raise", "skip"), help="what to do with a damaged image (raise)")


def add_training(group: Any) -> None:
    """The options that say how a network learns."""
    add_learning(group)
    group.add_argument("--quantise", choices=("int8", "nf4"), help="keep the frozen matrices in few bits (as they are)")
    hoisting = "compute once per image what training cannot change (when that pays)"
    group.add_argument("--hoist", action=argparse.BooleanOptionalAction, default=None, help=hoisting)


def add_learning(group: Any, defaults: Mapping[str, Any] = DEFAULTS, augment: Sequence[str] = AUGMENTATIONS) -> None:
    """Those of them that every road of transfer has."""
    tuning = f"what learns: {ALLOWED} ({defaults['tuning']})"
    group.add_argument("--tuning", type=tuning_text, metavar="PARTS", help=tuning)
    rates = "one number, or one per group: head=1e-3,lora=3e-4; a number alone is for the other groups (1e-3)"
    group.add_argument("--learning-rate", type=rates_text, metavar="RATES", help=rates)
    group.add_argument("--optimizer", choices=OPTIMIZERS, help="(adam)")
    group.add_argument("--warmup", type=fraction, metavar="SHARE", help="share of the steps in which rates rise (0.1)")
    group.add_argument("--epochs", type=count, metavar="N", help=f"passes over the data ({defaults['epochs']})")
    group.add_argument("--batch-size", type=count, metavar="N", help="images per step (32)")
    group.add_argument("--seed", type=natural, metavar="N", help="decides everything random (0)")
    group.add_argument("--label-smoothing", type=fraction, metavar="SHARE", help="spread over all classes (0)")
    group.add_argument("--augment", type=_augmentations, metavar="LIST", help=f"of {', '.join(augment)}")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli._recipe import make_recipe

    given = given_settings(arguments)
    resumed = tj.io.Run.open(arguments.output) if arguments.resume else None
    if resumed and arguments.sweep:
        raise tj.TransferError("--sweep cannot go on with --resume: a sweep is kept when it is done. Start a new one.")
    settings, source = with_classes(resumed_settings(resumed, given) if resumed else {**DEFAULTS, **given})
    if arguments.evidence and not settings["validation"]:
        raise tj.DataError("--evidence keeps what a run is worth on images it has not seen: give --validation too.")
    recipe = make_recipe(settings, first_images(source, settings))
    batches = training_batches(recipe, source)
    if arguments.sweep:
        from transferjax.cli._sweeping import sweep

        show(sweep(recipe, batches, arguments.sweep, arguments.output), arguments.json)
        return 0
    report, trained = run_in(arguments.output, recipe, batches, resumed)
    if trained and arguments.evidence:
        _record(arguments.evidence, recipe.config, report)
    show(report, arguments.json)
    return 0


def training_batches(recipe: Any, source: Any) -> Any:
    """The training images in batches, for all epochs; damaged ones that are left out are named."""
    batches = recipe.batches(source, train=True)
    if batches.skipped:
        note(f"left out {len(batches.skipped)} damaged images, with the ids {', '.join(map(str, batches.skipped[:8]))}")
    return batches


def run_in(output: str, recipe: Any, batches: Any, resumed: Any) -> tuple[Any, bool]:
    """Trains what a recipe says in a run directory, a new one or one to go on with.

    Args:
      output: the new directory.
      recipe: of the settings.
      batches: of the training images.
      resumed: the ``tj.io.Run`` to go on with, or ``None``.

    Returns:
      The report, and whether a step was taken: none is when a finished run is resumed.
    """
    import transferjax as tj

    tx = recipe.optimizer(len(batches))
    state, frozen = recipe.start(tx)  # Before anything is written: selectors and groups that do not fit raise here.
    directory = resumed or tj.io.Run.create(output, {**recipe.config, "steps": len(batches)}, recipe.plan)
    try:
        report, trained = _train(recipe, directory, batches, tx, state, frozen, bool(resumed))
    except BaseException:
        if not resumed:
            _remove_unstarted(directory)
        raise
    if trained or not (directory.path / "report.md").exists():
        directory.write_report(report)
        write_curves(directory)
    return report, trained


def given_settings(arguments: argparse.Namespace, defaults: Mapping[str, Any] = DEFAULTS) -> dict[str, Any]:
    """The settings that the command line gives, places as absolute paths."""
    given = {name: value for name in defaults if (value := getattr(arguments, name, None)) is not None}
    return {name: absolute(name, value) for name, value in given.items()}


def with_classes(settings: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The settings with the classes of their data, and the training images."""
    import transferjax as tj
    from transferjax.cli._recipe import open_split

    if settings["data"] is None:
        raise tj.DataError("--data is missing. Expected 'sample', 'folder:PATH', or the name of a TFDS data set.")
    source = open_split(settings, settings["split"])
    return {**settings, "class_names": list(source.class_names), "num_classes": _classes(source)}, source


def _remove_unstarted(directory: Any) -> None:
    """Removes a directory in which not one step was taken, so that the corrected command finds its place free."""
    if directory.latest is None and not directory.metrics():
        shutil.rmtree(directory.path, ignore_errors=True)


def _train(
    recipe: Any, directory: Any, batches: Any, tx: Any, state: Any, frozen: Any, resume: bool
) -> tuple[Any, bool]:
    """What :func:`run_in` returns, after the steps that are left."""
    import transferjax as tj
    from transferjax.cli._loop import train
    from transferjax.cli._recipe import open_split

    begin = time.perf_counter()
    config = recipe.config
    step = tj.make_step(recipe.objective(), recipe.tuning, tx)
    if resume and directory.latest is not None:
        state, batches_state = directory.restore(state, recipe.base, config["seed"])
        batches.set_state(batches_state)
        note(f"resuming after step {int(state.step)} of {len(batches)}")
    held_out = recipe.batches(open_split(config, config["validation"]), train=False) if config["validation"] else None
    evaluate = recipe.evaluation()

    def after(state: Any, metrics: dict[str, Any], ahead: Any) -> None:
        number = int(state.step)
        end = number % batches.steps_per_epoch == 0
        found = evaluate(state, frozen, held_out) if end and held_out is not None else {}
        directory.log(number, {**metrics, **{f"validation/{name}": value for name, value in found.items()}})
        if end:  # After the line is logged, so that a checkpoint never lacks its lines.
            directory.save(state, recipe.base, ahead.get_state())

    to_do, facts, kept = int(state.step) < len(batches), {}, directory.path / recipe.kept
    if to_do:
        how = recipe.running(step, state, frozen, batches, kept)
        facts = how.facts
        state = train(how.step, state, how.frozen, batches, progress(recipe.verb), after, through=how.through)
        shutil.rmtree(kept, ignore_errors=True)
    return _report(recipe, directory, state, frozen, time.perf_counter() - begin, facts), to_do


def _report(recipe: Any, directory: Any, state: Any, frozen: Any, seconds: float, hoisted: Any) -> Any:
    import transferjax as tj

    metrics = directory.metrics()
    if not metrics:
        raise tj.CheckpointError(
            f"'{directory.path}' holds the best run of a sweep, which has no steps of its own to resume. Evaluate it "
            "with `transferjax evaluate`, or start another run with --output."
        )
    last = metrics[-1]
    size = lambda tree: sum(row[3] for row in tj.summary(tree).rows)
    rows = [
        ("steps", int(state.step)),
        ("training loss", last.get("loss")),
        ("training accuracy, last batch", last.get("accuracy")),
        ("training agreement, last batch", last.get("agreement")),
        ("validation loss", last.get("validation/loss")),
        ("validation accuracy", last.get("validation/accuracy")),
        ("trainable parameters", size(state.trainable)),
        ("frozen parameters", size(frozen)),
        *recipe.rows(state, frozen),
        ("seconds", seconds),
    ]
    facts = {name: recipe.config[name] for name in ("model", "data", "tuning", "epochs", "batch_size", "seed")}
    facts = {**facts, "classes": recipe.config["num_classes"], "run": str(directory.path)}
    facts = {**facts, **recipe.facts(), **hoisted}
    title = f"{recipe.done} {recipe.config['model']}"
    return tj.Report(title, ("quantity", "value"), tuple(row for row in rows if row[1] is not None), facts)


def _record(folder: str, config: Mapping[str, Any], report: Any) -> None:
    from transferjax.cli._candidates import record_finetuned

    found = dict(report.rows)
    record_finetuned(folder, config, found["steps"], found["validation accuracy"], found["seconds"])


def write_curves(directory: Any) -> None:
    """``curves.png`` of what was logged, if it can be drawn."""
    import transferjax as tj

    try:
        figure = tj.report.curves(directory.metrics(), name=directory.path.name)
    except tj.TransferError as error:
        note(f"no curves.png: {error}")
        return
    directory.write_figure(figure)


def resumed_settings(
    directory: Any, given: Mapping[str, Any], defaults: Mapping[str, Any] = DEFAULTS, verb: str = "finetune"
) -> dict[str, Any]:
    """The settings of a run; an option that says something else raises, and so does a run of another verb."""
    import transferjax as tj

    stored = dict(directory.config)
    missing = [name for name in defaults if name not in stored]
    if missing:
        raise tj.CheckpointError(f"'{directory.path}' was not made by `transferjax {verb}`: no {missing[0]} in it.")
    if "teacher" in stored and verb != "distill":
        raise tj.CheckpointError(f"'{directory.path}' learns from a teacher. Go on with it by `transferjax distill`.")
    for name, value in given.items():
        if name not in MOVABLE and value != stored[name]:
            noun = "student" if (verb, name) == ("distill", "model") else name.replace("_", " ")
            option = "--" + noun.replace(" ", "-")
            raise tj.CheckpointError(
                f"'{directory.path}' was started with {option} {stored[name]}, not {value} (another {noun}). Leave "
                f"{option} out to resume it, or start a new run in another directory."
            )
    return {**stored, **{name: given[name] for name in MOVABLE if name in given}}


def absolute(name: str, value: Any) -> Any:
    """Places of files as absolute paths, so that the run can be used from any directory."""
    if name == "data" and value.startswith("folder:"):
        return "folder:" + os.path.abspath(os.path.expanduser(value.removeprefix("folder:")))
    if (name == "data" and value.startswith((".", "~"))) or name == "data_dir":
        return os.path.abspath(os.path.expanduser(value))
    if name == "teacher" and os.path.isfile(os.path.join(os.path.expanduser(value), "config.json")):
        return os.path.abspath(os.path.expanduser(value))
    if name in ("weights", "teacher_weights") and value not in ("auto", "none"):
        return os.path.abspath(os.path.expanduser(value))
    return value


def _classes(source: Any) -> int:
    return len(source.class_names) or int(max(source.labels())) + 1


def first_images(source: Any, settings: dict[str, Any]) -> Any:
    """The shape of one image of the data, in a batch of one."""
    import jax
    import numpy as np

    shape = source.image_shape()
    side = settings["size"] or 224
    return jax.ShapeDtypeStruct((1, *(shape if shape and math.prod(shape) else (side, side, 3))), np.uint8)


def _augmentations(text: str) -> str:
    for name in text.split(","):
        if name not in AUGMENTATIONS:
            raise argparse.ArgumentTypeError(f"no augmentation is called '{name}'; expected {', '.join(AUGMENTATIONS)}")
    return text
