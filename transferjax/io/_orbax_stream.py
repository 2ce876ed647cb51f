"""Orbax directories written array by array through tensorstore: nothing but the blocks in flight is in memory.

Each process writes an OCDBT database of its own; the first one joins them and adds what Orbax expects around it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from transferjax._errors import CheckpointError
from transferjax.io._beside import sync
from transferjax.io._boxes import Corner, block_shape
from transferjax.io._manifest import BLOCK
from transferjax.io._orbax import SIDECAR, first_line
from transferjax.tree import nest

_BATCH, _ARRAYS = 1 << 26, 128
"""Bytes and arrays that are committed at once: each commit writes one data file."""
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_DICT_KEY = 2


class Block(NamedTuple):
    """The elements ``[low, high)`` of an array, in memory that nothing else will change."""

    path: str
    low: Corner
    high: Corner
    array: np.ndarray


def write_arrays(folder: str, process: int, shapes: Mapping[str, Any], blocks: Iterable[Block], where: str) -> None:
    """Writes this process's arrays; several processes may do so at once.

    Args:
      folder: of the checkpoint.
      process: the number of this process.
      shapes: of every array that is written.
      blocks: the blocks of one array after the other, as ``block_shape`` of 16 MiB cuts them.
      where: what errors call the checkpoint.

    Raises:
      CheckpointError: the system or tensorstore refuses.
    """
    import tensorstore as ts

    root = _database(os.path.join(folder, "state", f"ocdbt.process_{process}"))
    context = ts.Context({"file_io_sync": False})  # every file is forced to the disk once, by finish
    begun: set[str] = set()
    commits: deque[Any] = deque()
    try:
        for batch in _batches(blocks):
            with _guard(where):
                transaction, stores = ts.Transaction(), {}
                for path in dict.fromkeys(block.path for block in batch):
                    new = path not in begun
                    stores[path] = ts.open(
                        _spec(root, path, shapes[path]), create=new, open=not new, assume_metadata=not new,
                        context=context, transaction=transaction,
                    )  # fmt: skip
                    begun.add(path)
                for block in batch:
                    cut = tuple(map(slice, block.low, block.high))
                    part = stores[block.path].result()[cut]
                    part.write(block.array, can_reference_source_data_indefinitely=True).result()
                commits.append(transaction.commit_async())
                if len(commits) > 1:
                    commits.popleft().result()
        with _guard(where):
            while commits:
                commits.popleft().result()
    finally:
        for commit in commits:  # after an error: nothing may be written once the folder is removed
            with contextlib.suppress(Exception):
                commit.result()


def finish(
    folder: str, kinds: Mapping[str, str | None], manifest: str, metadata: Mapping[str, Any], where: str
) -> None:
    """Joins what the processes wrote, and writes all that makes the folder a checkpoint.

    Args:
      folder: of the checkpoint.
      kinds: of every array that was written, as :func:`transferjax.io._host.kind_of` names them.
      manifest: kept beside, with the digests.
      metadata: what ``ocp.metadata`` calls custom.
      where: what errors call the checkpoint.

    Raises:
      CheckpointError: the system or tensorstore refuses.
    """
    begin = time.time_ns()
    state = os.path.join(folder, "state")
    with _guard(where):
        _join(state)
    _write(os.path.join(state, "_METADATA"), json.dumps(_tree(kinds)))
    facts = {
        "item_handlers": {"state": _HANDLER}, "metrics": {}, "performance_metrics": {},
        "init_timestamp_nsecs": begin, "commit_timestamp_nsecs": time.time_ns(), "custom_metadata": dict(metadata),
    }  # fmt: skip
    _write(os.path.join(folder, SIDECAR), manifest)
    _write(os.path.join(folder, "orbax.checkpoint"), "")
    _write(os.path.join(folder, "_CHECKPOINT_METADATA"), json.dumps(facts))
    _write(os.path.join(folder, "commit_success.txt"), f"Checkpoint commit was successful to {where}")
    for at, _, names in os.walk(folder):
        for name in names:
            sync(os.path.join(at, name))


def chunk_shape(shape: Corner, itemsize: int) -> Corner:
    """How an array is cut on disk: into blocks as digests cut it, or even parts of these.

    The last chunk is stored in full, so whole blocks could nearly double an array of little more than one. The largest
    part is taken that fills up no more than a sixteenth, or else the one that fills up least.

    >>> chunk_shape((4096, 4096), 4), chunk_shape((17 << 10, 256), 4)
    ((1024, 4096), (2048, 256))
    """
    block = block_shape(shape, itemsize, BLOCK)
    axis = next((axis for axis, (n, size) in enumerate(zip(block, shape)) if n < size and n > 1), None)
    if axis is None:
        return block
    size, rows = shape[axis], block[axis]
    parts = [rows // n for n in range(1, 65) if rows % n == 0]
    filled = lambda part: -(-size // part) * part - size
    best = next((part for part in parts if filled(part) <= size // 16), min(parts, key=filled))
    return (*block[:axis], best, *block[axis + 1 :])


def _batches(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    batch: list[Block] = []
    for block in blocks:
        batch.append(block)
        if sum(block.array.nbytes for block in batch) >= _BATCH or len(batch) == _ARRAYS:
            yield batch
            batch = []
    if batch:
        yield batch


def _database(folder: str) -> dict[str, Any]:
    config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000, "manifest_kind": "single"}
    base = {"driver": "file", "path": f"{folder}/"}
    return {
        "driver": "ocdbt", "base": base, "config": config, "assume_config": True, "target_data_file_size": 1 << 31,
    }  # fmt: skip


def _spec(root: Mapping[str, Any], path: str, shape: Any) -> dict[str, Any]:
    chunk = chunk_shape(tuple(shape.shape), shape.dtype.itemsize)
    metadata = {
        "shape": list(shape.shape), "data_type": shape.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }  # fmt: skip
    place = {**root, "path": f"{path.replace('/', '.')}/"}
    return {"driver": "zarr3", "kvstore": place, "metadata": metadata, "store_data_equal_to_fill_value": True}


def _join(state: str) -> None:
    import tensorstore as ts

    context = ts.Context()  # one for all: ranges are only copied within it
    parent, transaction = ts.KvStore.open(_database(state), context=context).result(), ts.Transaction(atomic=True)
    for name in sorted(os.listdir(state)):
        if name.startswith("ocdbt.process_"):
            child = ts.KvStore.open(_database(os.path.join(state, name)), context=context).result()
            child.experimental_copy_range_to(parent.with_transaction(transaction)).result()
    transaction.commit_async().result()


def _tree(kinds: Mapping[str, str | None]) -> dict[str, Any]:
    facts = {}
    for keys, path in jax.tree_util.tree_flatten_with_path(nest({path: path for path in kinds}))[0]:
        names = tuple(key.key for key in keys)
        value = "scalar" if kinds[path] in ("int", "float") else "np.ndarray"
        facts[str(names)] = {
            "key_metadata": [{"key": name, "key_type": _DICT_KEY} for name in names],
            "value_metadata": {"value_type": value, "skip_deserialize": False},
        }
    return {
        "tree_metadata": facts, "use_ocdbt": True, "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True, "custom_metadata": None,
    }  # fmt: skip


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def _guard(where: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # tensorstore raises ValueError for anything, a full disk among them
        raise CheckpointError(f"Orbax's arrays of '{where}' could not be written: {first_line(error)}") from None
