"""Why: functions that return objectives, and per-example metrics."""

from transferjax.objectives import losses
from transferjax.objectives._adapt import adapt, jan, on_target
from transferjax.objectives._beside import auxiliary_loss, total
from transferjax.objectives._distill import distill, projector
from transferjax.objectives._mean_teacher import mean_teacher, with_teacher
from transferjax.objectives._metrics import accuracy, negative_log_likelihood, squared_error, top_k_accuracy
from transferjax.objectives._opponents import cdan, dann, discriminator, mdd
from transferjax.objectives._regularised import bi_tuning, bss, co_tuning, delta, lwf
from transferjax.objectives._regularisers import diagonal_fisher, ewc, l2_sp, mixout
from transferjax.objectives._supervised import (
    augment,
    binary_cross_entropy,
    cross_entropy,
    mean_squared_error,
    next_token,
    supervised,
)

__all__ = [
    "accuracy", "adapt", "augment", "auxiliary_loss", "bi_tuning", "binary_cross_entropy", "bss", "cdan",
    "co_tuning", "cross_entropy", "dann", "delta", "diagonal_fisher", "discriminator", "distill", "ewc", "jan",
    "l2_sp", "losses", "lwf", "mdd", "mean_squared_error", "mean_teacher", "mixout", "negative_log_likelihood",
    "next_token", "on_target", "projector", "squared_error", "supervised", "top_k_accuracy", "total", "with_teacher",
]  # fmt: skip
