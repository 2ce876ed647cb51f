"""transferjax: move what a pretrained network knows into the network you need.

Three roads of transfer share one set of nouns. *Parameter transfer*: ``surgery`` moves source weights into a target
tree, a ``Tuning`` says what learns, a step trains it. *Feature transfer* and *knowledge transfer* build on the same
models. Everything is a pure function over parameter pytrees; see the README for the main job in 25 lines.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transferjax import optim, tree, tuning
from transferjax._errors import (
    CheckpointError,
    DataError,
    LawError,
    NonFiniteError,
    PlanError,
    SelectionError,
    TransferError,
)
from transferjax._report import Report
from transferjax._types import Hole, Loss, Model, Objective, Preprocess, Tuning
from transferjax.finetune import (
    Best,
    FinetuneState,
    early_stopping,
    fit,
    init,
    make_eval,
    make_step,
    validate,
)
from transferjax.optim import per_group
from transferjax.tree import Selector, copy, everything, fill, glob, label, mask, paths, regex, split, summary, where
from transferjax.tuning import bias_only, chain, dora, full, ia3, last, lora, norm_only, train

if TYPE_CHECKING:
    from transferjax import (
        advise,
        cli,
        data,
        features,
        finetune,
        interop,
        io,
        merging,
        models,
        numerics,
        objectives,
        program,
        report,
        scores,
        surgery,
        testing,
    )
    from transferjax.finetune import explain, fit_memory, frozen_is_frozen, hoist, sweep
    from transferjax.interop import extend, strip
    from transferjax.tuning import stages

__version__ = "0.1.0"

_ON_FIRST_ACCESS = (
    "advise",
    "cli",
    "data",
    "features",
    "finetune",
    "interop",
    "io",
    "merging",
    "models",
    "numerics",
    "objectives",
    "program",
    "report",
    "scores",
    "surgery",
    "testing",
)
_FUNCTIONS_ON_FIRST_ACCESS = {
    "extend": "interop",
    "strip": "interop",
    "explain": "finetune",
    "fit_memory": "finetune",
    "frozen_is_frozen": "finetune",
    "hoist": "finetune",
    "stages": "tuning",
    "sweep": "finetune",
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_ACCESS:
        return importlib.import_module(f"transferjax.{name}")
    if name in _FUNCTIONS_ON_FIRST_ACCESS:
        return getattr(importlib.import_module(f"transferjax.{_FUNCTIONS_ON_FIRST_ACCESS[name]}"), name)
    raise AttributeError(f"module 'transferjax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_ACCESS, *_FUNCTIONS_ON_FIRST_ACCESS})


__all__ = [
    "Best", "CheckpointError", "DataError", "FinetuneState", "Hole", "LawError", "Loss", "Model", "NonFiniteError",
    "Objective", "PlanError", "Preprocess", "Report", "SelectionError", "Selector", "TransferError", "Tuning",
    "advise", "bias_only", "chain", "cli", "copy", "data", "dora", "early_stopping", "everything", "explain",
    "extend", "features", "fill", "finetune", "fit", "fit_memory", "frozen_is_frozen", "full", "glob", "hoist", "ia3",
    "init", "interop", "io", "label", "last", "lora", "make_eval", "make_step", "mask", "merging", "models",
    "norm_only", "numerics", "objectives", "optim", "paths", "per_group", "program", "regex", "report", "scores",
    "split", "stages", "strip", "summary", "surgery", "sweep", "testing", "train", "tree", "tuning", "validate",
    "where",
]  # fmt: skip
