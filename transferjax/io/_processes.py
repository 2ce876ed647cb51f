"""Several processes that write one directory: what one of them does, and what all must know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from transferjax._errors import CheckpointError

T = TypeVar("T")


def attempt(work: Callable[[], T], where: str) -> T:
    """Runs ``work`` and waits for the other processes, which do the same; if it fails on one, it fails on all.

    Args:
      work: a function of no arguments.
      where: the path that is written, for errors.

    Raises:
      CheckpointError: another process failed; its own error says why.
    """
    try:
        out = work()
    except Exception:
        _gather(True)
        raise
    failed = [process for process, bad in enumerate(_gather(False)) if bad]
    if failed:
        raise CheckpointError(
            f"process {failed[0]} could not do its part of '{where}'; its own error says why. Nothing was written."
        )
    return out


def shared(text: str, longest: int = 4096) -> str:
    """What process 0 says, on every process."""
    if jax.process_count() == 1:
        return text
    from jax.experimental.multihost_utils import broadcast_one_to_all

    data = np.zeros(longest, np.uint8)
    data[: len(text.encode())] = np.frombuffer(text.encode(), np.uint8)
    return np.asarray(broadcast_one_to_all(data)).astype(np.uint8).tobytes().rstrip(b"\0").decode()


def dealt(sizes: dict[str, int], processes: int) -> dict[str, int]:
    """Which process has which leaf: about as many bytes for each.

    >>> dealt({"a": 4, "b": 3, "c": 2}, 2)
    {'a': 0, 'b': 1, 'c': 1}
    """
    load, out = [0] * processes, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        process = load.index(min(load))
        out[name] = process
        load[process] += sizes[name]
    return out


def _gather(bad: bool) -> list[Any]:
    if jax.process_count() == 1:
        return [bad]
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(np.array(bad))).reshape(-1).tolist()
