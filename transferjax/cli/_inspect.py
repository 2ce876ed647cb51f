"""``transferjax inspect``: what a checkpoint holds."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from transferjax.cli._arguments import verb
from transferjax.cli._console import show

MANIFEST, ARRAYS = "manifest.json", "arrays"
"""What a checkpoint of a run directory holds."""


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "inspect",
        run,
        "what is in a weight file: names, shapes, types, sizes, digest",
        "Lists every array of a checkpoint without loading it: torch (.pth, .pt), safetensors, .npz, or an Orbax\n"
        "directory; of a run directory, its newest checkpoint. Nothing in the file is executed. The last lines give\n"
        "its size, its digest, and whether its bytes are covered by checksums (verified) or not.",
        "  transferjax inspect efficientnet-lite0.pth",
    )
    parser.add_argument("path", metavar="PATH", help="a weight file, checkpoint directory or run directory")
    parser.add_argument("--digest", metavar="SHA256", help="fail unless the file has this sha256")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.tree import natural

    place = _newest(pathlib.Path(arguments.path))
    checkpoint = tj.io.open(place / ARRAYS if place else arguments.path, digest=arguments.digest)
    named = {(_unescape(name) if place else name): leaf for name, leaf in checkpoint.shapes.items()}
    shapes = sorted(named.items(), key=lambda item: natural(item[0].replace(".", "/")))
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


def _newest(path: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint of a run directory, of its ``checkpoints``, or the one given; ``None`` for other paths."""
    import transferjax as tj

    if (path / MANIFEST).is_file():
        return path
    of_a_run = (path / "config.json").is_file() and (path / "checkpoints").is_dir()
    folder = path / "checkpoints" if of_a_run else path
    steps = [int(found.parent.name) for found in folder.glob(f"*/{MANIFEST}") if found.parent.name.isdigit()]
    if of_a_run and not steps:
        raise tj.CheckpointError(f"the run '{path}' has no checkpoint yet. Go on with it by `finetune --resume` first.")
    return folder / str(max(steps)) if steps else None


def _unescape(name: str) -> str:
    """A path as it was before Orbax, which joins names by dots, stored it."""
    return name.replace("%2E", ".").replace("%25", "%")


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize
