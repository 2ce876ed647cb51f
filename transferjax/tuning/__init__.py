"""What learns: each function returns a Tuning."""

from transferjax._types import Tuning
from transferjax.tuning._core import bias_only, chain, full, last, norm_only, train
from transferjax.tuning._lora import adapter, lora

__all__ = ["Tuning", "adapter", "bias_only", "chain", "full", "last", "lora", "norm_only", "train"]
