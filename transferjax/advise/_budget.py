"""What a user can spend."""

from __future__ import annotations

import dataclasses
from typing import Any

from transferjax._errors import DataError, is_whole


@dataclasses.dataclass(frozen=True)
class Budget:
    """What fine-tuning may cost.

    Attributes:
      steps: optimizer steps; 0: features are read out and nothing else learns.
      batch_size: examples in a step.
      seconds: of training at most, where a candidate's cost is known; ``None``: no limit.

    Raises:
      DataError: a number cannot be used.

    >>> Budget(128).examples
    4096
    """

    steps: int
    batch_size: int = 32
    seconds: float | None = None

    def __post_init__(self):
        if not is_whole(self.steps, 0):
            raise DataError(
                f"a budget of {self.steps!r} steps cannot be used. Expected a whole number, 0 for features only: "
                "epochs x examples / batch size."
            )
        if not is_whole(self.batch_size):
            raise DataError(f"batch_size is {self.batch_size!r}; expected a whole number above 0.")
        if self.seconds is not None and not self.seconds > 0:
            raise DataError(f"a budget of {self.seconds!r} seconds cannot be used. Expected a number above 0, or None.")

    @property
    def examples(self) -> int:
        """Examples that are seen, each as often as it comes."""
        return self.steps * self.batch_size


def as_budget(budget: Any) -> Budget:
    """A budget, from itself or from its steps.

    >>> as_budget(0)
    Budget(steps=0, batch_size=32, seconds=None)
    """
    return budget if isinstance(budget, Budget) else Budget(budget)
