"""``transferjax diff``: what tells two checkpoints apart."""

from __future__ import annotations

import argparse
from typing import Any

from transferjax.cli._arguments import verb
from transferjax.cli._console import show


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "diff",
        run,
        "what tells two weight files apart: names, shapes, types, numbers",
        "Compares two checkpoints of any format, array by array: which are equal bit for bit, how far others lie\n"
        "apart, and which only one of the two has. Equal arrays are only counted.",
        "  transferjax diff before.safetensors after.safetensors",
    )
    parser.add_argument("a", metavar="A", help="a weight file, checkpoint directory or run directory")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--shapes-only", action="store_true", help="compare names, shapes and types; read no array")
    parser.add_argument("--all", action="store_true", help="list equal arrays too")


def run(arguments: argparse.Namespace) -> int:
    import dataclasses

    import transferjax as tj
    from transferjax.cli._sources import opened

    a, b = opened(arguments.a), opened(arguments.b)
    report = tj.io.diff(a, b, values=not arguments.shapes_only)
    kept = [row for row in report.rows if arguments.all or row[1] not in ("equal", "same form")]
    title = f"{arguments.a} against {arguments.b}: {report.title}"
    show(dataclasses.replace(report, title=title, rows=tuple(kept)), arguments.json)
    return 0
