"""Bytes by position."""

import hashlib
import os

import pytest

from transferjax._errors import CheckpointError
from transferjax.io import _bytes
from transferjax.io._bytes import (
    FileBytes,
    Joined,
    MemoryBytes,
    Paged,
    Window,
    check_range,
    folder_sha256,
    pieces,
    read,
)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    return tmp_path / "x"


@pytest.fixture
def passed(tmp_path, monkeypatch):
    """Reads a few bytes of a file, and gives what the system was told of that."""
    monkeypatch.setattr(_bytes, "PASSING", 8)
    (tmp_path / "y").write_bytes(bytes(range(100)))
    said = []
    monkeypatch.setattr(_bytes.os, "posix_fadvise", lambda file, *what: said.append(what))

    def read_of(count=8):
        said.clear()
        assert read(FileBytes(str(tmp_path / "y")), 10, count) == bytes(range(10, 10 + count))
        return said

    return read_of


def test_what_was_not_cached_before_is_not_left_there(passed, monkeypatch):
    asked = []
    monkeypatch.setattr(_bytes, "_is_cached", lambda file, offset: asked.append(offset))
    assert passed() == [] and asked == []
    with _bytes.once():
        assert passed() == [(10, 8, os.POSIX_FADV_DONTNEED)]
        assert asked == [17], "the end: the system may have read ahead to the beginning"
        assert passed(7) == []
        monkeypatch.setattr(_bytes, "_is_cached", lambda file, offset: True)
        assert passed() == []
    assert passed() == []


@pytest.mark.parametrize("error, known", [(BlockingIOError(), False), (OSError(95, "unsupported"), True), (None, True)])
def test_whether_a_byte_is_cached(error, known, monkeypatch):
    said = []
    monkeypatch.setattr(_bytes.os, "posix_fadvise", lambda file, start, length, advice: said.append((file, advice)))

    def preadv(file, buffers, offset, flags):
        assert (file, offset, flags) == (3, 14, os.RWF_NOWAIT) and len(buffers[0]) == 1
        assert said == [(3, os.POSIX_FADV_RANDOM)]
        if error:
            raise error
        return 1

    monkeypatch.setattr(_bytes.os, "preadv", preadv)
    assert _bytes._is_cached(3, 14) is known
    assert said == [(3, os.POSIX_FADV_RANDOM), (3, os.POSIX_FADV_NORMAL)]
    monkeypatch.delattr(_bytes.os, "RWF_NOWAIT")
    assert _bytes._is_cached(3, 14) is True, "systems without it"


@pytest.mark.parametrize("warm", [False, True])
def test_after_one_pass_the_cache_is_as_if_nothing_had_been_read(tmp_path, warm):
    size, cached = 4 * _bytes.PASSING, []
    for name in ("read", "not read"):
        (tmp_path / name).write_bytes(bytes(size))
        with open(tmp_path / name, "rb+") as file:
            os.fsync(file.fileno())
            if not warm:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if name == "read":
                with _bytes.once():
                    assert read(FileBytes(str(tmp_path / name)), 0, size) == bytes(size)
            cached.append(_bytes._is_cached(file.fileno(), size // 2))
    assert cached[0] is cached[1] and cached[0] in (warm, True)  # True: a file system that lies in memory


def test_every_source_reads_alike(file):
    for source in (
        FileBytes(str(file)),
        MemoryBytes(b"0123456789", "m"),
        Window(MemoryBytes(b"ab0123456789c", "m"), 2, 10, "w"),
        Paged(MemoryBytes(b"0123456789", "m")),
        Joined([MemoryBytes(part, "m") for part in (b"0123", b"", b"4", b"56789")], "j"),
    ):
        assert bytes(read(source, 3, 4)) == b"3456" and source.size == 10
        with pytest.raises(
            CheckpointError, match="is truncated or damaged: expected 5 bytes at position 6, but it ends at 10"
        ):
            read(source, 6, 5)
        for offset, count in ((-1, 2), (0, -1), (11, 0)):
            with pytest.raises(CheckpointError, match="truncated or damaged"):
                check_range(source, offset, count)


def test_pieces(file, monkeypatch):
    monkeypatch.setattr(_bytes, "PIECE", 4)
    assert [bytes(p) for p in pieces(FileBytes(str(file)), 1, 9)] == [b"1234", b"5678", b"9"]


def test_digests(file):
    assert FileBytes(str(file)).sha256() == hashlib.sha256(b"0123456789").hexdigest()
    first = folder_sha256(str(file.parent))
    os.rename(file, file.parent / "y")
    assert folder_sha256(str(file.parent)) != first


def test_a_file_that_changes_after_it_was_opened(file):
    source = FileBytes(str(file))
    file.write_bytes(b"abcdefghijkl")
    with pytest.raises(CheckpointError, match=r"was changed after it was opened. Open it again"):
        read(source, 0, 4)


def test_a_file_that_goes_away(file):
    source = FileBytes(str(file))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"'.*x' cannot be read: No such file or directory"):
        read(source, 0, 4)
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        FileBytes(str(file.parent))


def test_a_file_that_ends_while_it_is_read(file, monkeypatch):
    source = FileBytes(str(file))
    source.size = 20
    with pytest.raises(CheckpointError, match="ended at byte 10 while it was being read"):
        read(source, 5, 10)


def test_pages_are_read_once_and_few_are_kept(monkeypatch):
    monkeypatch.setattr(Paged, "PAGE", 4)
    monkeypatch.setattr(Paged, "PAGES", 2)
    whole, asked = bytes(range(30)), []

    class Counted(MemoryBytes):
        def read_into(self, offset, out):
            asked.append((offset, len(out)))
            super().read_into(offset, out)

    paged = Paged(Counted(whole, "m"))
    assert bytes(read(paged, 3, 4)) == whole[3:7] and bytes(read(paged, 1, 7)) == whole[1:8]
    assert asked == [(0, 4), (4, 4)]
    assert bytes(read(paged, 0, 30)) == whole and asked[2:] == [(n, min(4, 30 - n)) for n in range(8, 30, 4)]
