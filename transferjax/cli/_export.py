"""``transferjax export``: weights back under the names that they came with."""

from __future__ import annotations

import argparse
import os
import pathlib
from typing import Any

from transferjax.cli._arguments import verb
from transferjax.cli._console import show
from transferjax.cli._transplant import FORMATS


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "export",
        run,
        "weights back under torch's, Hugging Face's or Keras's names",
        "Runs a plan in reverse: every array gets the name and layout of the file that the plan was made for. Of a\n"
        "run directory, the plan is its own, and adapters are merged into the weights. The result is what the other\n"
        "library loads; an operation that has no inverse is named.",
        "  transferjax export runs/photos photos.safetensors\n"
        "  transferjax export mine theirs.safetensors --plan plan.json",
    )
    parser.add_argument("source", metavar="SRC", help="a run directory, or with --plan a checkpoint")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument("--plan", metavar="PLAN", help="the plan that led to SRC's names; default: that of the run")
    parser.add_argument("--leave-out", metavar="GLOB", help="weights to leave out, such as a head that the file lacks")
    parser.add_argument("--weights", metavar="PATH", help="where the run's pretrained weights are now, if they moved")
    parser.add_argument("--format", choices=FORMATS, help="default: what the ending of OUT says, else safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli._outputs import spare
    from transferjax.cli._sources import plan_of

    spare(arguments.output, "OUT", {"SRC": arguments.source, "--plan": arguments.plan})
    format = arguments.format or (None if pathlib.Path(arguments.output).suffix else "safetensors")
    if arguments.plan:
        plan, source = plan_of(arguments.plan), tj.io.open(arguments.source)
        options = {"format": format, "overwrite": arguments.overwrite}
        report = tj.io.transplant(source, plan.inverse(leave_out=arguments.leave_out), arguments.output, **options)
    else:
        directory = _run(arguments.source, arguments.weights)
        spare(arguments.output, "OUT", {"the weights of the run": directory.config["weights"]})
        plan, arrays = _of_a_run(directory, arguments.source)
        named = plan.inverse(leave_out=arguments.leave_out).apply(arrays)
        report = tj.io.save(arguments.output, named, format=format, overwrite=arguments.overwrite)
    show(report, arguments.json)
    return 0


def _run(path: str, weights: str | None) -> Any:
    import transferjax as tj
    from transferjax.cli._recipe import moved

    if os.path.exists(path) and not (pathlib.Path(path) / "config.json").is_file():
        raise tj.PlanError(f"'{path}' is no run directory. Add --plan, the plan that led to the names of a checkpoint.")
    return moved(tj.io.Run.open(path), weights, "raise")


def _of_a_run(directory: Any, path: str) -> tuple[Any, Any]:
    """The plan of a run, and the arrays of its model after fine-tuning, adapters merged."""
    import transferjax as tj
    from transferjax.cli._recipe import restored

    plan = directory.plan
    if plan is None:
        raise tj.PlanError(f"the run '{path}' started from no file of weights, so there are no names to go back to.")
    recipe, state, frozen = restored(directory)
    model = recipe.model._replace(params=recipe.tuning.merge(state.trainable, frozen), extra=state.extra)
    return plan, tj.surgery.leaves(model)
