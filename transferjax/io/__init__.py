"""Checkpoints: opened lazily, moved into a model by a plan, saved with digests."""

from transferjax.io._checkpoint import Checkpoint
from transferjax.io._diff import diff
from transferjax.io._feature_cache import FeatureCache
from transferjax.io._figure import write_figure
from transferjax.io._load import load
from transferjax.io._open import open
from transferjax.io._peft import Adapter, read_peft
from transferjax.io._peft_write import write_peft
from transferjax.io._residual_cache import residual_cache
from transferjax.io._restore import restore
from transferjax.io._run import Run
from transferjax.io._save import save
from transferjax.io._state import fingerprint
from transferjax.io._teacher_cache import TeacherCache
from transferjax.io._transplant import transplant

__all__ = [
    "Adapter", "Checkpoint", "FeatureCache", "Run", "TeacherCache", "diff", "fingerprint", "load", "open", "read_peft",
    "residual_cache", "restore", "save", "transplant", "write_figure", "write_peft",
]  # fmt: skip
