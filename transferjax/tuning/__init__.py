"""What learns: each function returns a Tuning; what needs ``program`` is loaded on first access."""

import importlib
from typing import TYPE_CHECKING, Any

from transferjax._types import Tuning
from transferjax.tuning._core import bias_only, chain, full, last, norm_only, train
from transferjax.tuning._dora import dora
from transferjax.tuning._eva import eva
from transferjax.tuning._extract import extract_lora
from transferjax.tuning._factorised import olora, pissa
from transferjax.tuning._ia3 import ia3
from transferjax.tuning._inputs import Moments, input_moments
from transferjax.tuning._kernel import all_linear
from transferjax.tuning._lora import adapter, lora
from transferjax.tuning._lora_dropout import lora_dropout
from transferjax.tuning._oft import oft
from transferjax.tuning._products import hira, loha, lokr, miss
from transferjax.tuning._sparse import entries, rows, shira
from transferjax.tuning._stacked import apply_stacked, stack_adapters
from transferjax.tuning._vera import vera

if TYPE_CHECKING:
    from transferjax.tuning._quantise import frozen_matrices, quantisation_error, quantise
    from transferjax.tuning._stages import stages

_LAZY = {
    "frozen_matrices": "_quantise",
    "quantisation_error": "_quantise",
    "quantise": "_quantise",
    "stages": "_stages",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Moments", "Tuning", "adapter", "all_linear", "apply_stacked", "bias_only", "chain", "dora", "entries", "eva",
    "extract_lora", "frozen_matrices", "full", "hira", "ia3", "input_moments", "last", "loha", "lokr", "lora",
    "lora_dropout", "miss", "norm_only", "oft", "olora", "pissa", "quantisation_error", "quantise", "rows", "shira",
    "stack_adapters", "stages", "train", "vera",
]  # fmt: skip
