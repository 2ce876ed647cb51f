"""The laws as functions, for our tests and for users' own strategies."""

from transferjax.testing._objective import check_objective
from transferjax.testing._plan import check_plan
from transferjax.testing._score import check_score
from transferjax.testing._step import check_step
from transferjax.testing._trees import check_selector, check_split
from transferjax.testing._tuning import check_chain, check_tuning

__all__ = [
    "check_chain", "check_objective", "check_plan", "check_score", "check_selector", "check_split", "check_step",
    "check_tuning",
]  # fmt: skip
