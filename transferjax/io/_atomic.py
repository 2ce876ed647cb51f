"""Written beside and renamed: a path holds the old state or the new one, never a half."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator

from transferjax._errors import CheckpointError


@contextlib.contextmanager
def beside(path: str, *, overwrite: bool) -> Iterator[str]:
    """A place to write to; when the block ends without an error, what is there takes the place of ``path``.

    Args:
      path: absolute; missing parent directories are made.
      overwrite: whether ``path`` may exist.

    Yields:
      A path inside a new directory ``.tmp-...`` of the same parent, which is removed in any case.

    Raises:
      CheckpointError: ``path`` exists, or the system refuses (read-only, disk full); the old state is untouched.
    """
    if os.path.lexists(path) and not overwrite:
        raise CheckpointError(f"'{path}' exists. Choose another path, or pass overwrite=True to replace it.")
    parent, name = os.path.split(path)
    room = os.path.join(parent, f".tmp-{name[:100]}-{uuid.uuid4().hex[:12]}")
    try:
        os.makedirs(parent, exist_ok=True)
        os.mkdir(room)
        new = os.path.join(room, "new")
        yield new
        _take_place(new, path, os.path.join(room, "old"))
        _sync(parent)
    except OSError as error:
        raise CheckpointError(
            f"'{path}' cannot be written: {error.strerror or error}. What was there before is unchanged."
        ) from None
    finally:
        shutil.rmtree(room, ignore_errors=True)


def sync_file(path: str) -> None:
    """Forces a file to the disk, so that a rename after it never outruns its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_place(new: str, path: str, old: str) -> None:
    if not os.path.isdir(new) and not os.path.isdir(path):
        os.replace(new, path)
        return
    there = os.path.lexists(path)
    if there:
        os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        if there:
            os.rename(old, path)
        raise


def _sync(folder: str) -> None:
    with contextlib.suppress(OSError):  # some systems cannot sync a directory
        sync_file(folder)
