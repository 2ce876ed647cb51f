"""``transferjax report``: what moved between two checkpoints."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from transferjax.cli._arguments import verb
from transferjax.cli._console import note, show

AXES = {"last": -1, "first": 0, "none": None}


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "report",
        run,
        "what fine-tuning moved, and by how much",
        "Compares the weights after a fine-tuning with those before, of any format, one array of each in memory at a\n"
        "time: the relative change of every array, its cosine with the old one, its largest change, and the effective\n"
        "rank of the change. Equal arrays are only counted. With --frozen the exit code is 1 if one of these arrays\n"
        "has moved in any bit, or is missing. Of a run, `transferjax export` writes the weights to compare.",
        "  transferjax report efficientnet-lite0.pth tuned.safetensors --frozen '_blocks.*' --output moved",
    )
    parser.add_argument("base", metavar="BASE", help="the weights before: a file, checkpoint or run directory")
    parser.add_argument("tuned", metavar="TUNED", help="the weights after")
    parser.add_argument("--frozen", metavar="GLOB", help="arrays of BASE that should not have moved (none)")
    where = "the axis of outputs, for effective ranks; none: leave them out (first if BASE is a torch file, else last)"
    parser.add_argument("--axis", choices=AXES, help=where)
    parser.add_argument("--all", action="store_true", help="list equal arrays too")
    parser.add_argument("--output", metavar="DIR", help="new directory for a report of all arrays and a picture (none)")


def run(arguments: argparse.Namespace) -> int:
    import dataclasses

    import transferjax as tj
    from transferjax.cli._sources import opened

    output = None if arguments.output is None else pathlib.Path(arguments.output)
    if output is not None and output.exists():
        raise tj.DataError(f"--output '{output}' exists already. Expected a new directory.")
    base, tuned = opened(arguments.base), opened(arguments.tuned)
    usual = "first" if base.checkpoint.format.startswith("torch") else "last"
    found = tj.finetune.movement(base, tuned, frozen=arguments.frozen, axis=AXES[arguments.axis or usual])
    title = f"{arguments.base} to {arguments.tuned}: {found.title}"
    if output is not None:
        _write(output, title, found)
    kept = [row for row in found.rows if arguments.all or row[1] != "equal"]
    show(dataclasses.replace(found, title=title, rows=tuple(kept)), arguments.json)
    wrong = [row[0] for row in found.rows if row[-1] in ("moved!", "missing!")]
    if wrong:
        from transferjax._errors import listing

        note(f"transferjax report: not as frozen as --frozen {arguments.frozen} says: {listing(wrong)}")
    return 1 if wrong else 0


def _write(output: pathlib.Path, title: str, report: Any) -> None:
    """A directory with the report and its picture, whole or not at all."""
    import dataclasses
    import tempfile

    import transferjax as tj

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as place:
        made = pathlib.Path(place) / "made"
        made.mkdir()
        text = dataclasses.replace(report, title=title).to_markdown()
        (made / "report.md").write_text(text + "\n", encoding="utf-8")
        if any(change is not None for change in report.column("change")):
            tj.report.movement(report).savefig(made / "movement.png")
        made.rename(output)
