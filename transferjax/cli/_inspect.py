"""``transferjax inspect``: what a checkpoint holds."""

from __future__ import annotations

import argparse
from typing import Any

from transferjax.cli._arguments import verb
from transferjax.cli._console import show


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "inspect",
        run,
        "what is in a weight file: names, shapes, types, sizes, digest",
        "Lists every array of a checkpoint without loading it: torch (.pth, .pt), safetensors, .npz, or an Orbax\n"
        "directory. Nothing in the file is executed. The last lines give its size, its digest, and whether its bytes\n"
        "are covered by checksums (verified) or not.",
        "  transferjax inspect efficientnet-lite0.pth",
    )
    parser.add_argument("path", metavar="PATH", help="a weight file or checkpoint directory")
    parser.add_argument("--digest", metavar="SHA256", help="fail unless the file has this sha256")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.tree import natural

    checkpoint = tj.io.open(arguments.path, digest=arguments.digest)
    shapes = sorted(checkpoint.shapes.items(), key=lambda item: natural(item[0].replace(".", "/")))
    rows = tuple((path, str(tuple(leaf.shape)), str(leaf.dtype), leaf.size, _bytes(leaf)) for path, leaf in shapes)
    facts = {
        "format": checkpoint.format,
        "arrays": len(rows),
        "values": sum(row[3] for row in rows),
        "bytes": sum(row[4] for row in rows),
        "digest": f"sha256:{checkpoint.fingerprint().removeprefix('sha256:')}",
        "integrity": checkpoint.verified,
    }
    show(tj.Report(str(arguments.path), ("path", "shape", "dtype", "values", "bytes"), rows, facts), arguments.json)
    return 0


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize
