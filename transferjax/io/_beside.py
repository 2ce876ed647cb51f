"""Files written beside their place and renamed into it, so that no reader ever meets a half-written one."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
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
            f"cannot write '{os.fspath(path)}': {error.strerror or error}. Nothing half-written was left behind. "
            "Expected a writable directory with enough free space."
        ) from error


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """A whole file at once: either all of ``data`` is at ``path`` afterwards, or what was there before.

    Raises:
      CheckpointError: the directory is missing or read-only, or the disk is full.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_bytes(pathlib.Path(folder) / "note.txt", b"done")
    ...     [(found.name, found.read_text()) for found in pathlib.Path(folder).iterdir()]
    [('note.txt', 'done')]
    """
    path = pathlib.Path(path)
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        sync(path.parent)


@contextlib.contextmanager
def folder_beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory to fill; when the body ends without an error it becomes ``path``, else it is removed.

    A directory that is at ``path`` already is replaced.
    """
    with writing(path):
        beside = pathlib.Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent))
    try:
        with writing(path):
            beside.chmod(0o755)
        yield beside
        with writing(path):
            _sync_all(beside)
            if path.exists():
                old = pathlib.Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
                os.rename(path, old / "old")
                os.rename(beside, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(beside, path)
            sync(path.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes what a killed process left unfinished in a directory."""
    for found in folder.glob(f"{TEMPORARY}*"):
        if found.is_dir():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)


def sync(folder: pathlib.Path) -> None:
    """Makes the names in a directory survive a power cut; a file system that cannot is left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sync_all(folder: pathlib.Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync(pathlib.Path(root))
