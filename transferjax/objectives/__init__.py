"""Why: functions that return objectives, and per-example metrics."""

from transferjax.objectives import losses
from transferjax.objectives._adapt import adapt, jan, on_target
from transferjax.objectives._metrics import accuracy, negative_log_likelihood, squared_error, top_k_accuracy
from transferjax.objectives._opponents import cdan, dann, discriminator, mdd
from transferjax.objectives._supervised import (
    augment,
    binary_cross_entropy,
    cross_entropy,
    mean_squared_error,
    next_token,
    supervised,
)

__all__ = [
    "accuracy", "adapt", "augment", "binary_cross_entropy", "cdan", "cross_entropy", "dann", "discriminator", "jan",
    "losses", "mdd", "mean_squared_error", "negative_log_likelihood", "next_token", "on_target", "squared_error",
    "supervised", "top_k_accuracy",
]  # fmt: skip
