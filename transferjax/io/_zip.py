"""Zip archives as named bytes: nothing is extracted, every size is checked, checksums are verified once."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib

from transferjax._errors import CheckpointError
from transferjax.io._bytes import PIECE, Bytes, FileBytes, MemoryBytes, Window, pieces, read

_RATIO = 1040
"""Deflate cannot shrink by more than 1032 to 1; a member that claims more is a bomb or damaged."""
_DESCRIPTOR = 24
"""Bytes that may follow a member: its sizes once more."""
_UNSAFE = re.compile(r"(^|[\\/])\.\.([\\/]|$)|^[\\/]|^[A-Za-z]:|\0")


class Member:
    """One file of an archive.

    The checksum of the whole member is verified before its first byte is served, 16 MiB at a time; after that a
    stored member is read in place, and a compressed one is decompressed for each read.
    """

    def __init__(self, file: FileBytes, info: zipfile.ZipInfo, start: int):
        self._stored = Window(file, start, info.compress_size, f"'{info.filename}' in {file.where}")
        self._info, self._verified = info, False
        self.where, self.size = self._stored.where, info.file_size
        self.compressed = info.compress_type != zipfile.ZIP_STORED

    def read_into(self, offset: int, out: memoryview) -> None:
        self.plain().read_into(offset, out)

    def plain(self) -> Bytes:
        """The decompressed bytes."""
        if self.compressed:
            return MemoryBytes(self._inflate(), self.where)
        if not self._verified:
            value = 0
            for piece in pieces(self._stored, 0, self.size):
                value = zlib.crc32(piece, value)
            self._check(value)
        return self._stored

    def head(self, count: int) -> bytes:
        """The first bytes, unverified: enough to know a shape without reading the array."""
        if not self.compressed:
            return bytes(read(self._stored, 0, min(count, self.size)))
        source = read(self._stored, 0, min(self._stored.size, PIECE))
        try:
            return zlib.decompressobj(-15).decompress(source, count)
        except zlib.error:
            raise self._damaged("its compressed stream is broken") from None

    def unverified(self) -> Bytes:
        """The bytes before their checksum is looked at: enough to find arrays in them without reading those."""
        return MemoryBytes(self._inflate(), self.where) if self.compressed else self._stored

    def _inflate(self) -> bytearray:
        out, stream = bytearray(), zlib.decompressobj(-15)
        try:
            for piece in pieces(self._stored, 0, self._stored.size):
                out += stream.decompress(piece, self.size - len(out) + 1)
                if len(out) > self.size or stream.unconsumed_tail:
                    raise self._damaged(f"it holds more than the {self.size} bytes it claims")
        except zlib.error:
            raise self._damaged("its compressed stream is broken") from None
        if len(out) != self.size or not stream.eof:
            raise self._damaged(f"it holds {len(out)} of the {self.size} bytes it claims")
        if not self._verified:
            self._check(zlib.crc32(out))
        return out

    def _check(self, value: int) -> None:
        if value != self._info.CRC:
            raise self._damaged("its checksum does not match its bytes")
        self._verified = True

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where} is damaged: {why}.")


def members(file: FileBytes) -> dict[str, Member]:
    """The files of a zip archive by name; reads the directory only.

    Raises:
      CheckpointError: it is no zip archive; a name comes twice or points outside; members overlap, claim more than
        they can hold, or are encrypted.
    """
    infos, directory = _directory(file)
    out: dict[str, Member] = {}
    end = 0
    for info in sorted(infos, key=lambda i: i.header_offset):
        name = info.filename
        if _UNSAFE.search(name) or _UNSAFE.search(info.orig_filename):
            raise CheckpointError(f"{file.where} has a member named {name[:200]!r}, which points outside the archive.")
        if name in out:
            raise CheckpointError(f"{file.where} holds '{name}' twice. Expected each name once.")
        start = _start(file, info)
        _check_gap(file, info.header_offset - end, f"before '{name}'")
        end = start + info.compress_size
        out[name] = Member(file, info, start)
    _check_gap(file, directory - end, "before the directory")
    return {name: member for name, member in out.items() if not name.endswith("/")}


def _check_gap(file: FileBytes, gap: int, place: str) -> None:
    """A damaged directory can lose a member without a trace; then its bytes belong to nobody."""
    if gap < 0:
        raise CheckpointError(f"{file.where} is damaged: its members overlap {place}.")
    if gap > _DESCRIPTOR:
        raise CheckpointError(f"{file.where} is damaged: {gap} bytes {place} belong to no member.")


def _directory(file: FileBytes) -> tuple[list[zipfile.ZipInfo], int]:
    try:
        with zipfile.ZipFile(file.path) as archive:
            return archive.infolist(), archive.start_dir
    except Exception as error:  # zipfile raises about ten different types on damaged directories
        raise CheckpointError(
            f"{file.where} is no complete zip archive ({type(error).__name__}: {error}). It is truncated or damaged."
        ) from None


def _start(file: FileBytes, info: zipfile.ZipInfo) -> int:
    where = f"'{info.filename}' in {file.where}"
    if info.flag_bits & 1:
        raise CheckpointError(f"{where} is encrypted. Expected an archive without a password.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(f"{where} is compressed by method {info.compress_type}. Expected stored or deflated.")
    stored = info.compress_type == zipfile.ZIP_STORED
    if (stored and info.compress_size != info.file_size) or info.file_size > info.compress_size * _RATIO + 64:
        raise CheckpointError(
            f"{where} claims {info.file_size} bytes in {info.compress_size} stored ones; that cannot be. "
            "It is damaged or made to exhaust memory."
        )
    signature, names, extra = struct.unpack("<4s22xHH", read(file, info.header_offset, 30))
    if signature != b"PK\3\4":
        raise CheckpointError(f"{where} is damaged: its header is not where the directory says.")
    local = bytes(read(file, info.header_offset + 30, names))
    flag = "utf-8" if info.flag_bits & 0x800 else "cp437"
    if local.decode(flag, "replace").rstrip("\0") != info.orig_filename.rstrip("\0"):
        raise CheckpointError(f"{where} is damaged: header and directory disagree about its name.")
    return info.header_offset + 30 + names + extra
