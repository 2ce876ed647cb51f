"""Archives: nothing is extracted, no size is believed."""

import io
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest

from transferjax._errors import CheckpointError
from transferjax.io import open
from transferjax.io._bytes import FileBytes, read
from transferjax.io._zip import members


def _archive(tmp_path, names, compression=zipfile.ZIP_STORED, data=b"0123456789" * 10):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.zip", "w", compression) as archive:
        warnings.simplefilter("ignore")
        for name in names:
            archive.writestr(name, data)
    return tmp_path / "x.zip"


def _members(path):
    return members(FileBytes(str(path)))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_in_part(tmp_path, compression):
    found = _members(_archive(tmp_path, ["a", "d/b", "empty/"], compression))
    assert list(found) == ["a", "d/b"]
    assert bytes(read(found["d/b"], 8, 4)) == b"8901" and found["a"].head(3) == b"012"


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/a", "C:/a", "..", "a\\..\\b"])
def test_names_that_point_outside(tmp_path, name):
    with pytest.raises(CheckpointError, match="points outside the archive"):
        _members(_archive(tmp_path, [name]))


def test_a_name_that_comes_twice(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds 'a' twice. Expected each name once"):
        _members(_archive(tmp_path, ["a", "a"]))


def test_an_unknown_compression(tmp_path):
    with pytest.raises(CheckpointError, match=r"compressed by method 8?1?[24]. Expected stored or deflated"):
        _members(_archive(tmp_path, ["a"], zipfile.ZIP_LZMA))


def _patched(path, signature, offset, form, value):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.index(signature) + offset, value)
    path.write_bytes(data)
    return path


CENTRAL, LOCAL = b"PK\1\2", b"PK\3\4"


@pytest.mark.parametrize(
    ("compression", "patch", "message"),
    [
        (0, (CENTRAL, 8, "<H", 1), "'a' in .* is encrypted. Expected an archive without"),
        (0, (CENTRAL, 24, "<I", 1 << 31), "claims 2147483648 bytes in 100 stored ones; that cannot be"),
        (8, (CENTRAL, 24, "<I", 1 << 31), "made to exhaust memory"),
        (0, (LOCAL, 0, "<I", 0), "its header is not where the directory says"),
        (0, (LOCAL, 30, "<B", 98), "header and directory disagree about its name"),
        (0, (LOCAL, 28, "<H", 60000), "is truncated or damaged"),
        (0, (LOCAL, 28, "<H", 100), "overlap before the directory|truncated or damaged"),
        (0, (CENTRAL, 0, "<I", 0), r"no complete zip archive \(BadZipFile"),
        (0, (CENTRAL, 42, "<I", 1 << 30), "truncated or damaged"),
        (0, (CENTRAL, 20, "<Q", 5 + (5 << 32)), "95 bytes before the directory belong to no member"),
    ],
)
def test_directories_that_lie(tmp_path, compression, patch, message):
    with pytest.raises(CheckpointError, match=message):
        _members(_patched(_archive(tmp_path, ["a"], compression), *patch))


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ((CENTRAL, 24, "<I", 99), "holds more than the 99 bytes it claims"),
        ((CENTRAL, 24, "<I", 101), "holds 100 of the 101 bytes it claims"),
        ((CENTRAL, 16, "<I", 7), "its checksum does not match its bytes"),
        ((LOCAL, 31, "<B", 0xFF), "its compressed stream is broken"),
    ],
)
def test_compressed_members_that_lie(tmp_path, patch, message):
    member = _members(_patched(_archive(tmp_path, ["a"], zipfile.ZIP_DEFLATED), *patch))["a"]
    with pytest.raises(CheckpointError, match=message):
        read(member, 0, 10)


def test_a_broken_stream_is_seen_at_its_head(tmp_path):
    path = _patched(_archive(tmp_path, ["a"], zipfile.ZIP_DEFLATED), LOCAL, 31, "<B", 0xFF)
    with pytest.raises(CheckpointError, match="its compressed stream is broken"):
        _members(path)["a"].head(5)


def test_a_stored_member_is_checked_before_its_first_byte(tmp_path):
    path = _archive(tmp_path, ["a"])
    path.write_bytes(path.read_bytes().replace(b"0123", b"0193", 1))
    with pytest.raises(CheckpointError, match=r"'a' in .* is damaged: its checksum does not match its bytes"):
        read(_members(path)["a"], 50, 2)


def test_a_bomb_is_never_inflated(tmp_path):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": (1 << 26,)})
    _archive(tmp_path, ["w.npy"], zipfile.ZIP_DEFLATED, out.getvalue() + bytes(1 << 26))
    path = _patched(tmp_path / "x.zip", CENTRAL, 24, "<I", 0xF0000000)
    with pytest.raises(CheckpointError, match="claims 4026531840 bytes"):
        open(path)


def test_something_else(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(CheckpointError, match="is no complete zip archive"):
        open(tmp_path / "x.zip")


def test_members_that_share_bytes(tmp_path):
    inner = struct.pack("<4s5HIIIHH", LOCAL, 20, 0, 0, 0, 0, zlib.crc32(b"xy"), 2, 2, 1, 0) + b"bxy"
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", inner)
        archive.writestr("b", b"xy")
    data = bytearray((tmp_path / "x.zip").read_bytes())
    struct.pack_into("<I", data, data.rindex(CENTRAL) + 42, 31)  # b now lies inside a
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: its members overlap before 'b'"):
        _members(tmp_path / "x.zip")
