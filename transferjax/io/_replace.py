"""What may be replaced: a file by a file, a checkpoint's directory by another one, and nothing that is in use."""

from __future__ import annotations

import os
import pathlib
import re

from transferjax._errors import CheckpointError, listing
from transferjax.io._beside import check_kind
from transferjax.io._shards import INDEX, SINGLE

_ORBAX = {"_METADATA", "_CHECKPOINT_METADATA", "transferjax.json"}
"""One of these files lies in every checkpoint directory of Orbax or of ours."""
_PARTS = re.compile(r"_\w+|orbax\.checkpoint|commit_success\.txt|manifest\.ocdbt|checkpoint|transferjax\.json")
"""The files that may lie beside it; the arrays lie in directories."""
_SHARDS = re.compile(rf"model-\d{{5}}-of-\d{{5}}\.safetensors|{re.escape(SINGLE)}|{re.escape(INDEX)}")


def absolute(path: str | os.PathLike[str], verb: str, write: str) -> str:
    """The absolute path, ``~`` expanded.

    Args:
      verb: the name of the function that asks, for errors.
      write: how it is called.

    Raises:
      CheckpointError: it is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"{verb}() expects the path of a file or directory, got {type(path).__name__}: {write}.")
    return os.path.abspath(os.path.expanduser(os.fspath(path)))


def check_replaceable(path: str, *, directory: bool, source: str | None = None) -> None:
    """Raises ``CheckpointError`` if what is at ``path`` must not be replaced, however much that is asked for.

    A file takes the place of a file only, and a directory that of an empty directory or a checkpoint: one of Orbax or
    of :func:`transferjax.io.save`, with nothing else in it.

    Args:
      path: absolute; perhaps nothing is there.
      directory: whether a directory will be written.
      source: where what is written is read from.
    """
    if not os.path.lexists(path):
        return
    for noun, used in (("the current directory", _here()), (f"the source '{source}'", source)):
        if used is not None and os.path.exists(used) and _within(used, path):
            raise CheckpointError(f"'{path}' is, or holds, {noun}, and is not replaced. Choose another path.")
    if source is not None and os.path.isdir(source) and _within(path, source):
        raise CheckpointError(f"'{path}' is a part of the source '{source}', and is not replaced. Choose another path.")
    check_kind(path, directory)
    if directory and (foreign := _foreign(path)):
        raise CheckpointError(
            f"'{path}' is not replaced: it is a directory that holds {listing(foreign, 3)}, which is no part of a "
            "checkpoint. Choose another path, or remove it yourself."
        )


def _foreign(path: str) -> list[str]:
    """What lies in a directory and belongs to no checkpoint."""
    names = sorted(os.listdir(path))
    if all(_SHARDS.fullmatch(name) for name in names):
        return []
    isfile = lambda name: os.path.isfile(os.path.join(path, name))
    if any(name in _ORBAX and isfile(name) for name in names):
        return [name for name in names if isfile(name) and not _PARTS.fullmatch(name)]
    return names


def _here() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _within(path: str, folder: str) -> bool:
    """Whether ``path`` is ``folder`` or lies in it, links followed."""
    if not os.path.exists(folder):
        return False
    inner = pathlib.Path(os.path.realpath(path))
    return any(os.path.samefile(at, folder) for at in (inner, *inner.parents))
