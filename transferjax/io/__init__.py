"""Checkpoints: opened lazily, moved into a model by a plan, saved with digests."""

from transferjax.io._checkpoint import Checkpoint
from transferjax.io._load import load
from transferjax.io._open import open
from transferjax.io._restore import restore
from transferjax.io._save import save

__all__ = ["Checkpoint", "load", "open", "restore", "save"]
