"""Batches of a Source: shuffled by seed, resumable to the bit, shared out among processes."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from transferjax._errors import DataError, describe, is_whole
from transferjax._types import Preprocess
from transferjax.data._arrays import ArrayRecords
from transferjax.data._image import as_size, check_interpolation
from transferjax.data._load import Batch, Load
from transferjax.data._source import CorruptExampleError, Source, check_empty

_SMALL = 1 << 24
_STATE = ("fingerprint", "seed", "shuffle", "batch_size", "drop_remainder")


class Batches:
    """What :func:`batches` returns: iterate it for dicts of numpy arrays.

    Each ``iter`` starts at the first batch, except the first one after ``set_state``, which starts there.

    Attributes:
      source: the examples, without those that were skipped.
      steps_per_epoch: batches in one epoch.
      epochs: how often every example comes.
      skipped: ids of the examples left out because they cannot be decoded (with ``on_error="skip"``).
    """

    def __init__(self, load: Load, options: Mapping[str, Any], skipped: tuple[int, ...]):
        self.source = load.source
        self.epochs: int = options["epochs"]
        self.skipped = skipped
        self._load = load
        self._options = dict(options)
        self._position = 0
        self._start = 0
        count, size = len(load.source), options["batch_size"]
        self.steps_per_epoch: int = count // size if options["drop_remainder"] else -(-count // size)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __repr__(self) -> str:
        return (
            f"Batches({self.source.name}: {len(self):,} of {self._options['batch_size']}, "
            f"{self.epochs} epochs of {self.steps_per_epoch:,})"
        )

    def __iter__(self) -> Iterator[Batch]:
        return self._begin(self._load)

    def unread(self, held: Callable[[np.ndarray], bool]) -> Iterator[Batch]:
        """One pass in which nothing is read of batches that a store holds; these come with ``id`` alone.

        Args:
          held: ``ids -> bool``: whether the store has all of these examples, and will keep them; it is asked while
            batches are prepared ahead, from other threads too. ``transferjax.io.FeatureCache.holds`` is one.

        Returns:
          An iterator like that of ``iter``; where examples have weights, all of them are read.

        >>> from transferjax.data import open
        >>> train = batches(open("sample", "train"), 500, seed=0, epochs=2)
        >>> seen = set()
        >>> for batch in train.unread(lambda ids: seen >= set(ids.tolist())):
        ...     print(list(batch)) or seen.update(batch["id"].tolist())
        ['inputs', 'labels', 'id']
        ['inputs', 'labels', 'id']
        ['id']
        ['id']
        """
        weighted = "weight" in self._load.example(0)
        return self._begin(self._load if weighted else dataclasses.replace(self._load, held=held))

    def _begin(self, load: Load) -> Iterator[Batch]:
        start, self._start = self._start, 0
        self._position = start
        return self._run(start, load)

    def _run(self, start: int, load: Load) -> Iterator[Batch]:
        if start >= len(self):
            return
        import grain

        threads = self._options["threads"]
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        for number, batch in enumerate(self._dataset(load)[start:].to_iter_dataset(options), start + 1):
            self._position = number
            yield batch

    def _dataset(self, load: Load) -> Any:
        import grain

        return grain.MapDataset.range(len(self)).map(self._rows).map(self._local).map(load)

    def _rows(self, number: int) -> np.ndarray:
        """The rows of a batch of all processes together, by its number among those of all epochs."""
        epoch, place = divmod(int(number), self.steps_per_epoch)
        rows = slice(place * self._options["batch_size"], (place + 1) * self._options["batch_size"])
        if self._options["shuffle"]:
            return _permutation(self._options["seed"], epoch, len(self.source))[rows]
        return np.arange(*rows.indices(len(self.source)))

    def _local(self, rows: np.ndarray) -> np.ndarray:
        """This process's rows of the global batch: a contiguous part of it."""
        return np.split(rows, self._options["process_count"])[self._options["process_index"]]

    def get_state(self) -> dict[str, Any]:
        """Where the last iteration is: after the last batch that it gave out. Plain JSON values."""
        return {"position": self._position, **self._identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin where ``state`` was taken; its batches are bit-equal to the ones missed.

        The number of epochs and of processes may differ from then; the batch size is that of all processes together.

        Raises:
          DataError: the state belongs to other data, another seed, order or batch size, or is no state.
        """
        mine = self._identity()
        missing = [key for key in ("position", *_STATE) if key not in state]
        if missing:
            raise DataError(f"this is no state of batches: '{missing[0]}' is missing. Use the value of get_state().")
        for key in _STATE:
            if state[key] != mine[key]:
                raise DataError(
                    f"the state was taken with {key} {state[key]!r}, but these batches have {mine[key]!r}; "
                    f"the batches that follow would be others. Build them with the same {key}."
                )
        if not 0 <= state["position"] <= len(self):
            raise DataError(f"the state is at batch {state['position']:,}, but there are {len(self):,}. Raise epochs.")
        self._position = self._start = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {"fingerprint": self.source.fingerprint(), **{key: self._options[key] for key in _STATE[1:]}}


def batches(
    source: Source,
    batch_size: int,
    *,
    seed: int | None = None,
    epochs: int = 1,
    shuffle: bool = True,
    drop_remainder: bool = True,
    size: int | tuple[int, int] | None = None,
    preprocess: Preprocess | None = None,
    keep: Sequence[str] = (),
    num_classes: int | None = None,
    on_error: str = "raise",
    threads: int | None = None,
    cache_bytes: int = 1 << 30,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Batches:
    """Batches of a source, in an order that depends on the seed alone.

    Every epoch is a permutation of its own; epochs do not mix. The order is that of all processes together: process
    ``p`` gets the ``p``-th contiguous part of every batch, so 1 and 8 processes see the same batches. The host only
    decodes, and resizes when the images are not known to have one size or are larger than asked for; the rest is
    the device's (:func:`preprocess`).

    Args:
      source: what to read.
      batch_size: examples per batch, of all processes together.
      seed: determines the order; needed unless ``shuffle=False``.
      epochs: how often every example comes.
      shuffle: another order every epoch; ``False`` keeps the source's.
      drop_remainder: leave out the last, smaller batch of every epoch (training); ``False`` keeps it (evaluation).
      size: side length or ``(height, width)`` to which images of several sizes, and larger ones, are brought, pixels.
      preprocess: where ``size`` (and the interpolation) come from when ``size`` is not given.
      keep: names of further features of the examples to stack into the batch.
      num_classes: labels must be below it; by default the number of the source's class names.
      on_error: ``"raise"``, or ``"skip"``: every example is decoded once before the first batch, and those that
        cannot be are left out and listed in ``.skipped``.
      threads: threads that prepare batches ahead; by default none for what lies in memory, else one per core.
      cache_bytes: decoded images are kept in memory when all of them fit into so many bytes; 0 keeps none.
      process_index: by default ``jax.process_index()``.
      process_count: by default ``jax.process_count()``.

    Returns:
      Batches of ``{"inputs": [B, H, W, C] uint8, "labels": [B] int32, "id": [B] int64}``; data without images have
      their own ``inputs`` (an array, or a dict of arrays). With ``weight`` when the examples have one.

    Raises:
      DataError: no data, fewer examples than a batch, images of several sizes and no ``size``, or an argument that
        does not fit. While iterating: a label outside the classes, or an example that cannot be decoded.

    >>> from transferjax.data import open
    >>> train = batches(open("sample", "train"), 32, seed=0, epochs=2)
    >>> len(train), train.steps_per_epoch
    (62, 31)
    >>> batch = next(iter(train))
    >>> batch["inputs"].shape, batch["inputs"].dtype, batch["labels"].shape
    ((32, 28, 28, 1), dtype('uint8'), (32,))
    """
    if not isinstance(source, Source):
        raise DataError(
            f"batches() expects a Source first, got {describe(source)}: write tj.data.open('sample', 'train')."
        )
    index, count = _processes(process_index, process_count)
    _check_numbers({"batch_size": batch_size, "epochs": epochs, "process_count": count}, seed, shuffle, on_error)
    _check_processes(batch_size, index, count)
    check_empty(source)
    target, interpolation = _target(source, size, preprocess)
    total = _decoded_bytes(source, target)
    load = Load(source, target, interpolation, tuple(keep), num_classes, total <= cache_bytes)
    kept, skipped = _without_corrupt(load) if on_error == "skip" else (source, ())
    check_empty(kept)
    _check_enough(kept, batch_size, drop_remainder, count)
    options = {
        "seed": seed,
        "epochs": epochs,
        "shuffle": shuffle,
        "batch_size": batch_size,
        "drop_remainder": drop_remainder,
        "threads": (0 if total <= _SMALL else _cores()) if threads is None else threads,
        "process_index": index,
        "process_count": count,
    }
    return Batches(dataclasses.replace(load, source=kept), options, skipped)


@functools.lru_cache(maxsize=4)  # two passes side by side, each at the border of two epochs
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of one epoch; numpy promises that ``RandomState`` draws the same numbers in every version."""
    return np.random.RandomState([seed, epoch]).permutation(count)


def _processes(index: int | None, count: int | None) -> tuple[int, int]:
    if index is not None and count is not None:
        return index, count
    import jax

    return (
        jax.process_index() if index is None else index,
        jax.process_count() if count is None else count,
    )


def _check_numbers(positive: Mapping[str, int], seed: int | None, shuffle: bool, on_error: str) -> None:
    for name, value in positive.items():
        if not is_whole(value):
            raise DataError(f"{name} is {value!r}; expected a whole number of at least 1.")
    if shuffle and seed is None:
        raise DataError("shuffling needs a seed: pass seed=0 (any number), or shuffle=False.")
    if seed is not None and not 0 <= seed < 2**32:
        raise DataError(f"seed is {seed}; expected 0 to 4294967295.")
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error is {on_error!r}; expected 'raise' or 'skip'.")


def _check_processes(batch_size: int, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise DataError(f"process_index is {index}; expected 0 to {count - 1} for {count} processes.")
    if batch_size % count:
        raise DataError(f"a batch of {batch_size} cannot be shared out equally among {count} processes.")


def _check_enough(source: Source, batch_size: int, drop_remainder: bool, processes: int) -> None:
    last = len(source) % batch_size
    if not drop_remainder and last % processes:
        raise DataError(
            f"the last batch of {source.name} has {last} examples, which {processes} processes cannot share equally. "
            f"Use source.take({len(source) - last % processes}), or drop_remainder=True."
        )
    if drop_remainder and batch_size > len(source):
        raise DataError(
            f"a batch of {batch_size:,} is larger than the data: {source.name} has {len(source):,} examples. "
            "Use a smaller batch, or drop_remainder=False for evaluation."
        )


def _target(source: Source, size: Any, preprocess: Preprocess | None) -> tuple[tuple[int, int] | None, str]:
    """The size that the host brings images to (``None``: as they are), and how.

    Images known to have one size stay as they are unless they are larger than asked for: a small image travels to
    the device faster, and is enlarged there.
    """
    wanted = as_size(size if size is not None or preprocess is None else preprocess.size)
    interpolation = preprocess.interpolation if preprocess else "bicubic"
    check_interpolation(interpolation)
    shape = source.image_shape()
    if shape == ():
        return None, interpolation
    if shape is None and wanted is None:
        raise DataError(
            f"the images of {source.name} are not known to have one size. "
            "Pass size=(height, width), or preprocess=model.preprocess."
        )
    if shape is None or (wanted is not None and shape[0] * shape[1] > wanted[0] * wanted[1]):
        return wanted, interpolation
    return None, interpolation


def _decoded_bytes(source: Source, target: tuple[int, int] | None) -> int:
    """Memory that all examples of the data set take when they are decoded; 0 for what lies in memory already."""
    if isinstance(source.records, ArrayRecords):
        return 0
    shape = source.image_shape()
    if shape == ():
        return len(source.records) * sum(np.asarray(value).nbytes for value in source[0].values())
    sides = target or (shape or (0, 0))[:2]
    return len(source.records) * sides[0] * sides[1] * (shape[-1] if shape else 3)


def _without_corrupt(load: Load) -> tuple[Source, tuple[int, ...]]:
    """The source without the examples that cannot be decoded, and the ids of these."""

    def readable(row: int) -> bool:
        try:
            load.example(row)
        except CorruptExampleError:
            return False
        return True

    with ThreadPoolExecutor(_cores()) as pool:
        good = np.fromiter(pool.map(readable, range(len(load.source))), bool, len(load.source))
    bad = tuple(_id_of(load.source, int(row)) for row in np.flatnonzero(~good))
    return load.source.subset(np.flatnonzero(good)), bad


def _id_of(source: Source, row: int) -> int:
    """The id of a damaged example; where the damage hides it, its position in the data set."""
    try:
        return int(source.subset([row]).ids()[0])
    except CorruptExampleError:
        return int(source.indices[row])


def _cores() -> int:
    return min(os.cpu_count() or 1, 16)
