"""``transferjax explain``: what a fine-tuning run would cost, before it is started."""

from __future__ import annotations

import argparse
from typing import Any

from transferjax.cli._arguments import verb
from transferjax.cli._console import show


def add(verbs: Any) -> None:
    from transferjax.cli._finetune import add_inputs, add_training

    parser = verb(
        verbs,
        "explain",
        run,
        "what a fine-tuning run would cost: FLOPs, bytes, memory",
        "Takes the options of finetune, compiles the step, and compares it with the same step with everything\n"
        "trainable: FLOPs, bytes, memory, parameters. Says what can be computed once per image. Nothing is trained or\n"
        "written.",
        "  transferjax explain --data sample --size 64 --tuning head+lora:8",
    )
    add_inputs(parser.add_argument_group("what"))
    add_training(parser.add_argument_group("how"))


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli._finetune import DEFAULTS, first_images, given_settings, with_classes
    from transferjax.cli._recipe import make_recipe

    settings, source = with_classes({**DEFAULTS, **given_settings(arguments)})
    recipe = make_recipe(settings, first_images(source, settings))
    batches = recipe.batches(source, train=True)
    tx = recipe.optimizer(len(batches))
    state, frozen = recipe.start(tx)
    step = tj.make_step(recipe.objective(), recipe.tuning, tx)
    batch = next(iter(batches))
    show(tj.explain(step, state, frozen, batch), arguments.json)
    if settings["hoist"] is not False:
        show(tj.hoist(step, state, frozen, batch).report(), arguments.json)
    if settings["quantise"]:
        show(tj.tuning.quantisation_error(recipe.model.params, recipe.quantised, settings["quantise"]), arguments.json)
    return 0
