"""``transferjax advise``: which network, what should learn, by which optimizer, and what to expect of it."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from transferjax.cli._arguments import count, natural, verb
from transferjax.cli._console import note, show


def add(verbs: Any) -> None:
    from transferjax.cli._features import add_source

    parser = verb(
        verbs,
        "advise",
        run,
        "which network to take, what should learn, and what to expect",
        "Looks at the images of --split once with every --model, trains nothing but read-outs, and ranks what can be\n"
        "done within --steps: read out features, fine-tune all or the last stages, by which optimizer and learning\n"
        "rate. What is expected rests on runs on similar tasks, which are cited: runs E1, E2, ... of the package's\n"
        "table, and your own where --evidence has any (probe and finetune write there; finetune's count once probe\n"
        "has looked at the same data). The pixels with a linear model are always among the lines; 'none' is a small\n"
        "network of three convolutions from scratch. With --layers more is known, and more can be expected.",
        "  transferjax advise --data sample --size 64 --model efficientnet_lite0 --layers 'blocks/*' --steps 128\n"
        "  transferjax advise --data folder:photos --model efficientnet_lite0 --steps 0 --evidence runs/evidence",
    )
    add_source(parser)
    named = "of the zoo, or module:function; may be repeated"
    parser.add_argument("--model", action="append", required=True, help=named)
    parser.add_argument("--layers", metavar="GLOB", help="module paths whose outputs are features too (none)")
    parser.add_argument("--steps", type=natural, required=True, metavar="N", help="training steps; 0: features only")
    parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="images in a step (32)")
    spare = "that training steps may take on this machine, without compiling (any)"
    parser.add_argument("--seconds", type=float, metavar="S", help=spare)
    parser.add_argument("--evidence", metavar="DIR", help="your own runs, kept by probe and finetune (none)")
    parser.add_argument("--output", metavar="DIR", help="new directory for a report and pictures (none)")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli._candidates import candidate_of
    from transferjax.cli._features import raw_features

    output = None if arguments.output is None else pathlib.Path(arguments.output)
    if output is not None and output.exists():
        raise tj.DataError(f"--output '{output}' exists already. Expected a new directory.")
    budget = tj.advise.Budget(arguments.steps, arguments.batch_size, arguments.seconds)
    evidence = tj.advise.evidence()
    if arguments.evidence is not None:
        evidence = evidence + tj.advise.open_local(arguments.evidence)
    source = tj.data.open(arguments.data, arguments.split, arguments.data_dir)
    tj.data.check_classes(source)
    candidates = {}
    for name in dict.fromkeys(arguments.model):
        candidates[name] = candidate_of(name, arguments.size, source, arguments.layers)
        note(f"advise: {name} done")
    advice = tj.advise.advise(candidates, raw_features(source), budget, evidence=evidence)
    if output is not None:
        _write(output, advice)
    show(advice.report(), arguments.json)
    return 0


def _write(output: pathlib.Path, advice: Any) -> None:
    """A directory with the reports and the learning curves, whole or not at all."""
    import tempfile

    import transferjax as tj

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as place:
        made = pathlib.Path(place) / "made"
        made.mkdir()
        parts = [advice.report(), advice.sources(), advice.curves(), advice.data, advice.cited()]
        (made / "report.md").write_text("\n\n".join(part.to_markdown() for part in parts) + "\n", encoding="utf-8")
        figure = tj.report.learning_curves(advice.curves(), quality="left-out accuracy of the probe")
        figure.savefig(made / "learning_curves.png")
        made.rename(output)
