"""State, step, evaluation and the loop; what a step costs is measured on first access, as it needs ``program``."""

import importlib
from typing import TYPE_CHECKING, Any

from transferjax.finetune._eval import Evaluate, make_eval
from transferjax.finetune._fit import Best, early_stopping, fit, validate
from transferjax.finetune._state import FinetuneState, init
from transferjax.finetune._step import Step, make_step, training_mode

if TYPE_CHECKING:
    from transferjax.finetune._explain import explain
    from transferjax.finetune._frozen import frozen_is_frozen, merge_form

_LAZY = {"explain": "_explain", "frozen_is_frozen": "_frozen", "merge_form": "_frozen"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Best", "Evaluate", "FinetuneState", "Step", "early_stopping", "explain", "fit", "frozen_is_frozen", "init",
    "make_eval", "make_step", "merge_form", "training_mode", "validate",
]  # fmt: skip
