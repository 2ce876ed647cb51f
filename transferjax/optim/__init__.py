"""How fast: functions that return optax transforms and schedules."""

from transferjax.optim._groups import per_group
from transferjax.optim._lora_plus import lora_plus
from transferjax.optim._schedules import AverageState, averaged, warmup_cosine, with_average

__all__ = ["AverageState", "averaged", "lora_plus", "per_group", "warmup_cosine", "with_average"]
