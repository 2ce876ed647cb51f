"""PyTorch files (``.pth``, ``.pt``, ``.bin``) without PyTorch: the zip form and the older stream."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from transferjax._errors import CheckpointError
from transferjax.io._bytes import Bytes, FileBytes, Window, read
from transferjax.io._pickle import Forbidden, Global, mapping
from transferjax.io._pickle import Reader as PickleReader
from transferjax.io._reader import Reader, Strided, is_count, strided
from transferjax.io._zip import Member

MAGIC = 0x1950A86A20F9469CFC6C
_DEEPEST, _MOST, _LONGEST_PICKLE = 100, 1_000_000, 1 << 28
_STORAGES = {
    "Float": np.float32, "Half": np.float16, "Double": np.float64, "Long": np.int64, "Int": np.int32,
    "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_, "BFloat16": ml_dtypes.bfloat16,
    "ComplexFloat": np.complex64, "ComplexDouble": np.complex128, "Untyped": np.uint8,
}  # fmt: skip
_DTYPES = {
    "float32": np.float32, "float": np.float32, "float16": np.float16, "half": np.float16, "float64": np.float64,
    "double": np.float64, "int64": np.int64, "long": np.int64, "int32": np.int32, "int": np.int32,
    "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32,
    "uint64": np.uint64, "bool": np.bool_, "bfloat16": ml_dtypes.bfloat16, "complex64": np.complex64,
    "complex128": np.complex128, "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz, "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of elements in the file, named by ``key``; ``first`` is where a view of it begins."""

    key: str
    dtype: np.dtype
    count: int
    first: int = 0

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the stream before its bytes are looked up."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype
    lazy: tuple[str, ...] = ()


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None, *, dtype=None):
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError
    lazy = tuple(map(str, metadata)) if isinstance(metadata, dict) else ()
    return Tensor(storage, offset, size, stride, dtype or storage.dtype, lazy)


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    return _tensor(storage, offset, size, stride, metadata=metadata, dtype=np.dtype(_DTYPES[dtype.name[6:]]))


def _first(data, *rest):
    if not isinstance(data, Tensor):
        raise ValueError
    return data


def _typed(function, kind, arguments, state=None):
    if isinstance(function, Global) or not callable(function):
        raise ValueError
    return function(*arguments)


_NAMES: dict[str, Any] = {
    "collections.OrderedDict": mapping,
    "torch.Size": lambda size=(): tuple(size),
    "torch.device": lambda *parts: ":".join(map(str, parts)),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _typed,
    **{name: Global(name) for name in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")},
    **{f"torch.{name}": Global(f"torch.{name}") for name in _DTYPES},
    **{f"{m}.{name}Storage": Global(name) for name in _STORAGES for m in ("torch", "torch.storage")},
}


def read_zip(file: FileBytes, archive: Mapping[str, Member]) -> Reader:
    """A file of ``torch.save`` since 1.6: an archive with ``data.pkl`` and one member per storage."""
    pickles = [name for name in archive if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{file.where} holds {len(pickles)} members named data.pkl. Expected one.")
    root = pickles[0][: -len("data.pkl")]
    order = archive.get(f"{root}byteorder")
    if order is not None and read(order, 0, order.size) != b"little":
        raise CheckpointError(f"{file.where} holds big-endian numbers. Expected little-endian: save it again there.")
    source = archive[pickles[0]]
    if source.size > _LONGEST_PICKLE:
        raise CheckpointError(f"{source.where} claims {source.size} bytes of names, more than {_LONGEST_PICKLE}.")
    try:
        value = PickleReader(read(source, 0, source.size), _NAMES, file.where).load(_storage)
    except Forbidden as error:
        if f"{root}constants.pkl" not in archive:
            raise
        raise CheckpointError(f"{error} This is a TorchScript program; it holds code.") from None

    def find(storage: Storage) -> Bytes:
        member = archive.get(f"{root}data/{storage.key}")
        if member is None:
            raise CheckpointError(f"{file.where} is damaged: it has no member '{root}data/{storage.key}'.")
        return member

    return _finish(file, value, find, "torch", checked=True)


def read_stream(file: FileBytes) -> Reader:
    """The older form of ``torch.save``: five pickles, then each storage after its element count."""
    reader = PickleReader(_Lazy(file), _NAMES, file.where)
    if reader.load() != MAGIC or reader.load() != 1001:
        raise CheckpointError(
            f"{file.where} is a pickle, but none of torch.save. Expected a state dict saved by PyTorch."
        )
    system = reader.load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{file.where} holds big-endian numbers. Expected little-endian: save it again there.")
    storages: dict[str, Storage] = {}
    value = reader.load(lambda pid: _remember(_storage(pid), storages, file.where))
    keys = reader.load()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise CheckpointError(f"{file.where} is damaged: its list of storages does not match its tensors.")
    places: dict[str, Bytes] = {}
    position = reader.position
    for key in map(str, keys):
        storage = storages[key]
        (count,) = struct.unpack("<q", read(file, position, 8))
        if count != storage.count:
            raise CheckpointError(
                f"{file.where} is damaged: storage '{key}' has {count} elements, but its tensors say {storage.count}."
            )
        places[key] = Window(file, position + 8, storage.bytes, file.where)
        position += 8 + storage.bytes
    if position != file.size:
        raise CheckpointError(f"{file.where} is damaged: it goes on after its last storage, at byte {position}.")
    return _finish(file, value, lambda storage: places[storage.key], "torch-legacy", checked=False)


class _Lazy:
    """A file as a sequence of bytes, fetched 256 KiB at a time as the pickle machine advances."""

    STEP = 1 << 18

    def __init__(self, file: FileBytes):
        self._file, self._have = file, bytearray()

    def __len__(self) -> int:
        return self._file.size

    def _upto(self, end: int) -> None:
        have = len(self._have)
        if end > _LONGEST_PICKLE:
            raise CheckpointError(f"{self._file.where} is damaged: its pickle goes on beyond {_LONGEST_PICKLE} bytes.")
        if end > have:
            more = min(max(end, have + self.STEP), self._file.size) - have
            self._have += read(self._file, have, more)

    def __getitem__(self, index: Any) -> Any:
        self._upto(index.stop if isinstance(index, slice) else index + 1)
        return self._have[index]

    def find(self, what: bytes, start: int) -> int:
        self._upto(min(start + 1000, self._file.size))
        return self._have.find(what, start, start + 1000)


def _storage(pid: Any) -> Storage:
    kind, storage_type, key, _, count, *view = pid
    if kind != "storage" or not isinstance(storage_type, Global) or not is_count(count):
        raise ValueError
    first = view[0][1] if view and view[0] is not None else 0
    if not is_count(first):
        raise ValueError
    return Storage(str(key), np.dtype(_STORAGES[storage_type.name]), count, first)


def _remember(storage: Storage, known: dict[str, Storage], where: str) -> Storage:
    before = known.setdefault(storage.key, storage)
    if (before.dtype, before.count) != (storage.dtype, storage.count):
        raise CheckpointError(f"{where} is damaged: storage '{storage.key}' is declared in two different ways.")
    return storage


def _finish(file: FileBytes, value: Any, find: Any, format: str, *, checked: bool) -> Reader:
    entries: dict[str, Strided] = {}
    metadata: dict[str, Any] = {}
    for path, leaf in _flatten(value, file.where):
        if path in entries or path in metadata:
            raise CheckpointError(f"{file.where} has two entries that are both named '{path}'.")
        if not isinstance(leaf, Tensor):
            metadata[path] = leaf
            continue
        if leaf.lazy:
            raise CheckpointError(
                f"'{path}' in {file.where} is stored with lazy bits ({', '.join(leaf.lazy)}), which are not applied "
                "here. Save tensor.resolve_conj().resolve_neg()."
            )
        source, width = find(leaf.storage), leaf.dtype.itemsize
        if source.size != leaf.storage.bytes:
            raise CheckpointError(
                f"{source.where} is damaged: it has {source.size} bytes, but '{path}' says {leaf.storage.bytes}."
            )
        if not all(is_count(n) for n in (leaf.offset, *leaf.size, *leaf.stride)):
            raise CheckpointError(f"'{path}' in {file.where} is damaged: its shape or strides are no counts.")
        offset = leaf.storage.first * leaf.storage.dtype.itemsize + leaf.offset * width
        strides = tuple(s * width for s in leaf.stride)
        entries[path] = strided(source, offset, leaf.size, leaf.dtype, strides, path, file.size)
    return Reader(format, entries, metadata, None, checked, file.sha256)


def _flatten(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """``(dotted path, tensor or plain value)`` of nested containers; a list of plain values stays one value."""
    if isinstance(value, Tensor):
        yield "tensor", value
        return
    todo: list[tuple[str, Any, int]] = [("", value, 0)]
    for _ in range(_MOST):
        if not todo:
            return
        path, node, depth = todo.pop()
        inner = _children(node)
        if inner is None:
            yield path or "value", _plain(node)
        elif depth > _DEEPEST:
            raise CheckpointError(f"{where} is nested more than {_DEEPEST} deep at '{path[:100]}'.")
        else:
            todo += [(f"{path}.{key}" if path else str(key), child, depth + 1) for key, child in reversed(inner)]
    raise CheckpointError(f"{where} has more than {_MOST} entries. Expected a state dict.")


def _plain(node: Any) -> Any:
    if isinstance(node, list | tuple):
        return type(node)(map(_plain, node))
    if callable(node) or isinstance(node, Global | Storage):
        return node.name if isinstance(node, Global) else type(node).__name__
    return node


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(node, dict) and node:
        return list(node.items())
    if isinstance(node, list | tuple) and any(isinstance(n, dict | list | tuple | Tensor) for n in node):
        return list(enumerate(node))
    return None
