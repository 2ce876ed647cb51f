"""What learns: each function returns a Tuning; ``stages`` is loaded on first access, as it needs ``program``."""

import importlib
from typing import TYPE_CHECKING, Any

from transferjax._types import Tuning
from transferjax.tuning._core import bias_only, chain, full, last, norm_only, train
from transferjax.tuning._lora import adapter, lora

if TYPE_CHECKING:
    from transferjax.tuning._stages import stages


def __getattr__(name: str) -> Any:
    if name == "stages":
        return importlib.import_module(f"{__name__}._stages").stages
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Tuning", "adapter", "bias_only", "chain", "full", "last", "lora", "norm_only", "stages", "train"]
