"""transplant: a checkpoint through a plan into another checkpoint, leaf by leaf."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from transferjax._errors import CheckpointError, SelectionError
from transferjax._report import Report
from transferjax.io import _save
from transferjax.io._beside import beside, writing
from transferjax.io._boxes import block_count, block_shape, blocks
from transferjax.io._host import kind_of, to_host
from transferjax.io._leafwise import copied, gathered, in_parts, part, whole
from transferjax.io._manifest import BLOCK, Manifest, digest, dtype_of, encode, facts_of
from transferjax.io._processes import attempt, dealt, shared
from transferjax.io._replace import absolute, check_replaceable
from transferjax.io._restore import opened
from transferjax.io._shards import write_shards
from transferjax.surgery import Move, Plan, leaves
from transferjax.tree import nest

_AHEAD = 4
"""Blocks of 16 MiB whose digests may be waited for."""


def transplant(
    checkpoint: Any,
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    init: Any = None,
    format: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    shard_bytes: int | None = None,
) -> Report:
    """Writes what a plan makes of a checkpoint as a new checkpoint: each leaf is read, transformed and written alone.

    No model is built, and no more than about two leaves are in memory at a time, in safetensors three: one is written
    while the next is made. It is written beside and renamed, with a sha256 for each block of at most 16 MiB, as
    :func:`transferjax.io.save` does. Orbax directories are uncompressed, carry a checksum that ``ocp.load`` verifies
    too, and may be written by several processes together: all call this function with the same arguments, and each
    writes a part of the leaves.

    Args:
      checkpoint: from :func:`transferjax.io.open`, or a path, which is opened; any object with ``read`` and
        ``fingerprint``. One that has ``ahead`` is told which leaf it will be asked for after this one.
      plan: from ``transferjax.surgery.plan(checkpoint.shapes, target, ...)``; the target may be abstract.
      path: the file, or for Orbax the directory; ``~`` is expanded, and missing parents are made.
      init: the values of fresh leaves: a function ``path -> array``, a tree or a ``Model``.
      format: as in :func:`transferjax.io.save`. ``None``: what the ending of the path says, without one ``"orbax"``.
      metadata: facts to keep, as JSON.
      overwrite: whether an existing path is replaced, as in :func:`transferjax.io.save`; never the source.
      shard_bytes: for safetensors, as in :func:`transferjax.io.save`: a folder of files of at most so many bytes.

    Returns:
      A ``Report``: path, shape, dtype, bytes, source of every leaf and how it came from there; its metadata hold the
      absolute path, format, totals, the fingerprint, and whether the bytes of the source were verified.

    Raises:
      PlanError: the plan is bound to another source, does not fit it, or has fresh leaves and there is no ``init``.
      CheckpointError: the source is damaged; the path exists or ends like another format; a leaf or dtype cannot be
        held; or the system refuses to write. What was there before is unchanged.

    >>> import tempfile, numpy as np, transferjax.io as io
    >>> from transferjax.surgery import permute, plan
    >>> folder = tempfile.mkdtemp()
    >>> np.savez(folder + "/a.npz", kernel=np.arange(6, dtype=np.float32).reshape(2, 3))
    >>> source = io.open(folder + "/a.npz")
    >>> target = {"kernel": np.zeros((3, 2), np.float32)}
    >>> made = plan(source.shapes, target, permute("kernel", (1, 0)))
    >>> transplant(source, made, folder + "/b").rows
    (('kernel', '(3, 2)', 'float32', 24, 'kernel', 'permute(1, 0)'),)
    >>> io.open(folder + "/b").read("kernel", 0)
    array([0., 3.], dtype=float32)
    """
    checkpoint = opened(checkpoint, plan, "transplant")
    where = absolute(path, "transplant", "write transplant(checkpoint, plan, path)")
    format = _save._format(where, format) if shard_bytes is None else _save._sharded(where, format, shard_bytes)
    directory, source = format == "orbax" or shard_bytes is not None, getattr(checkpoint, "path", None)
    attempt(lambda: check_replaceable(where, directory=directory, source=source), where)
    facts = _save._json(metadata)
    job = attempt(lambda: _job(checkpoint, plan, init, format, where), where)
    if job.format != "orbax" and jax.process_count() > 1:
        raise CheckpointError(
            f"{job.format} is for one process, and {jax.process_count()} cannot write it together. "
            "Expected format='orbax'."
        )
    if job.format == "orbax":
        manifest = _write_orbax(job, facts, overwrite)
    else:
        manifest = _write_file(job, facts, overwrite, shard_bytes)
    return _report(job, Manifest(manifest, f"'{where}'").fingerprint())


class _Job(NamedTuple):
    checkpoint: Any
    plan: Plan
    init: Callable[[str], Any] | None
    format: str
    where: str
    shapes: dict[str, jax.ShapeDtypeStruct]  # as stored: of typed keys, their data
    kinds: dict[str, str | None]


def _job(checkpoint: Any, plan: Plan, init: Any, format: str, where: str) -> _Job:
    """Everything that can be wrong before a byte is written."""
    if init is not None and not (callable(init) and all(leaf is init for leaf in jax.tree.leaves(init))):
        init = leaves(init).__getitem__
    kinds: dict[str, str | None] = {}
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for move in plan.moves:
        name, spec = move.target, plan.shapes[move.target]
        kinds[name] = None if move.ops else getattr(checkpoint, "kinds", {}).get(move.source)
        if spec.dtype.startswith("key<"):
            value = whole(checkpoint, plan, move, init)
            kinds[name], data = kind_of(value), to_host(name, value)
            shapes[name] = jax.ShapeDtypeStruct(data.shape, data.dtype)
        else:
            dtype = dtype_of(spec.dtype, f"the plan's target '{name}'").newbyteorder("=")
            shapes[name] = jax.ShapeDtypeStruct(tuple(spec.shape), dtype)
        _save._check_leaf(name, shapes[name], format)
    if not shapes:
        raise CheckpointError("the plan has no moves, so there is nothing to write.")
    if format == "orbax":
        _save._check_dots(shapes)
        if not any(shape.size for shape in shapes.values()):
            raise CheckpointError("no leaf has elements, which Orbax cannot hold. Write with format='npz'.")
        try:
            nest(dict(shapes))
        except SelectionError as error:
            raise CheckpointError(f"Orbax cannot hold these leaves: {error}") from None
    return _Job(checkpoint, plan, init, format, where, shapes, kinds)


def _array(job: _Job, move: Move) -> np.ndarray:
    """A leaf as it is stored; perhaps a view."""
    if in_parts(job.checkpoint, job.plan, move):
        return gathered(job.checkpoint, job.plan, move)
    value = whole(job.checkpoint, job.plan, move, job.init)
    return value if type(value) is np.ndarray and value.dtype.isnative else to_host(move.target, value)


def _ahead(job: _Job, move: Move | None) -> None:
    """Lets the checkpoint begin to read what comes after the next leaf, if it can."""
    if move is not None and move.sources and hasattr(job.checkpoint, "ahead"):
        job.checkpoint.ahead(move.sources[0])


def _blocks(job: _Job, move: Move) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """A leaf in pieces that nothing else refers to; a copy never has the whole leaf in memory."""
    shape = job.shapes[move.target]
    start = (0,) * len(shape.shape)
    local = in_parts(job.checkpoint, job.plan, move)
    if local and not move.ops:
        get = lambda low, high: part(job.checkpoint, job.plan, move, (low, high))
    else:
        array, own = _array(job, move), np.asarray if local else copied  # what is not local may be the caller's
        get = lambda low, high: own(array[tuple(map(slice, low, high))])
    for _, low, high in blocks(shape.shape, block_shape(shape.shape, shape.dtype.itemsize, BLOCK), start, shape.shape):
        yield low, high, get(low, high)


def _write_file(job: _Job, metadata: dict[str, Any], overwrite: bool, shard_bytes: int | None) -> str:
    """Writes one file, or a folder of safetensors, and gives its manifest."""
    entries = {}
    for name, shape in job.shapes.items():
        count = block_count(shape.shape, block_shape(shape.shape, shape.dtype.itemsize, BLOCK))
        entries[name] = facts_of(shape, ["0" * 64] * count, job.kinds[name])  # as long as it will be

    order = _save.in_order(job.format, job.shapes, shard_bytes)
    moves = {move.target: move for move in job.plan.moves}
    after = {name: moves[then] for name, then in itertools.pairwise(order)}

    def array(move: Move) -> np.ndarray:
        _ahead(job, after.get(move.target))
        found = _array(job, move)
        out = found if found.flags.c_contiguous else copied(found)
        entries[move.target] = _facts(out, job.kinds[move.target])
        return out

    arrays = {move.target: lambda move=move: array(move) for move in job.plan.moves}
    manifest = lambda: encode(entries, metadata)
    with beside(job.where, overwrite=overwrite) as new:
        if shard_bytes is None:
            _save._write_file(new, job.format, arrays, job.shapes, manifest, metadata)
        else:
            write_shards(new, arrays, job.shapes, manifest, _save._texts(metadata), shard_bytes)
    return manifest()


def _facts(array: np.ndarray, kind: str | None) -> dict[str, Any]:
    """As ``leaf_facts``; the blocks are hashed by all cores."""
    block = block_shape(array.shape, array.dtype.itemsize, BLOCK)
    boxes = blocks(array.shape, block, (0,) * array.ndim, array.shape)
    parts = [array[tuple(map(slice, low, high))] for _, low, high in boxes]
    if len(parts) < 2:
        return facts_of(array, list(map(digest, parts)), kind)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return facts_of(array, list(pool.map(digest, parts)), kind)


def _write_orbax(job: _Job, metadata: dict[str, Any], overwrite: bool) -> str:
    """Writes a directory together with all other processes, and gives its manifest."""
    from transferjax.io import _orbax_stream as orbax  # heavy: only where it is asked for

    first, count = jax.process_index() == 0, jax.process_count()
    owner = dealt({name: shape.size * shape.dtype.itemsize for name, shape in job.shapes.items()}, count)
    mine = [move for move in job.plan.moves if owner[move.target] == jax.process_index()]
    with contextlib.ExitStack() as stack, writing(job.where):
        make = lambda: stack.enter_context(beside(job.where, overwrite=overwrite)) if first else ""
        folder = shared(attempt(make, job.where))
        own = attempt(lambda: _write_mine(job, mine, folder, orbax), job.where)
        found = attempt(lambda: _everyones(own, folder, count), job.where)
        manifest = encode({name: found[name] for name in job.shapes}, metadata)
        held = {name: job.kinds[name] for name, shape in job.shapes.items() if shape.size}
        attempt(lambda: orbax.finish(folder, held, manifest, metadata, job.where) if first else None, job.where)
        attempt(stack.close, job.where)
    return manifest


def _write_mine(job: _Job, moves: list[Move], folder: str, orbax: Any) -> dict[str, Any]:
    """Writes the leaves of this process, and gives their facts."""
    digests: dict[str, list[Future[str]]] = {move.target: [] for move in moves}
    waiting: deque[Future[str]] = deque()
    with ThreadPoolExecutor(1) as pool:

        def stream() -> Iterator[Any]:
            for move, after in zip(moves, [*moves[1:], None]):
                _ahead(job, after)
                for low, high, array in _blocks(job, move):
                    waiting.append(pool.submit(digest, array))
                    digests[move.target].append(waiting[-1])
                    if len(waiting) > _AHEAD:
                        waiting.popleft().result()
                    yield orbax.Block(move.target, low, high, array)

        orbax.write_arrays(folder, jax.process_index(), job.shapes, stream(), job.where)
        facts = {
            name: facts_of(job.shapes[name], [future.result() for future in found], job.kinds[name])
            for name, found in digests.items()
        }
    if jax.process_count() > 1:
        with open(_facts_file(folder, jax.process_index()), "w", encoding="utf-8") as file:
            json.dump(facts, file)
    return facts


def _everyones(own: dict[str, Any], folder: str, count: int) -> dict[str, Any]:
    if count == 1:
        return own
    found: dict[str, Any] = {}
    for process in range(count):
        with open(_facts_file(folder, process), encoding="utf-8") as file:
            found.update(json.load(file))
    return found


def _facts_file(folder: str, process: int) -> str:
    return os.path.join(os.path.dirname(folder), f"facts.process_{process}.json")


def _report(job: _Job, fingerprint: str) -> Report:
    size = lambda shape: shape.size * shape.dtype.itemsize
    rows = []
    for move in job.plan.moves:
        shape = job.shapes[move.target]
        source = " + ".join(move.sources) or None
        rows.append((move.target, str(shape.shape), str(shape.dtype), size(shape), source, move.how))
    facts = {
        "path": job.where, "format": job.format, "leaves": len(rows),
        "parameters": sum(shape.size for shape in job.shapes.values()), "bytes": sum(map(size, job.shapes.values())),
        "fingerprint": fingerprint, "source": getattr(job.checkpoint, "verified", "unverified"),
    }  # fmt: skip
    return Report("Transplanted", ("path", "shape", "dtype", "bytes", "source", "how"), tuple(rows), facts)
