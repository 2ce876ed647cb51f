"""``transferjax transplant``: a weight file through a plan into another."""

from __future__ import annotations

import argparse
from typing import Any

from transferjax.cli._arguments import count, natural, verb
from transferjax.cli._console import show

FORMATS = ("orbax", "safetensors", "npz", "msgpack")


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "transplant",
        run,
        "write what a plan makes of a weight file",
        "Reads, transforms and writes one array at a time, so that files larger than memory pass. The result carries\n"
        "a digest of every array. A plan that is bound to one source refuses any other.",
        "  transferjax transplant theirs.safetensors plan.json mine --target mine:make\n"
        "where plan.json is from\n"
        "  transferjax plan theirs.safetensors mine:make --rules rules.py --output plan.json",
    )
    parser.add_argument("source", metavar="SRC", help="a weight file or checkpoint directory")
    parser.add_argument("plan", metavar="PLAN", help="a file that `transferjax plan --output` wrote")
    parser.add_argument("output", metavar="OUT", help="the file, or for Orbax the directory, to write")
    parser.add_argument("--format", choices=FORMATS, help="default: what the ending of OUT says, else orbax")
    parser.add_argument("--target", metavar="TARGET", help="what fresh leaves take their values from, as in `plan`")
    parser.add_argument("--num-classes", type=count, metavar="N", help="outputs of the target; default: the file's")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of fresh weights (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli._outputs import spare
    from transferjax.cli._sources import plan_of, target_of, values_of

    if arguments.num_classes is not None and not arguments.target:
        raise tj.PlanError("--num-classes is for --target, which is not given. Add that, or leave it out.")
    spare(arguments.output, "OUT", {"SRC": arguments.source, "PLAN": arguments.plan, "--target": arguments.target})
    plan, source = plan_of(arguments.plan), tj.io.open(arguments.source)
    init = None
    if arguments.target:
        init = values_of(target_of(arguments.target, arguments.num_classes, arguments.seed)[0])
    elif plan.counts()["fresh"]:
        raise tj.PlanError(
            f"{plan.counts()['fresh']} leaves of the plan are fresh, and nothing says their values. "
            "Add --target, the model or checkpoint that the plan was made for."
        )
    report = tj.io.transplant(
        source, plan, arguments.output, init=init, format=arguments.format, overwrite=arguments.overwrite
    )
    show(report, arguments.json)
    return 0
