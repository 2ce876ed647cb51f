"""``transferjax distill``: a small network learns from what a large one says of your images."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from transferjax.cli import _finetune
from transferjax.cli._arguments import count, positive, share, verb
from transferjax.cli._console import show

DEFAULTS: dict[str, Any] = {
    **_finetune.DEFAULTS,
    "model": "convnet_small",
    "weights": "none",
    "tuning": "full",
    "epochs": 30,
    "teacher": None,
    "teacher_weights": "auto",
    "loss": "kd",
    "temperature": None,
    "alpha": 0.9,
    "variants": None,
    "top_k": None,
}
TEMPERATURES = {"kd": 4.0, "dkd": 4.0, "dist": 1.0, "logit-standardised-kd": 2.0, "hard": None}
"""Of each loss; ``None``: it has none."""
ALONE = ("flip", "crop", "resized-crop")
"""Augmentations that look at each image alone, so that what a teacher says of it can be kept."""
VARIANTS = 4


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "distill",
        run,
        "a small network learns from what a large one says",
        "Trains a network, the student, to say of each image what another one, the teacher, says of it. The teacher\n"
        "looks once at each image, or with --augment once at each of --variants ways in which it is changed; both see\n"
        "the same pixels. The output is a run directory as of finetune: evaluate, predict and export take it, and a\n"
        "run that was stopped goes on with --resume and ends with the same weights as one that was not.",
        "  transferjax distill --teacher runs/photos --student convnet_small --data folder:photos --output runs/small\n"
        "  transferjax distill --teacher mine:make --teacher-weights large.npz --data sample --validation test \\\n"
        "      --augment flip,crop --variants 8 --alpha 1 --output runs/small\n"
        "  transferjax distill --resume --output runs/small",
    )
    who = parser.add_argument_group("who teaches")
    teacher = "a directory that finetune made, a model of the zoo or module:function; it knows the classes of the data"
    who.add_argument("--teacher", metavar="WHAT", help=teacher)
    where = "its weight file (auto: the installed package); of a directory, where its pretrained weights are now"
    who.add_argument("--teacher-weights", metavar="PATH", help=where)
    _finetune.add_inputs(parser.add_argument_group("who learns, from what"), "--student", DEFAULTS)
    how = parser.add_argument_group("how")
    how.add_argument("--loss", choices=TEMPERATURES, help="between what both say (kd)")
    temperature = "softens what both say (kd, dkd: 4; dist: 1; logit-standardised-kd: 2)"
    how.add_argument("--temperature", type=positive, metavar="T", help=temperature)
    alpha = "of the loss; the rest is cross-entropy with the labels; 1: labels are not used (0.9)"
    how.add_argument("--alpha", type=share, metavar="SHARE", help=alpha)
    variants = f"in how many ways each image is augmented, one per epoch in turn ({VARIANTS} with --augment)"
    how.add_argument("--variants", type=count, metavar="N", help=variants)
    top = "keep so many of the teacher's largest logits only, and the weight of the rest; for kd (all)"
    how.add_argument("--top-k", type=count, metavar="K", help=top)
    _finetune.add_learning(how, DEFAULTS, ALONE)
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the run; must be new")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output; needs no other option")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli._distillation import distillation

    given = _finetune.given_settings(arguments, DEFAULTS)
    resumed = tj.io.Run.open(arguments.output) if arguments.resume else None
    if resumed:
        settings = _finetune.resumed_settings(resumed, given, DEFAULTS, "distill")
    else:
        settings = _settled({**DEFAULTS, **given})
    settings, source = _finetune.with_classes(settings)
    recipe = distillation(settings, _finetune.first_images(source, settings))
    batches = _finetune.training_batches(recipe, source)
    report, _ = _finetune.run_in(arguments.output, recipe, batches, resumed)
    show(report, arguments.json)
    return 0


def _settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with what others decide; options that fit no other raise."""
    import transferjax as tj

    loss, augment = settings["loss"], [name for name in settings["augment"].split(",") if name]
    if settings["teacher"] is None:
        raise tj.TransferError(
            "--teacher is missing. Expected a directory that `transferjax finetune` made, a model of the zoo, or "
            "module:function."
        )
    if settings["temperature"] and TEMPERATURES[loss] is None:
        raise tj.TransferError(f"--temperature would do nothing: --loss {loss} has none. Leave it out.")
    if settings["top_k"] and loss != "kd":
        raise tj.TransferError(f"--top-k is for --loss kd; {loss} needs all logits. Leave it out.")
    if settings["label_smoothing"] and settings["alpha"] == 1:
        raise tj.TransferError("--label-smoothing would do nothing: with --alpha 1 labels are not used. Leave it out.")
    mixing = [name for name in augment if name not in ALONE]
    if mixing:
        raise tj.TransferError(
            f"--augment {mixing[0]} mixes images, so that what a teacher says of one cannot be kept. Expected some of "
            f"{', '.join(ALONE)}."
        )
    variants = settings["variants"] or (VARIANTS if augment else 1)
    if variants > 1 and not augment:
        raise tj.TransferError(f"--variants {variants} are all the same without --augment. Add that, or leave it out.")
    return {**settings, "variants": variants, "temperature": settings["temperature"] or TEMPERATURES[loss]}
