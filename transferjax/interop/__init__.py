"""Networks of any framework as Models. flax is imported only by :func:`nnx` and :func:`linen`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transferjax.interop._chunks import chunked, in_chunks
from transferjax.interop._extend import batch_norm_momentum, extend, insert, map_inputs, strip, tie
from transferjax.interop._inserted import bottleneck, scale_and_shift, soft_prompt, visual_prompts
from transferjax.interop._modules import module_paths
from transferjax.interop._pure import equinox, mark, momentum_in_use, pure, training
from transferjax.interop._side import side_network
from transferjax.interop._statistics import momentum_for_steps, reestimate_statistics
from transferjax.interop._stochastic_norm import stochastic_norm

if TYPE_CHECKING:
    from transferjax.interop._linen import linen_model as linen
    from transferjax.interop._nnx import nnx_model as nnx

__all__ = [
    "batch_norm_momentum", "bottleneck", "chunked", "equinox", "extend", "in_chunks", "insert", "linen", "map_inputs",
    "mark", "module_paths", "momentum_for_steps", "momentum_in_use", "nnx", "pure", "reestimate_statistics",
    "scale_and_shift", "side_network", "soft_prompt", "stochastic_norm", "strip", "tie", "training", "visual_prompts",
]  # fmt: skip

_LAZY = {"linen": ("_linen", "linen_model"), "nnx": ("_nnx", "nnx_model")}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file, attribute = _LAZY[name]
    value = getattr(importlib.import_module(f"{__name__}.{file}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
