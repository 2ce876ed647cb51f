"""What a trace may know beside its arguments: the number of steps taken so far, and whether it only infers."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

# Functions that were traced for one step (under jax.jit or jax.checkpoint) hold its step number: a new value of this
# context makes the next step trace them anew instead of finding them in JAX's caches.
_trace = jax.make_user_context(None)
_inference = jax.make_user_context(False)
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
        with _trace(object()):
            yield
    finally:
        _step.reset(token)


def current_step() -> Any:
    """The step number (scalar int32, maybe traced) of the training step being traced, or ``None`` outside of one."""
    return _step.get()


def tracing_inference(only: bool) -> contextlib.AbstractContextManager[None]:
    """While a Model's pass is traced: whether it trains nothing, captures nothing and changes no module's outputs.

    JAX keeps traces made under another value apart.
    """
    return _inference(only)


def in_inference() -> bool:
    """Whether the innermost Model's pass being traced only infers; ``False`` outside of one."""
    return _inference.value
