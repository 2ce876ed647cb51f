"""Checkpoints: opened lazily, moved into a model by a plan, saved with digests."""

from transferjax.io._checkpoint import Checkpoint
from transferjax.io._open import open

__all__ = ["Checkpoint", "open"]
