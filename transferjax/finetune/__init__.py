"""State, step, evaluation and the loop; what a step costs is measured on first access, as it needs ``program``."""

import importlib
from typing import TYPE_CHECKING, Any

from transferjax.finetune._eval import Evaluate, make_eval
from transferjax.finetune._fit import Best, early_stopping, fit, validate
from transferjax.finetune._migrate import each_group, migrate
from transferjax.finetune._stages import Progress, Stage, compile_ahead, lp_ft, run_stages, unfreeze
from transferjax.finetune._state import FinetuneState, init
from transferjax.finetune._step import Step, make_step, training_mode

if TYPE_CHECKING:
    from transferjax.finetune._drift import drift
    from transferjax.finetune._explain import explain
    from transferjax.finetune._front import front
    from transferjax.finetune._frozen import frozen_is_frozen, merge_form
    from transferjax.finetune._grids import grid_search, log_uniform, random_search, successive_halving, uniform
    from transferjax.finetune._hoist import Hoisted, HoistedStep, hoist
    from transferjax.finetune._hoisted_recipe import hoisted_recipe
    from transferjax.finetune._memory import fit_memory
    from transferjax.finetune._movement import movement
    from transferjax.finetune._remat import remat_scans
    from transferjax.finetune._residuals import residuals
    from transferjax.finetune._runs import Runs, start_runs, sweep_steps
    from transferjax.finetune._sweep import Swept, evaluate_runs, sweep

_LAZY = {
    "drift": "_drift",
    "explain": "_explain",
    "front": "_front",
    "frozen_is_frozen": "_frozen",
    "merge_form": "_frozen",
    **dict.fromkeys(("grid_search", "log_uniform", "random_search", "successive_halving", "uniform"), "_grids"),
    **dict.fromkeys(("Hoisted", "HoistedStep", "hoist"), "_hoist"),
    "fit_memory": "_memory",
    "hoisted_recipe": "_hoisted_recipe",
    "movement": "_movement",
    "remat_scans": "_remat",
    "residuals": "_residuals",
    **dict.fromkeys(("Runs", "start_runs", "sweep_steps"), "_runs"),
    **dict.fromkeys(("Swept", "evaluate_runs", "sweep"), "_sweep"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Best", "Evaluate", "FinetuneState", "Hoisted", "HoistedStep", "Progress", "Runs", "Stage", "Step", "Swept",
    "compile_ahead", "drift", "each_group", "early_stopping", "evaluate_runs", "explain", "fit", "fit_memory", "front",
    "frozen_is_frozen", "grid_search", "hoist", "hoisted_recipe", "init", "log_uniform", "lp_ft", "make_eval",
    "make_step", "merge_form", "migrate", "movement", "random_search", "remat_scans", "residuals", "run_stages",
    "start_runs", "successive_halving", "sweep", "sweep_steps", "training_mode", "unfreeze", "uniform", "validate",
]  # fmt: skip
