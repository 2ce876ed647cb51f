"""Batches on the device, a few ahead of the one in use."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from transferjax._errors import DataError


class DeviceBatches:
    """What :func:`to_device` returns: batches as ``jax.Array``; its state is that of the last batch given out."""

    def __init__(self, batches: Iterable[Mapping[str, Any]], sharding: Any, ahead: int):
        self.batches = batches
        self.sharding = sharding
        self.ahead = ahead
        self._state = None

    def __len__(self) -> int:
        return len(self.batches)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._begin(iter(self.batches))

    def unread(self, held: Callable[[np.ndarray], bool]) -> Iterator[dict[str, Any]]:
        """The same over ``batches.unread(held)`` (:meth:`Batches.unread`), where the batches have that."""
        unread = getattr(self.batches, "unread", None)
        return self._begin(iter(self.batches) if unread is None else unread(held))

    def _begin(self, running: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        self._state = self._read_state()
        return self._run(running)

    def _run(self, running: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        waiting = collections.deque()
        for batch in running:
            waiting.append((put(batch, self.sharding), self._read_state()))
            if len(waiting) > self.ahead:
                yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def _next(self, waiting: collections.deque) -> dict[str, Any]:
        batch, self._state = waiting.popleft()
        return batch

    def _read_state(self) -> Any:
        read = getattr(self.batches, "get_state", None)
        return read() if read else None

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch  # pyright: ignore[reportAttributeAccessIssue]

    def get_state(self) -> Any:
        """The state of the batches after the last one given out here, not counting those ahead of it."""
        return self._state if self._state is not None else self._read_state()

    def set_state(self, state: Any) -> None:
        """Let the next iteration begin where ``state`` was taken."""
        self.batches.set_state(state)  # pyright: ignore[reportAttributeAccessIssue]
        self._state = None


def to_device(batches: Iterable[Mapping[str, Any]], sharding: Any = None, *, ahead: int = 2) -> DeviceBatches:
    """Send batches to the device before they are needed; their order stays.

    Args:
      batches: of :func:`transferjax.data.batches`, or any iterable of dicts of arrays (of this process's part).
      sharding: a ``jax.sharding.Sharding`` of the global batch (axis 0 divided), or ``None`` for the default device.
      ahead: how many batches are sent in advance.

    Returns:
      DeviceBatches: an iterable with ``get_state`` and ``set_state``, whose ``id`` is int32 (int64 under x64).

    Raises:
      DataError: ``ahead`` is negative; while iterating, an id that does not fit the device's integers.

    >>> batch = next(iter(to_device([{"inputs": np.zeros((2, 3)), "id": np.array([1, 2])}])))
    >>> type(batch["inputs"]).__name__, batch["id"].dtype
    ('ArrayImpl', dtype('int32'))
    """
    if ahead < 0:
        raise DataError(f"ahead is {ahead}; expected 0 or more.")
    return DeviceBatches(batches, sharding, ahead)


def put(batch: Mapping[str, Any], sharding: Any = None) -> dict[str, Any]:
    """One batch on the device: each process gives its part of the global batch."""
    local = jax.tree.map(_fitting, dict(batch))
    if sharding is None:
        return jax.device_put(local)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), local)


def _fitting(leaf: Any) -> np.ndarray:
    """The array in a type that the device has; integers are not allowed to lose bits."""
    array = np.asarray(leaf)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if array.dtype.kind in "iu" and dtype != array.dtype and array.size:
        limits = np.iinfo(dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise DataError(f"an integer up to {array.max()} does not fit {dtype}; give ids below 2147483648.")
    return array.astype(dtype, copy=False)
