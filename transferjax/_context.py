"""What a trace may know beside its arguments: the number of steps taken so far."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

_step: contextvars.ContextVar[Any] = contextvars.ContextVar("transferjax_step", default=None)


@contextlib.contextmanager
def tracing_step(step: Any) -> Iterator[None]:
    """While a training step is traced: makes its step number known to running averages.

    BatchNorm layers of ``transferjax.interop`` use it to let their momentum follow the number of steps, since an
    average that starts from the source's statistics would otherwise need hundreds of steps to forget them. It is read
    while tracing only; the compiled program sees an ordinary input.
    """
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def current_step() -> Any:
    """The step number (scalar int32, maybe traced) of the training step being traced, or ``None`` outside of one."""
    return _step.get()
