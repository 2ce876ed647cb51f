"""The loop that every verb shares: batches to the device, steps, and someone who hears about each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import transferjax as tj
from transferjax.cli._hoisting import unchanged


class Progress(Protocol):
    """Hears how far a loop is."""

    def start(self, text: str, total: int) -> None: ...

    def advance(self, done: int, facts: dict[str, float]) -> None: ...

    def finish(self) -> None: ...


def train(
    step: Any,
    state: Any,
    frozen: Any,
    batches: Any,
    progress: Progress,
    after: Callable[[Any, dict[str, Any], Any], None] | None = None,
    every: int = 10,
    through: Callable[[Any], Any] = unchanged,
) -> Any:
    """Runs all batches and returns the last state.

    Args:
      progress: told of loss and accuracy every so many steps, so that the device is seldom waited for.
      after: called after each step with the state, its metrics and the batches (whose state belongs to that step).
      every: in steps.
      through: what stands between the batches and the step.
    """
    begin, total = int(state.step), len(batches)
    ahead = tj.data.to_device(batches)
    progress.start("training", total)
    for number, (after_step, metrics) in enumerate(tj.fit(step, state, frozen, through(ahead)), begin + 1):
        state = after_step
        if after is not None:
            after(state, metrics, ahead)
        if number % every == 0 or number == total:
            progress.advance(number, {k: float(metrics[k]) for k in ("loss", "accuracy") if k in metrics})
    progress.finish()
    return state
