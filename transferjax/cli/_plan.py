"""``transferjax plan``: where every weight of a model would come from."""

from __future__ import annotations

import argparse
from typing import Any

from transferjax.cli._arguments import count, verb
from transferjax.cli._console import show


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "plan",
        run,
        "where every weight of a model would come from",
        "Matches a weight file with a model and prints one line per weight: copied, transposed, fresh, or left out.\n"
        "Only names and shapes are read. If anything is unaccounted for, it says so and fails.",
        "  transferjax plan --weights efficientnet-lite0.pth --num-classes 10",
    )
    parser.add_argument(
        "--model",
        default="efficientnet_lite0",
        help="a model of the zoo, or module:function that returns a Model (efficientnet_lite0)",
    )
    parser.add_argument("--weights", default="auto", metavar="PATH", help="weight file; default: the installed package")
    parser.add_argument("--num-classes", type=count, metavar="N", help="outputs of the new model; default: the file's")


def run(arguments: argparse.Namespace) -> int:
    from transferjax.cli._model import make_plan

    plan = make_plan(arguments.model, arguments.weights, arguments.num_classes)
    if arguments.json:
        print(plan.to_json())
    else:
        show(plan.report(), False)
    return 0
