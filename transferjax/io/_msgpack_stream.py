"""The encoding of msgpack: values by position, with binary data left where it lies."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

from transferjax._errors import CheckpointError
from transferjax.io._bytes import Bytes, Window, check_range, read

_AHEAD = 1 << 9
_MOST, _DEEPEST, _LONGEST_TEXT = 5_000_000, 64, 1 << 28
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
_NUMBERS |= {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_LENGTHS = {
    **{0xD9 + i: ("text", form) for i, form in enumerate((">B", ">H", ">I"))},
    **{0xC4 + i: ("bytes", form) for i, form in enumerate((">B", ">H", ">I"))},
    **{0xC7 + i: ("extension", form) for i, form in enumerate((">B", ">H", ">I"))},
    0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("mapping", ">H"), 0xDF: ("mapping", ">I"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Extension:
    """A value of a type that msgpack itself does not know: ``head`` are the same bytes as ``data``, for small reads."""

    code: int
    data: Window
    head: Window


class Cursor:
    """Reads values one after another.

    Binary data become a :class:`Window`, extensions an :class:`Extension`; neither is read.

    Args:
      source: what these refer to.
      head: what everything else is read from, if not ``source``.
    """

    def __init__(self, source: Bytes, head: Bytes | None = None):
        self._source, self._head = source, head or source
        self.where, self.position = source.where, 0
        self._buffer, self._start, self._count = b"", 0, 0

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where} is damaged or truncated, or no msgpack file of Flax: {why}.")

    def value(self, depth: int = 0) -> Any:
        """The next value; mappings and lists are ``dict`` and ``list``.

        Raises:
          CheckpointError: it is damaged, nested too deeply, or names something twice.
        """
        self._count += 1
        if self._count > _MOST or depth > _DEEPEST:
            raise self.damaged("it has too many values, or they are nested too deeply")
        (mark,) = self._take(1)
        if mark < 0x80:
            return mark
        if mark >= 0xE0:
            return mark - 0x100
        if mark in _CONSTANTS:
            return _CONSTANTS[mark]
        if mark in _NUMBERS:
            return struct.unpack(_NUMBERS[mark], self._take(struct.calcsize(_NUMBERS[mark])))[0]
        kind, length = self._length(mark)
        if kind == "text":
            return self._text(length)
        if kind == "bytes":
            return self._window(length)
        if kind == "extension":
            code, start = struct.unpack(">b", self._take(1))[0], self.position
            return Extension(code, self._window(length), Window(self._head, start, length, self.where))
        if length > self._source.size - self.position:
            raise self.damaged(f"a {kind} at byte {self.position} claims {length} values")
        if kind == "list":
            return [self.value(depth + 1) for _ in range(length)]
        return self._mapping(length, depth)

    def _length(self, mark: int) -> tuple[str, int]:
        if mark < 0xC0:
            kind = "mapping" if mark < 0x90 else "list" if mark < 0xA0 else "text"
            return kind, mark & (0x1F if kind == "text" else 0x0F)
        if 0xD4 <= mark <= 0xD8:
            return "extension", 1 << (mark - 0xD4)
        if mark not in _LENGTHS:
            raise self.damaged(f"byte {self.position - 1} begins no value")
        kind, form = _LENGTHS[mark]
        return kind, struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _mapping(self, length: int, depth: int) -> dict[Any, Any]:
        out: dict[Any, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if isinstance(key, bool) or not isinstance(key, str | int) or min(str(key), default=" ") < " ":
                raise self.damaged(f"a name before byte {self.position} is no text")
            if str(key) in out:
                raise self.damaged(f"'{key}' comes twice in one mapping")
            out[str(key)] = self.value(depth + 1)
        return out

    def _text(self, length: int) -> str:
        if length > _LONGEST_TEXT:
            raise self.damaged(f"a text of {length} bytes")
        try:
            return bytes(self._take(length)).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"the text before byte {self.position} is no UTF-8") from None

    def _window(self, length: int) -> Window:
        out = Window(self._source, self.position, length, self.where)
        self.position += length
        return out

    def _take(self, count: int) -> bytes:
        first = self.position - self._start
        if first < 0 or first + count > len(self._buffer):
            check_range(self._source, self.position, count)
            size = min(max(count, _AHEAD), self._source.size - self.position)
            self._buffer, self._start, first = bytes(read(self._head, self.position, size)), self.position, 0
        self.position += count
        return self._buffer[first : first + count]


def pack(value: Any) -> bytes:
    """A text, whole number, truth value, or list of those, as msgpack.

    >>> pack([1, "a", 70000])
    b'\\x93\\x01\\xa1a\\xce\\x00\\x01\\x11p'
    """
    if value is True:
        return b"\xc3"
    if isinstance(value, str):
        data = value.encode()
        return header("text", len(data)) + data
    if isinstance(value, list):
        return header("list", len(value)) + b"".join(map(pack, value))
    return _whole(value)


def _whole(value: int) -> bytes:
    if value < 0x80:
        return bytes([value])
    mark = next(m for m in (0xCC, 0xCD, 0xCE, 0xCF) if value < 1 << 8 * struct.calcsize(_NUMBERS[m]))
    return bytes([mark]) + struct.pack(_NUMBERS[mark], value)


def header(kind: str, length: int) -> bytes:
    """How a text, bytes, an extension (its code follows), a list or a mapping begins."""
    short = {"text": (0xA0, 32), "list": (0x90, 16), "mapping": (0x80, 16)}
    if kind in short and length < short[kind][1]:
        return bytes([short[kind][0] + length])
    forms = [(mark, form) for mark, (known, form) in _LENGTHS.items() if known == kind]
    mark, form = next((m, f) for m, f in forms if length < 1 << 8 * struct.calcsize(f))
    return bytes([mark]) + struct.pack(form, length)
