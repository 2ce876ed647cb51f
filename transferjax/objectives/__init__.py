"""Why: functions that return objectives, and per-example metrics."""

from transferjax.objectives._metrics import accuracy, negative_log_likelihood, squared_error, top_k_accuracy
from transferjax.objectives._supervised import (
    augment,
    binary_cross_entropy,
    cross_entropy,
    mean_squared_error,
    next_token,
    supervised,
)

__all__ = [
    "accuracy", "augment", "binary_cross_entropy", "cross_entropy", "mean_squared_error", "negative_log_likelihood",
    "next_token", "squared_error", "supervised", "top_k_accuracy",
]  # fmt: skip
