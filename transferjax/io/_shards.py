"""Safetensors in several files of a limited size behind an index, named as Hugging Face names them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from transferjax.io._beside import sync
from transferjax.io._safetensors import KEY, write_safetensors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def shards(shapes: Mapping[str, Any], limit: int) -> list[list[str]]:
    """Which arrays stand together, in their order: each file has at most ``limit`` bytes, or a single array.

    >>> import numpy as np
    >>> shards({"a": np.zeros(4, "i1"), "b": np.zeros(3, "i1"), "c": np.zeros(9, "i1"), "d": np.zeros(1, "i1")}, 7)
    [['a', 'b'], ['c'], ['d']]
    """
    out: list[list[str]] = []
    left = 0
    for name, shape in shapes.items():
        size = shape.size * shape.dtype.itemsize
        if not out or size > left:
            out.append([])
            left = limit
        out[-1].append(name)
        left -= size
    return out


def write_shards(
    folder: str,
    arrays: Mapping[str, Callable[[], np.ndarray]],
    shapes: Mapping[str, Any],
    manifest: Callable[[], str],
    facts: dict[str, str],
    limit: int,
) -> None:
    """Fills a new directory: one file, or ``model-00001-of-00003.safetensors`` and so on with an index.

    Args:
      folder: does not exist yet.
      arrays: functions that give each array, C-contiguous, when its turn comes.
      shapes: what those arrays will be.
      manifest: gives the digests' text, which stands in the index (or the only file).
      facts: text by name for ``__metadata__`` of each file.
      limit: of bytes per file.
    """
    os.mkdir(folder)
    parts = shards(shapes, limit)
    names = [SINGLE] if len(parts) == 1 else [_name(i + 1, len(parts)) for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with open(os.path.join(folder, name), "wb") as file:
            header = lambda: {**facts, KEY: manifest()} if len(parts) == 1 else facts
            write_safetensors(file, {n: arrays[n] for n in part}, {n: shapes[n] for n in part}, header)
        sync(os.path.join(folder, name))
    if len(parts) == 1:
        return
    total = sum(shape.size * shape.dtype.itemsize for shape in shapes.values())
    index = {
        "metadata": {"total_size": total, KEY: manifest()},
        "weight_map": {n: name for name, part in zip(names, parts) for n in part},
    }
    with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as file:
        json.dump(index, file, indent=2)
    sync(os.path.join(folder, INDEX))
    sync(folder)


def _name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"
