"""Reading: one leaf of several checkpoints, read side by side into memory that is there."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

Memory = dict[int, np.ndarray]
"""Bytes that leaves of a source are read into, by its identity; new ones would cost as much time as to read."""


class Reading:
    """A leaf on its way from every source; it begins when it is made.

    Attributes:
      path: of the leaf.
      memory: where it lies when the source can read into an array; grown where it is too small.
    """

    def __init__(self, path: str, sources: Sequence[Any], memory: Memory):
        self.path, self.memory = path, memory
        pool = ThreadPoolExecutor(os.cpu_count())
        self._found = {id(one): pool.submit(self._tree, one) for one in sources}
        pool.shutdown(wait=False)

    def result(self) -> dict[int, dict[str, Any]]:
        """The trees of the leaf by the identity of their source, empty where a source has none.

        Raises:
          CheckpointError: a source is damaged.
        """
        return {key: future.result() for key, future in self._found.items()}

    def _tree(self, one: Any) -> dict[str, Any]:
        if self.path not in specs(one):
            return {}
        if not hasattr(one, "read_into"):
            return {self.path: one[self.path]}
        spec = one.shapes[self.path]
        size = math.prod(spec.shape) * spec.dtype.itemsize
        if id(one) not in self.memory or self.memory[id(one)].size < size:
            self.memory[id(one)] = _aligned(size)
        out = self.memory[id(one)][:size].view(spec.dtype).reshape(spec.shape)
        one.read_into(self.path, out, once=True)
        return {self.path: out}


class Pool:
    """Memory for arrays, used again when nothing refers to an array any more; at most two pieces wait for that."""

    def __init__(self) -> None:
        self._spare: list[np.ndarray] = []

    def __call__(self, size: int) -> np.ndarray:
        """An array of bytes; what its elements are is not known."""
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if memory.size < size:
            memory = np.empty(size, np.uint8)
        owner = _Owner(memory[:size])
        weakref.finalize(owner, self._back, memory).atexit = False
        return np.asarray(owner)

    def _back(self, memory: np.ndarray) -> None:
        if len(self._spare) < 2:
            self._spare.append(memory)


class _Owner:
    """What an array and all views of it refer to, and nothing else does."""

    def __init__(self, memory: np.ndarray):
        self.__array_interface__ = memory.__array_interface__


def specs(source: Any) -> Any:
    """``{path: shape and dtype}`` of a checkpoint, or of a mapping from path to array."""
    return getattr(source, "shapes", source)


def _aligned(size: int) -> np.ndarray:
    """Bytes from a multiple of 64 on: those a compiled program takes as they are, and copies others."""
    out = np.empty(size + 63, np.uint8)
    first = -out.ctypes.data % 64
    return out[first : first + size]
