"""``transferjax evaluate``: how good a fine-tuned network is."""

from __future__ import annotations

import argparse
import time
from typing import Any

from transferjax.cli._arguments import verb
from transferjax.cli._console import note, show


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "evaluate",
        run,
        "how good a fine-tuned network is",
        "Evaluates the last checkpoint of a run on a part of its data, or on other data with the same classes.",
        "  transferjax evaluate runs/first --split test",
    )
    parser.add_argument("directory", metavar="RUN", help="a directory that `transferjax finetune` made")
    parser.add_argument("--data", metavar="SPEC", help="other data; default: those of the run")
    parser.add_argument("--split", default="test", help="which part of the data (test)")
    parser.add_argument("--weights", metavar="PATH", help="where the pretrained weights are now, if they moved")
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="with a damaged image (raise)")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli._recipe import moved, open_split, restored

    begin = time.perf_counter()
    directory = moved(tj.io.Run.open(arguments.directory), arguments.weights, arguments.on_error)
    source = open_split(directory.config, arguments.split, arguments.data)
    names = tuple(directory.config["class_names"])
    if source.class_names and names and source.class_names != names:
        raise tj.DataError(
            f"{source.name} has other classes ({', '.join(source.class_names[:5])}) than the run "
            f"({', '.join(names[:5])}). Expected the same, in the same order."
        )
    recipe, state, frozen = restored(directory)
    batches = recipe.batches(source, train=False)
    found = recipe.evaluation()(state, frozen, batches)
    if batches.skipped:
        note(f"left out {len(batches.skipped)} damaged images")
    rows = [("accuracy", found["accuracy"]), ("loss", found["loss"]), ("examples", len(batches.source))]
    rows += [("seconds", time.perf_counter() - begin)]
    facts = {"run": str(directory.path), "step": int(state.step), "data": source.name, "split": arguments.split}
    show(tj.Report("Evaluation", ("quantity", "value"), tuple(rows), facts), arguments.json)
    return 0
