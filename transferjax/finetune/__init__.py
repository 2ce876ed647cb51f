"""State, step, evaluation and the loop."""

from transferjax.finetune._eval import Evaluate, make_eval
from transferjax.finetune._fit import Best, early_stopping, fit, validate
from transferjax.finetune._state import FinetuneState, init
from transferjax.finetune._step import Step, make_step, training_mode

__all__ = [
    "Best", "Evaluate", "FinetuneState", "Step", "early_stopping", "fit", "init", "make_eval", "make_step",
    "training_mode", "validate",
]  # fmt: skip
