"""Safetensors files: ``u64 header length | JSON header | data``; read and written here, of every dtype they know."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from transferjax._errors import CheckpointError
from transferjax.io._boxes import raw
from transferjax.io._bytes import FileBytes, read
from transferjax.io._reader import Reader, Strided, is_count, strided

KEY = "transferjax"
_LONGEST_HEADER = 100_000_000
_LOOSE = 1 << 26
"""Bytes that are written before they are sent to the disk: 64 MiB."""
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "C64": np.complex64,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "BOOL": np.bool_,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(file: FileBytes) -> Reader:
    """Opens a file by reading its header; the data is not touched.

    Raises:
      CheckpointError: header, counts or offsets do not fit the file.
    """
    header, start = _header(file)
    facts = header.pop("__metadata__", {})
    if not isinstance(facts, dict) or not all(isinstance(v, str) for v in facts.values()):
        raise CheckpointError(f"{file.where} is damaged: its __metadata__ is no mapping from text to text.")
    entries: dict[str, Strided] = {}
    spans = []
    for name, fact in header.items():
        entries[name], span = _entry(file, name, fact, start)
        spans.append((span, name))
    _check_spans(file, sorted(spans), file.size - start)
    manifest = facts.pop(KEY, None)
    return Reader("safetensors", entries, facts, manifest, False, file.sha256)


def _header(file: FileBytes) -> tuple[dict[str, Any], int]:
    (length,) = struct.unpack("<Q", read(file, 0, 8))
    if length > min(file.size - 8, _LONGEST_HEADER):
        raise CheckpointError(
            f"{file.where} is truncated or no safetensors file: its header claims {length} bytes of {file.size}."
        )
    value = parse_json(bytes(read(file, 8, length)), f"the header of {file.where}")
    if not isinstance(value, dict):
        raise CheckpointError(f"the header of {file.where} is no JSON object. It is damaged.")
    return value, 8 + length


def _entry(file: FileBytes, name: str, fact: Any, start: int) -> tuple[Strided, tuple[int, int]]:
    damaged = lambda why: CheckpointError(f"'{name}' in {file.where} is damaged: {why}.")
    if not isinstance(fact, dict) or set(fact) != {"dtype", "shape", "data_offsets"}:
        raise damaged("expected dtype, shape and data_offsets")
    kind, shape, span = fact["dtype"], fact["shape"], fact["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise damaged(f"dtype {str(kind)[:40]} is none of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(map(is_count, shape)):
        raise damaged("its shape is no list of counts")
    if not isinstance(span, list) or len(span) != 2 or not all(map(is_count, span)):
        raise damaged("its data_offsets are no two counts")
    size = math.prod(shape) * DTYPES[kind].itemsize
    if span[1] - span[0] != size:
        raise damaged(f"{tuple(shape)} {DTYPES[kind]} takes {size} bytes, but {span[1] - span[0]} are stored")
    return strided(file, start + span[0], tuple(shape), DTYPES[kind], None, name, file.size), (span[0], span[1])


def _check_spans(file: FileBytes, spans: list[tuple[tuple[int, int], str]], size: int) -> None:
    end = 0
    for (first, last), name in spans:
        if first != end:
            raise CheckpointError(
                f"{file.where} is damaged: '{name}' starts at byte {first} of the data; the one before ends at {end}."
            )
        end = last
    if end != size:
        raise CheckpointError(f"{file.where} is truncated or damaged: its arrays take {end} bytes, it holds {size}.")


def parse_json(data: bytes, where: str) -> Any:
    """JSON without repeated names.

    Raises:
      CheckpointError: it is no JSON, or an object names something twice.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{where} names '{twice}' twice. Expected each name once.")
        return out

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: it is no JSON ({type(error).__name__}).") from None


def write_safetensors(
    file: BinaryIO,
    arrays: Mapping[str, Callable[[], np.ndarray]],
    shapes: Mapping[str, Any],
    facts: Callable[[], dict[str, str]],
) -> None:
    """Writes one array after another, largest elements first, so that each starts at a multiple of its element size.

    Two arrays are in memory at a time: the one that is written, and the next. What is written goes to the disk on the
    way: a ``sync`` at the end would have to wait for all of it.

    Args:
      file: open for writing.
      arrays: functions that give each array, C-contiguous, when its turn comes.
      shapes: what those arrays will be.
      facts: gives text by name for ``__metadata__``; asked before and after the arrays are written, so that it may
        hold their digests: only its length must be the same.
    """
    order, loose = in_order(shapes), 0
    first = _layout(order, shapes, facts())
    file.write(first)

    def write(data: memoryview) -> None:
        nonlocal loose
        file.write(data)
        loose += len(data)
        if loose >= _LOOSE:
            file.flush()
            os.fsync(file.fileno())
            loose = 0

    with ThreadPoolExecutor(1) as pool:  # one array is written while the next is made
        waiting: Future[None] | None = None
        for name in order:
            array = arrays[name]()
            if waiting is not None:
                waiting.result()
            waiting = pool.submit(write, raw(array))
            del array
        if waiting is not None:
            waiting.result()
    last = _layout(order, shapes, facts())
    if last != first:
        file.seek(0)
        file.write(last)


def in_order(shapes: Mapping[str, Any]) -> list[str]:
    """The names of arrays as they are written."""
    return sorted(shapes, key=lambda name: (-shapes[name].dtype.itemsize, name))


def _layout(order: list[str], shapes: Mapping[str, Any], facts: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": facts} if facts else {}
    end = 0
    for name in order:
        shape, dtype = tuple(shapes[name].shape), np.dtype(shapes[name].dtype)
        first, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
