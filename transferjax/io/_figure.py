"""Figures written whole or not at all."""

from __future__ import annotations

import io
import os
import pathlib
from typing import Any

from transferjax._errors import CheckpointError
from transferjax.io._beside import write_bytes, writing
from transferjax.io._replace import absolute


def write_figure(path: str | os.PathLike[str], figure: Any) -> pathlib.Path:
    """Writes a matplotlib ``Figure``; missing directories are made, and the ending of the name chooses the format.

    Args:
      path: of the picture, for example ``curves.png``.
      figure: anything with ``savefig(file, format=...)``.

    Returns:
      The path.

    Raises:
      CheckpointError: it is no figure, the ending names no picture's format, or it cannot be written.

    >>> import tempfile
    >>> from transferjax.report import curves
    >>> folder = tempfile.TemporaryDirectory()
    >>> write_figure(f"{folder.name}/pictures/curves.svg", curves([{"step": 1, "loss": 2.0}])).name
    'curves.svg'
    >>> folder.cleanup()
    """
    path = pathlib.Path(absolute(path, "write_figure", "write write_figure(path, figure)"))
    if not callable(getattr(figure, "savefig", None)):
        raise CheckpointError(f"write_figure() expects a matplotlib Figure second, got {type(figure).__name__}.")
    memory = io.BytesIO()
    try:
        figure.savefig(memory, format=path.suffix.lstrip(".") or "png")
    except ValueError as error:  # matplotlib lists the formats that it has
        raise CheckpointError(f"the figure cannot be drawn for '{path}': {error}") from None
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, memory.getvalue())
    return path
