"""One line of an advice."""

from __future__ import annotations

import dataclasses

NONE = "none"
"""The source of a fresh network."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One strategy.

    Attributes:
      source: whose knowledge; ``raw``: the inputs themselves; ``none``: a fresh network, in the package's evidence a
        small one of three convolutions.
      road: ``features``, ``finetune`` or ``scratch``.
      tuning, features, optimizer: as in :class:`Run`.
      learning_rate: the highest, of a schedule that rises and falls (``optim.warmup_cosine``); 0 for a closed form.
      epochs: over the training examples; steps: of the budget's batch size.
      expected: share of right answers on new examples; low, high: one standard deviation around it.
      seconds: of training steps, compiling left out; ``None``: the candidate's cost is not known.
      weight: of the evidence; 1 is one run on just such a task.
      evidence: the runs that weigh most; ``E12`` is ``evidence().runs[11]``.
    """

    source: str
    road: str
    tuning: str
    features: str
    optimizer: str
    learning_rate: float
    epochs: float
    steps: int
    expected: float
    low: float
    high: float
    seconds: float | None
    weight: float
    evidence: tuple[str, ...]
