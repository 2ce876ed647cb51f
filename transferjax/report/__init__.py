"""Figures of reports and runs: matplotlib ``Figure`` objects come back, nothing is written."""

from transferjax.report._comparison import comparison
from transferjax.report._curves import curves
from transferjax.report._predictions import predictions

__all__ = ["comparison", "curves", "predictions"]
