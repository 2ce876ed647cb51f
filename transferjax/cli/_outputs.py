"""What the command line writes: never over what it reads, and over nothing else unasked."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import transferjax as tj
from transferjax.io._beside import write_bytes


def check_file(path: str, option: str, given: Mapping[str, str | None], overwrite: bool) -> None:
    """Raises unless a file may be written at a path.

    Args:
      path: of the file.
      option: that names it.
      given: what is read, by its name on the command line.
      overwrite: whether a file that is there may be replaced.
    """
    spare(path, option, given)
    parent = os.path.dirname(path) or "."
    if not os.path.isdir(parent):
        raise tj.TransferError(f"there is no directory '{parent}' for {option} '{path}'. Make it, or choose another.")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise tj.TransferError(f"{option} '{path}' is there and is no file. Expected a path for a file.")
    if os.path.lexists(path) and not overwrite:
        raise tj.TransferError(f"{option} '{path}' exists. Choose another path, or add --overwrite to replace it.")


def spare(path: str, option: str, given: Mapping[str, str | None]) -> None:
    """Raises if writing at a path would replace something that is read, or a directory that holds it."""
    for name, read in given.items():
        if read and os.path.exists(read) and _holds(path, read):
            raise tj.TransferError(
                f"{option} '{path}' would replace {name}, '{read}', which is never overwritten. Choose another path."
            )


def check_rules(path: str) -> None:
    """Raises unless the ending of a file says how rules are written."""
    if pathlib.Path(path).suffix not in (".py", ".json"):
        raise tj.PlanError(f"rules are not written as '{path}'. Expected an ending of .py or .json.")


def write_rules(path: str, rules: Sequence[Any]) -> None:
    """Rules as a file of the kind that its ending says."""
    made = tj.surgery.rules_to_python if path.endswith(".py") else tj.surgery.rules_to_json
    write_text(path, made(rules))


def write_text(path: str, text: str) -> None:
    """A file of text, written beside and renamed."""
    write_bytes(pathlib.Path(path), text.encode())


def _holds(path: str, read: str) -> bool:
    """Whether both are one file (by any name), or the second, which exists, lies in the first."""
    real, inner = pathlib.Path(path).resolve(), pathlib.Path(read).resolve()
    return real in (inner, *inner.parents) or (real.exists() and real.samefile(inner))
