"""``.npz`` archives: read in part, without pickles; written with the dtypes that numpy has no name for."""

from __future__ import annotations

import math
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from transferjax._errors import CheckpointError
from transferjax.io._boxes import c_strides, raw
from transferjax.io._bytes import FileBytes
from transferjax.io._reader import Reader, Strided, strided
from transferjax.io._zip import Member

KEY = "__transferjax__"
_LONGEST_HEADER = 1 << 16
_PLAIN = {"|b1", *(f"{'|' if size == 1 else '<'}{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))}
_PLAIN |= {"<f2", "<f4", "<f8", "<c8", "<c16"}
_FACT = re.compile(r"'(descr|fortran_order|shape)' *: *('[^']*'|True|False|\([\dL, ]*\))")
_HEADER = re.compile(rf" *\{{ *(?:{_FACT.pattern} *,? *){{3}}\}} *\n?")


def read_npz(file: FileBytes, archive: Mapping[str, Member]) -> Reader:
    """Opens an archive by reading the header of each member.

    Raises:
      CheckpointError: a member is no ``.npy`` array, holds Python objects, or does not fit its size.
    """
    entries: dict[str, Strided] = {}
    manifest = None
    for member_name, member in archive.items():
        name = member_name.removesuffix(".npy")
        if name == member_name:
            raise CheckpointError(f"{member.where} is no .npy array. Expected an archive of numpy.savez.")
        entry = _entry(member, name, file.size)
        if name == KEY:
            manifest = bytes(raw(entry.box((0,) * len(entry.shape), entry.shape)))
        else:
            entries[name] = entry
    return Reader("npz", entries, {}, manifest, True, file.sha256)


def _entry(member: Member, name: str, limit: int) -> Strided:
    damaged = lambda why: CheckpointError(f"{member.where} is damaged: {why}.")
    head = member.head(12)
    if len(head) < 10 or head[:6] != b"\x93NUMPY" or head[6] not in (1, 2, 3):
        raise damaged("it does not start like a .npy array")
    wide = head[6] > 1
    length = struct.unpack_from("<I" if wide else "<H", head, 8)[0] if len(head) == 12 else 0
    start = (12 if wide else 10) + length
    if not 0 < length <= _LONGEST_HEADER or start > member.size:
        raise damaged(f"its header claims {length} bytes")
    shape, fortran, dtype = _parse(member.head(start), damaged, name)
    strides = c_strides(shape[::-1], dtype.itemsize)[::-1] if fortran else None
    out = strided(member, start, shape, dtype, strides, name, max(limit, member.size))
    expected = start + math.prod(shape) * dtype.itemsize
    if expected != member.size:
        raise damaged(f"{shape} {dtype} takes {expected} bytes, but {member.size} are stored")
    return out


def _parse(head: bytes, damaged: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    text = head[12 if head[6] > 1 else 10 :].decode("latin1")
    facts = dict(_FACT.findall(text))
    if not _HEADER.fullmatch(text) or set(facts) != {"descr", "fortran_order", "shape"}:
        if "'descr': [" in text:
            raise CheckpointError(f"'{name}' is a structured array. Expected plain numbers.")
        raise damaged("its header cannot be read")
    shape = tuple(int(n.strip("L")) for n in facts["shape"][1:-1].replace(" ", "").split(",") if n)
    return shape, facts["fortran_order"] == "True", _dtype(facts["descr"][1:-1], name, damaged)


def _dtype(text: str, name: str, damaged: Any) -> np.dtype:
    if text[1:2] == "O" or text == "O":
        raise CheckpointError(f"'{name}' holds pickled Python objects, which are not read. Expected numbers.")
    if text[:1] == ">":
        raise CheckpointError(f"'{name}' has dtype {text}. Expected little-endian numbers.")
    if text in ("|V2", "<V2"):  # the only dtype of 2 bytes that numpy forgets
        return np.dtype(ml_dtypes.bfloat16)
    if text[1:2] in "VSU" or text == "<f1":
        hint = " numpy.savez forgets the names of float8 and int4: write them with transferjax.io.save."
        raise CheckpointError(f"'{name}' has dtype {text}. Expected numbers.{hint}")
    if text not in _PLAIN:
        raise damaged(f"its dtype {text} is no number")
    return np.dtype(text)


def write_npz(file: BinaryIO, arrays: Mapping[str, Callable[[], np.ndarray]], manifest: Callable[[], str]) -> None:
    """Writes an uncompressed archive that ``numpy.load`` reads; dtypes unknown to numpy go as unsigned integers.

    Args:
      file: open for writing and seeking.
      arrays: functions that give each array, C-contiguous, when its turn comes.
      manifest: gives what is stored as one more member of bytes; asked after the arrays are written.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            _write(archive, name, array())
        _write(archive, KEY, np.frombuffer(manifest().encode(), np.uint8))


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype under which numpy can keep the same bits.

    >>> import ml_dtypes
    >>> stored_dtype(np.dtype(ml_dtypes.bfloat16)), stored_dtype(np.dtype(np.float32))
    (dtype('uint16'), dtype('float32'))
    """
    return dtype if dtype.str in _PLAIN else np.dtype(f"u{dtype.itemsize}")


def _write(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
    with archive.open(info, "w", force_zip64=True) as member:
        stored = array.view(stored_dtype(array.dtype))
        np.lib.format.write_array_header_1_0(member, np.lib.format.header_data_from_array_1_0(stored))
        member.write(raw(stored))
