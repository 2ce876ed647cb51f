"""Networks of any framework as Models; flax is imported only when :func:`nnx` or :func:`linen` is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transferjax.interop._nnx import nnx_model as nnx

_LAZY = {
    "nnx": ("_nnx", "nnx_model"),
}

__all__ = ["nnx"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file, attribute = _LAZY[name]
    value = getattr(importlib.import_module(f"{__name__}.{file}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
