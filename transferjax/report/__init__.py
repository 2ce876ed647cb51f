"""Figures of reports and runs: matplotlib ``Figure`` objects come back, nothing is written."""

from transferjax.report._against import against
from transferjax.report._comparison import comparison
from transferjax.report._curves import curves
from transferjax.report._front import front
from transferjax.report._layers import layers
from transferjax.report._learning import learning_curves
from transferjax.report._matrix import matrix
from transferjax.report._movement import movement
from transferjax.report._predictions import predictions

__all__ = [
    "against", "comparison", "curves", "front", "layers", "learning_curves", "matrix", "movement", "predictions",
]  # fmt: skip
