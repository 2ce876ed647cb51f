"""Figures written whole or not at all."""

from __future__ import annotations

import io
import os
import pathlib
from typing import Any

from transferjax.io._beside import write_bytes, writing


def write_figure(path: str | os.PathLike[str], figure: Any) -> pathlib.Path:
    """Writes a matplotlib ``Figure``; missing directories are made, and the ending of the name chooses the format.

    Args:
      path: of the picture, for example ``curves.png``.
      figure: anything with ``savefig(file, format=...)``.

    Returns:
      The path.

    Raises:
      CheckpointError: it cannot be written.

    >>> import tempfile
    >>> from transferjax.report import curves
    >>> folder = tempfile.TemporaryDirectory()
    >>> write_figure(f"{folder.name}/pictures/curves.svg", curves([{"step": 1, "loss": 2.0}])).name
    'curves.svg'
    >>> folder.cleanup()
    """
    path = pathlib.Path(path)
    memory = io.BytesIO()
    figure.savefig(memory, format=path.suffix.lstrip(".") or "png")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, memory.getvalue())
    return path
