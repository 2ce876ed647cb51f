"""Bytes of a file or of memory, read by position, never beyond what is there."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Protocol

from transferjax._errors import CheckpointError

PIECE = 1 << 24
"""Bytes handled at once when a file is hashed or checked: 16 MiB."""
PASSING = 1 << 22
"""Reads of fewer bytes stay in the system's file cache: 4 MiB."""
_ONCE: ContextVar[bool] = ContextVar("once", default=False)


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Large reads of files in the body leave nothing in the system's file cache that was not there before.

    What streams through many gigabytes then drives out nothing of others, and the system takes the same memory again.
    """
    token = _ONCE.set(True)
    try:
        yield
    finally:
        _ONCE.reset(token)


def _is_cached(file: int, offset: int) -> bool:
    """Whether a byte of an open file is in the system's file cache; also where the system cannot tell."""
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # to look at it must not begin to read what comes after it
        try:
            os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT)
        finally:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_NORMAL)
    except BlockingIOError:
        return False
    except (AttributeError, OSError):
        return True
    return True


class Bytes(Protocol):
    """A run of ``size`` bytes; ``where`` names it in errors."""

    size: int
    where: str

    def read_into(self, offset: int, out: memoryview) -> None: ...


def read(source: Bytes, offset: int, count: int) -> bytearray:
    """``count`` bytes from ``offset``; sizes are checked before anything is allocated.

    Raises:
      CheckpointError: they reach beyond the end.
    """
    check_range(source, offset, count)
    out = bytearray(count)
    source.read_into(offset, memoryview(out))
    return out


def check_range(source: Bytes, offset: int, count: int) -> None:
    """Raises ``CheckpointError`` unless ``[offset, offset + count)`` lies inside ``source``."""
    if offset < 0 or count < 0 or offset + count > source.size:
        raise CheckpointError(
            f"{source.where} is truncated or damaged: expected {count} bytes at position {offset}, "
            f"but it ends at {source.size}."
        )


def pieces(source: Bytes, offset: int, count: int) -> Iterator[bytearray]:
    """The bytes of a range, 16 MiB at a time."""
    for start in range(offset, offset + count, PIECE):
        yield read(source, start, min(PIECE, offset + count - start))


class FileBytes:
    """The bytes of one file, opened for each read, so that no handle stays open.

    A file that was replaced or rewritten after it was opened raises instead of serving a mixture.
    """

    def __init__(self, path: str):
        self.path = path
        self.where = f"'{path}'"
        with self._guard(), open(path, "rb") as file:
            self._identity = _identity(file.fileno())
            self.size = self._identity[2]

    def read_into(self, offset: int, out: memoryview) -> None:
        check_range(self, offset, len(out))
        with self._guard(), open(self.path, "rb") as file:
            if _identity(file.fileno()) != self._identity:
                raise CheckpointError(f"{self.where} was changed after it was opened. Open it again.")
            passing = _ONCE.get() and len(out) >= PASSING and not _is_cached(file.fileno(), offset + len(out) - 1)
            file.seek(offset)
            done = 0
            while done < len(out):
                count = file.readinto(out[done:])
                if not count:
                    raise CheckpointError(f"{self.where} ended at byte {offset + done} while it was being read.")
                done += count
            if passing:
                os.posix_fadvise(file.fileno(), offset, done, os.POSIX_FADV_DONTNEED)

    def sha256(self) -> str:
        """The sha256 of the whole file, as hexadecimal digits."""
        digest = hashlib.sha256()
        for piece in pieces(self, 0, self.size):
            digest.update(piece)
        return digest.hexdigest()

    @contextlib.contextmanager
    def _guard(self):
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self.where} cannot be read: {error.strerror or error}.") from None


def plain(source: Bytes) -> Bytes:
    """The same bytes, decompressed once if they are compressed."""
    return source.plain() if hasattr(source, "plain") else source  # type: ignore[attr-defined]


class MemoryBytes:
    """Bytes that are in memory already."""

    def __init__(self, data: bytes | bytearray, where: str):
        self._data = memoryview(data)
        self.where = where
        self.size = len(data)

    def read_into(self, offset: int, out: memoryview) -> None:
        check_range(self, offset, len(out))
        out[:] = self._data[offset : offset + len(out)]


class Window:
    """A part of other bytes, counted from zero."""

    def __init__(self, inner: Bytes, offset: int, size: int, where: str):
        check_range(inner, offset, size)
        self._inner, self._offset = inner, offset
        self.size, self.where = size, where

    def read_into(self, offset: int, out: memoryview) -> None:
        check_range(self, offset, len(out))
        self._inner.read_into(self._offset + offset, out)


class Paged:
    """The same bytes for many small reads: pages of 16 KiB are kept, 1 MiB in all."""

    PAGE, PAGES = 1 << 14, 64

    def __init__(self, inner: Bytes):
        self._inner, self._pages = inner, {}
        self.size, self.where = inner.size, inner.where

    def read_into(self, offset: int, out: memoryview) -> None:
        check_range(self, offset, len(out))
        done = 0
        while done < len(out):
            number, first = divmod(offset + done, self.PAGE)
            page = self._page(number)
            count = min(len(page) - first, len(out) - done)
            out[done : done + count] = page[first : first + count]
            done += count

    def _page(self, number: int) -> bytearray:
        if number not in self._pages:
            if len(self._pages) >= self.PAGES:
                self._pages.pop(next(iter(self._pages)))
            start = number * self.PAGE
            self._pages[number] = read(self._inner, start, min(self.PAGE, self.size - start))
        return self._pages[number]


class Joined:
    """Several runs of bytes, one after another."""

    def __init__(self, parts: Sequence[Bytes], where: str):
        self._parts, self.where = tuple(parts), where
        self._ends = list(itertools.accumulate(part.size for part in parts))
        self.size = self._ends[-1]

    def read_into(self, offset: int, out: memoryview) -> None:
        check_range(self, offset, len(out))
        done, number = 0, bisect.bisect_right(self._ends, offset)
        while done < len(out):
            part, end = self._parts[number], self._ends[number]
            count = min(end - offset - done, len(out) - done)
            part.read_into(offset + done - (end - part.size), out[done : done + count])
            done, number = done + count, number + 1


def folder_sha256(path: str) -> str:
    """One sha256 over the names and contents of all files below a directory."""
    digest = hashlib.sha256()
    names = []
    for folder, _, files in os.walk(path):
        names += [os.path.relpath(os.path.join(folder, name), path) for name in files]
    for name in sorted(names):
        digest.update(f"{name.replace(os.sep, '/')}\0{FileBytes(os.path.join(path, name)).sha256()}\n".encode())
    return digest.hexdigest()


def _identity(handle: int) -> tuple[int, ...]:
    status = os.fstat(handle)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
