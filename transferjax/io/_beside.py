"""Written beside and renamed: a path holds the old state or the new one, never a half."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from transferjax._errors import CheckpointError

TEMPORARY = ".partial-"
"""How the names of files and directories begin that are not finished."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns every ``OSError`` of the body into a ``CheckpointError`` that names ``path`` and the cause."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write '{os.fspath(path)}': {error.strerror or error}. What was there before is unchanged. "
            "Expected a writable directory with enough free space."
        ) from error


@contextlib.contextmanager
def beside(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[str]:
    """A place to write to; when the block ends without an error, what is there takes the place of ``path``.

    Args:
      path: of a file or directory; missing parent directories are made.
      overwrite: whether ``path`` may exist.

    Yields:
      A path inside a new directory ``.partial-...`` of the same parent, which is removed in any case.

    Raises:
      CheckpointError: ``path`` exists, or is a directory where a file is written or the other way round; or the system
        refuses (read-only, disk full). The old state is untouched.
    """
    path = os.fspath(path)
    if not overwrite and os.path.lexists(path):
        raise CheckpointError(f"'{path}' exists. Choose another path, or pass overwrite=True to replace it.")
    parent, name = os.path.split(path)
    room = os.path.join(parent, f"{TEMPORARY}{name[:100]}-{uuid.uuid4().hex[:12]}")
    with writing(path):
        try:
            os.makedirs(parent or ".", exist_ok=True)
            os.mkdir(room)
            new = os.path.join(room, "new")
            yield new
            _take_place(new, path, os.path.join(room, "old"))
            with contextlib.suppress(OSError):  # some systems cannot sync a directory
                sync(parent or ".")
        finally:
            shutil.rmtree(room, ignore_errors=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """A whole file at once: either all of ``data`` is at ``path`` afterwards, or what was there before.

    Raises:
      CheckpointError: the directory is read-only, or the disk is full.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_bytes(pathlib.Path(folder) / "note.txt", b"done")
    ...     [(found.name, found.read_text()) for found in pathlib.Path(folder).iterdir()]
    [('note.txt', 'done')]
    """
    with beside(path) as new, open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def folder_beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory to fill; when the body ends without an error it becomes ``path``, else it is removed.

    A directory that is at ``path`` already is replaced.
    """
    with beside(path) as new:
        os.mkdir(new)
        yield pathlib.Path(new)
        for root, _, files in os.walk(new):
            for name in files:
                sync(os.path.join(root, name))
            with contextlib.suppress(OSError):
                sync(root)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes what a killed process left unfinished in a directory."""
    for found in folder.glob(f"{TEMPORARY}*"):
        if found.is_dir():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Forces a file, or the names in a directory, to the disk, so that a rename never outruns what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_kind(path: str, directory: bool) -> None:
    """Raises ``CheckpointError`` if a file would take the place of a directory, or a directory that of a file."""
    if os.path.lexists(path) and os.path.isdir(path) != directory:
        there, new = ("a file", "a directory") if directory else ("a directory", "a file")
        raise CheckpointError(f"'{path}' is {there}, and {new} does not take its place. Choose another path.")


def _take_place(new: str, path: str, old: str) -> None:
    check_kind(path, os.path.isdir(new))
    if not os.path.isdir(new):
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
