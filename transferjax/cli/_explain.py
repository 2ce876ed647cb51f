"""``transferjax explain``: what a fine-tuning run would cost, before it is started."""

from __future__ import annotations

import argparse
import json
from typing import Any

from transferjax.cli._arguments import verb
from transferjax.cli._console import note, show


def add(verbs: Any) -> None:
    from transferjax.cli._finetune import add_inputs, add_training

    parser = verb(
        verbs,
        "explain",
        run,
        "what a fine-tuning run would cost: FLOPs, bytes, memory",
        "Takes the options of finetune for what learns from what, and how; compiles the step, and\n"
        "compares it with the same step with everything trainable: FLOPs, bytes, memory, parameters.\n"
        "Says what can be computed once per image, and with --device-memory what makes the run fit.\n"
        "Nothing is trained or written.",
        "  transferjax explain --data sample --size 64 --tuning head+lora:8\n"
        "  transferjax explain --data sample --tuning full --batch-size 512 --device-memory 16GiB",
    )
    add_inputs(parser.add_argument_group("what"))
    add_training(parser.add_argument_group("how"))
    parser.add_argument("--no-compile", action="store_true", help="leave out what only the compiler can say; faster")
    memory = "of the device, for example 16GiB: say what makes the run fit"
    parser.add_argument("--device-memory", type=size_text, metavar="BYTES", help=memory)


def size_text(text: str) -> int:
    """Bytes from a number with or without a unit.

    >>> size_text("16GiB"), size_text("500MB")
    (17179869184, 500000000)
    """
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    number = text.rstrip("BbGgIiKkMm ")
    unit = text[len(number) :].strip().upper() or "B"
    try:
        found = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; expected bytes above 0: 16GiB, 500MB")
    return found


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
    if not arguments.no_compile:
        note("explain: compiling the step, and the same step with everything trainable")
    reports = {"cost": tj.explain(step, state, frozen, batch, compile=not arguments.no_compile)}
    if settings["hoist"] is not False:
        reports["hoisting"] = tj.hoist(step, state, frozen, batch).report()
    if settings["quantise"]:
        found = tj.tuning.quantisation_error(recipe.model.params, recipe.quantised, settings["quantise"])
        reports["quantisation"] = found
    if arguments.device_memory:
        reports["memory"] = tj.fit_memory(step, state, frozen, batch, arguments.device_memory)
    if arguments.json:
        print(json.dumps({name: json.loads(report.to_json()) for name, report in reports.items()}))
    else:
        for report in reports.values():
            show(report, False)
    return 0
