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
        "Lists every array of a checkpoint without loading it: torch (.pth, .pt, .bin), safetensors (also sharded),\n"
        ".npz, Flax msgpack, Keras (.keras, .weights.h5, .h5), a Hugging Face folder or hf:org/name, or an Orbax\n"
        "directory; of a run directory, its newest checkpoint. Nothing in the file is executed. The last lines give\n"
        "its size, its digest, and whether its bytes are covered by checksums (verified) or not.",
        "  transferjax inspect efficientnet-lite0.pth",
    )
    parser.add_argument("path", metavar="PATH", help="a weight file, checkpoint directory or run directory")
    parser.add_argument("--digest", metavar="SHA256", help="fail unless the file has this sha256")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli._sources import opened
    from transferjax.tree import natural

    checkpoint, _, place = found = opened(arguments.path, arguments.digest)
    shapes = sorted(found.shapes.items(), key=lambda item: natural(item[0].replace(".", "/")))
    rows = tuple((path, str(tuple(leaf.shape)), str(leaf.dtype), leaf.size, _bytes(leaf)) for path, leaf in shapes)
    facts = {
        "format": checkpoint.format,
        "arrays": len(rows),
        "values": sum(row[3] for row in rows),
        "bytes": sum(row[4] for row in rows),
        "digest": f"sha256:{checkpoint.fingerprint().removeprefix('sha256:')}",
        "integrity": checkpoint.verified,
        **({"checkpoint": str(place)} if place else {}),
    }
    show(tj.Report(str(arguments.path), ("path", "shape", "dtype", "values", "bytes"), rows, facts), arguments.json)
    return 0


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize
