"""A reader of pickled *data*: no object is ever constructed, no function of the stream is ever called.

Python's ``pickle.Unpickler`` imports what the stream names and allocates what the stream claims. This machine knows
the opcodes for plain data only, takes every length from bytes that are really there, and looks up the few names that
tensors need in a table of our own; any other name raises and is printed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from transferjax._errors import CheckpointError

_MARK = object()
_LONGEST_INTEGER = 64
_BROKEN = (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error, RecursionError)


class Forbidden(CheckpointError):
    """The stream names a function or class that is no data."""


class Global:
    """A name in the stream that stands for itself: a dtype, or a class of storages."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


class Buffer(Protocol):
    """What a pickle is read from: ``bytes``, or something that fetches them as they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def find(self, what: bytes, start: int, /) -> int: ...


class Reader:
    """Reads pickles that stand one after another in a buffer.

    Args:
      data: the bytes.
      names: ``{"module.name": value}`` of what the stream may name. A function among the values may be called by the
        stream; anything else is only data.
      where: the file, for errors.
    """

    def __init__(self, data: Buffer, names: Mapping[str, Any], where: str):
        self.data, self.names, self.where = data, names, where
        self.position = 0

    def load(self, persistent: Callable[[Any], Any] | None = None) -> Any:
        """The next pickle.

        Args:
          persistent: resolves persistent ids (torch: storages).

        Raises:
          CheckpointError: the stream is damaged, or names something that is no data.
        """
        try:
            return _Run(self, persistent).run()
        except CheckpointError:
            raise
        except _BROKEN as error:
            raise CheckpointError(
                f"{self.where} has a damaged pickle at byte {self.position}: {type(error).__name__}."
            ) from None

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise CheckpointError(
                f"{self.where} is truncated: its pickle needs {count} bytes at position {self.position}, "
                f"but ends at {len(self.data)}."
            )
        out = bytes(self.data[self.position : end])
        self.position = end
        return out

    def line(self) -> str:
        """Text up to the next newline."""
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise CheckpointError(f"{self.where} is truncated: a name in its pickle has no end.")
        out = bytes(self.data[self.position : end]).decode("utf-8", "replace")
        self.position = end + 1
        return out


def mapping(items: Iterable[Any] = ()) -> dict[Any, Any]:
    """A dict whose keys are plain: hashing a shared nested tuple would take exponential time."""
    out = {}
    for key, value in items:
        if not isinstance(key, str | int | float | bytes):
            raise ValueError
        out[key] = value
    return out


class _Run:
    """One pickle being read: its stack and memo."""

    def __init__(self, reader: Reader, persistent: Callable[[Any], Any] | None):
        self.reader, self.persistent = reader, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        reader, data, stack = self.reader, self.reader.data, self.stack
        while True:
            if reader.position >= len(data):
                raise CheckpointError(f"{reader.where} is truncated: its pickle has no end.")
            code = data[reader.position]
            reader.position += 1
            if code == 0x2E:  # STOP
                if len(stack) != 1 or stack[0] is _MARK:
                    raise ValueError
                return stack[0]
            action = _ACTIONS.get(code)
            if action is None:
                raise CheckpointError(
                    f"{reader.where} has the pickle opcode 0x{code:02x} at byte {reader.position - 1}, which is not "
                    "plain data. Expected tensors, numbers, strings and containers of them."
                )
            action(self)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError
        return value

    def until_mark(self) -> list[Any]:
        items = []
        while True:
            value = self.stack.pop()
            if value is _MARK:
                return items[::-1]
            items.append(value)

    def number(self, form: str) -> int:
        return struct.unpack(form, self.reader.take(struct.calcsize(form)))[0]

    def text(self, length: int) -> None:
        self.stack.append(self.reader.take(length).decode("utf-8", "surrogatepass"))

    def raw(self, length: int) -> None:
        self.stack.append(self.reader.take(length))

    def integer(self, length: int) -> None:
        if not 0 <= length <= _LONGEST_INTEGER:
            raise ValueError
        self.stack.append(int.from_bytes(self.reader.take(length), "little", signed=True))

    def name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self.reader.names:
            raise Forbidden(
                f"{self.reader.where} names '{full[:200]}', which is no tensor and no plain data; it was not imported. "
                "Expected a state dict: save one with torch.save(model.state_dict(), path)."
            )
        self.stack.append(self.reader.names[full])

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(arguments, tuple) or isinstance(function, Global) or not callable(function):
            raise ValueError
        self.stack.append(function(*arguments))

    def extend_list(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise ValueError
        self.stack[-1].update(mapping(zip(items[::2], items[1::2])))

    def mark_dict(self) -> None:
        items = self.until_mark()
        self.stack.append({})
        self.set_items(items)

    def mark_tuple(self, count: int | None = None) -> None:
        items = self.until_mark() if count is None else [self.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(items))

    def put(self, key: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError
        self.memo[key] = self.stack[-1]

    def persist(self) -> None:
        if self.persistent is None:
            raise ValueError
        self.stack.append(self.persistent(self.pop()))

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError
        self.name(module, name)

    def protocol(self) -> None:
        if not 2 <= self.number("<B") <= 5:
            raise ValueError


_ACTIONS: dict[int, Callable[[_Run], Any]] = {
    0x80: _Run.protocol,
    0x95: lambda r: r.reader.take(8),  # FRAME: lengths are not needed
    0x28: lambda r: r.stack.append(_MARK),
    0x30: _Run.pop,
    0x4E: lambda r: r.stack.append(None),
    0x88: lambda r: r.stack.append(True),
    0x89: lambda r: r.stack.append(False),
    0x4A: lambda r: r.stack.append(r.number("<i")),
    0x4B: lambda r: r.stack.append(r.number("<B")),
    0x4D: lambda r: r.stack.append(r.number("<H")),
    0x8A: lambda r: r.integer(r.number("<B")),
    0x8B: lambda r: r.integer(r.number("<i")),
    0x47: lambda r: r.stack.append(r.number(">d")),
    0x58: lambda r: r.text(r.number("<I")),
    0x8C: lambda r: r.text(r.number("<B")),
    0x8D: lambda r: r.text(r.number("<Q")),
    0x55: lambda r: r.text(r.number("<B")),
    0x54: lambda r: r.text(r.number("<i")),
    0x42: lambda r: r.raw(r.number("<I")),
    0x43: lambda r: r.raw(r.number("<B")),
    0x8E: lambda r: r.raw(r.number("<Q")),
    0x5D: lambda r: r.stack.append([]),
    0x7D: lambda r: r.stack.append({}),
    0x8F: lambda r: r.stack.append([]),  # EMPTY_SET, kept as a list
    0x29: lambda r: r.stack.append(()),
    0x6C: lambda r: r.stack.append(r.until_mark()),
    0x64: _Run.mark_dict,
    0x74: _Run.mark_tuple,
    0x85: lambda r: r.mark_tuple(1),
    0x86: lambda r: r.mark_tuple(2),
    0x87: lambda r: r.mark_tuple(3),
    0x61: lambda r: r.extend_list([r.pop()]),
    0x65: lambda r: r.extend_list(r.until_mark()),
    0x90: lambda r: r.extend_list(r.until_mark()),  # ADDITEMS
    0x73: lambda r: r.set_items([r.pop(), r.pop()][::-1]),
    0x75: lambda r: r.set_items(r.until_mark()),
    0x71: lambda r: r.put(r.number("<B")),
    0x72: lambda r: r.put(r.number("<I")),
    0x94: lambda r: r.put(len(r.memo)),
    0x68: lambda r: r.stack.append(r.memo[r.number("<B")]),
    0x6A: lambda r: r.stack.append(r.memo[r.number("<I")]),
    0x63: lambda r: r.name(r.reader.line(), r.reader.line()),
    0x93: _Run.stack_name,
    0x52: _Run.reduce,
    0x62: _Run.pop,  # BUILD: attributes of a dict or tensor are no weights
    0x51: _Run.persist,
}
