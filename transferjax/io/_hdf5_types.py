"""HDF5's messages: shapes, element types, and attributes, decoded strictly."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

Damaged = Callable[[str], Exception]
UNDEFINED = (1 << 64) - 1
_INTEGER, _FLOAT, _STRING, _OPAQUE, _COMPOUND, _ENUM, _VARIABLE = 0, 1, 3, 5, 6, 8, 9
_FLOATS = {
    (2, 15, 10, 5, 10, 15): np.float16, (4, 31, 23, 8, 23, 127): np.float32, (8, 63, 52, 11, 52, 1023): np.float64,
    (2, 15, 7, 8, 7, 127): ml_dtypes.bfloat16,
    (1, 7, 3, 4, 3, 7): ml_dtypes.float8_e4m3fn, (1, 7, 2, 5, 2, 15): ml_dtypes.float8_e5m2,
}  # fmt: skip
"""``(bytes, place of the sign, place and size of the exponent, size of the mantissa, bias)``."""
UNNAMED = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
}
"""Dtypes that Keras stores as raw bytes, with their names in the attribute ``dtype``."""


def dataspace(data: bytes, damaged: Damaged) -> tuple[int, ...]:
    """The shape; scalars have ``()``."""
    if len(data) < 4 or data[0] not in (1, 2) or data[1] > 32:
        raise damaged("its shape cannot be read")
    start = 8 if data[0] == 1 else 4
    if data[0] == 2 and data[3] == 2:
        raise damaged("it has no elements and no shape. Expected an array")
    if len(data) < start + 8 * data[1]:
        raise damaged("its shape is cut off")
    shape = struct.unpack_from(f"<{data[1]}Q", data, start)
    if any(n >= 1 << 48 for n in shape):
        raise damaged(f"shape {shape} is beyond any array")
    return shape


def element(data: bytes, damaged: Damaged) -> np.dtype | None:
    """The dtype of numbers; ``V<n>`` for raw bytes; ``None`` for anything else.

    Raises:
      the error of ``damaged``: big-endian, or bits that no dtype has.
    """
    if len(data) < 8 or not 1 <= data[0] >> 4 <= 4:
        raise damaged("its element type cannot be read")
    kind, bits, size = data[0] & 15, int.from_bytes(data[1:4], "little"), int.from_bytes(data[4:8], "little")
    if kind in (_INTEGER, _FLOAT) and bits & 1:
        raise damaged("it holds big-endian numbers. Expected little-endian")
    if kind == _INTEGER:
        if size not in (1, 2, 4, 8) or data[8:12] != struct.pack("<HH", 0, 8 * size) or bits & ~0b1000:
            raise damaged(f"it holds integers of {size} bytes that no dtype has")
        return np.dtype(f"<{'i' if bits & 8 else 'u'}{size}")
    if kind == _FLOAT:
        return _float(data, bits, size, damaged)
    if kind == _OPAQUE and 0 < size <= 16:
        return np.dtype(f"V{size}")
    if kind == _ENUM and data[20 : 33 if data[0] >> 4 == 3 else 38] in _BOOL and size == 1 and bits & 0xFFFF == 2:
        return np.dtype(np.bool_) if element(data[8:20], damaged) == np.int8 else None
    if kind == _COMPOUND and bits & 0xFFFF == 2 and size in (8, 16) and data[0] >> 4 == 1:
        real, imaginary = (_member(data, at, damaged) for at in (8, 68))
        half = np.dtype(f"<f{size // 2}")
        return np.dtype(f"<c{size}") if (real, imaginary) == (("r", 0, half), ("i", size // 2, half)) else None
    return None


_BOOL = (b"FALSE\0\0\0TRUE\0\0\0\0\0\1", b"FALSE\0TRUE\0\0\1")


def _member(data: bytes, at: int, damaged: Damaged) -> tuple[str, int, np.dtype | None]:
    """``(name, offset, dtype)`` of a field of a record."""
    if len(data) < at + 60 or data[at + 12]:
        return "", 0, None
    name = data[at : at + 8].rstrip(b"\0").decode("latin1")
    kind = data[at + 40 : at + 60]
    return name, int.from_bytes(data[at + 8 : at + 12], "little"), element(kind, damaged) if kind[0] & 15 == 1 else None


def _float(data: bytes, bits: int, size: int, damaged: Damaged) -> np.dtype:
    if len(data) < 20:
        raise damaged("its element type is cut off")
    offset, precision, place, exponent, start, mantissa, bias = struct.unpack_from("<HHBBBBI", data, 8)
    facts = (size, bits >> 8 & 255, place, exponent, mantissa, bias)
    if facts not in _FLOATS or offset or precision != 8 * size or start or bits & 0xFF != 0x20:
        raise damaged(f"it holds floats of {size} bytes that no dtype has")
    return np.dtype(_FLOATS[facts])


def text_size(data: bytes) -> int | None:
    """The length of texts of a fixed length; 0 for those of any length; ``None`` if they are no texts."""
    kind = data[0] & 15 if len(data) >= 8 else -1
    if kind == _STRING:
        return int.from_bytes(data[4:8], "little")
    return 0 if kind == _VARIABLE and data[1] & 15 == 1 and data[4:8] == b"\x10\0\0\0" else None


def attribute(data: bytes, heap: Callable[[int, int], bytes], damaged: Damaged) -> tuple[str, Any] | None:
    """``(name, value)``: a text, a list of texts, or an array of numbers; ``None`` if it is something else.

    Args:
      data: the message.
      heap: gives the bytes of an object by the address of its collection and its number.
      damaged: makes the error.
    """
    if len(data) < 8 or data[0] not in (1, 2, 3):
        raise damaged("an attribute cannot be read")
    old, position = data[0] == 1, 8 + (data[0] == 3)
    parts = []
    for size in struct.unpack_from("<3H", data, 2):
        parts.append(data[position : position + size])
        position += -(-size // 8) * 8 if old else size
        if len(parts[-1]) != size:
            raise damaged("an attribute is cut off")
    name = parts[0].split(b"\0")[0].decode("utf-8", "replace")
    if not old and data[1]:
        return None  # types that are stored elsewhere
    within = lambda why: damaged(f"attribute '{name[:60]}': {why}")
    shape = () if parts[2][3:4] == b"\2" and parts[2][:1] == b"\2" else dataspace(parts[2], within)
    value = _value(parts[1], shape, data[position:], heap, within)
    return None if value is None else (name, value)


def _value(kind: bytes, shape: tuple[int, ...], data: bytes, heap: Any, damaged: Damaged) -> Any:
    size, count = text_size(kind), math.prod(shape)
    if size is None:
        dtype = element(kind, damaged)
        if dtype is None or dtype.kind == "V":
            return None
        if len(data) < count * dtype.itemsize:
            raise damaged("it is cut off")
        return np.frombuffer(data, dtype, count).reshape(shape)
    step = size or 16
    if len(data) < count * step:
        raise damaged("it is cut off")
    texts = []
    for start in range(0, count * step, step):
        item = data[start : start + step]
        if not size:
            length, address, number = struct.unpack("<IQI", item)
            item = heap(address, number)[:length] if length else b""
            if len(item) != length:
                raise damaged("its text is cut off")
        try:
            texts.append(item.split(b"\0")[0].decode("utf-8"))
        except UnicodeDecodeError:
            raise damaged("its text is no UTF-8") from None
    return texts if shape else texts[0]
