"""How fast: functions that return optax transforms and schedules."""

from transferjax.optim._groups import per_group
from transferjax.optim._schedules import AverageState, averaged, warmup_cosine, with_average

__all__ = ["AverageState", "averaged", "per_group", "warmup_cosine", "with_average"]
