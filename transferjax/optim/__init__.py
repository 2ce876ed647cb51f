"""How fast: functions that return optax transforms and schedules.

Any optax transform works as it is. Sharpness-aware minimisation needs its keywords dropped:
``sam = optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))``, then
``tx = optax.GradientTransformation(*sam)``; give each batch to the step twice, and evaluate after the second.
Its ``opaque_mode`` needs a function of gradients, which a step has not. Evaluate ``optax.contrib.schedule_free_adamw``
at ``state.trainable`` replaced by ``optax.contrib.schedule_free_eval_params(state.opt_state, state.trainable)``.
"""

from transferjax.optim._depth import depth_decay
from transferjax.optim._groups import per_group
from transferjax.optim._lora_plus import lora_plus
from transferjax.optim._schedules import AverageState, averaged, warmup_cosine, with_average
from transferjax.optim._towards import TowardsState, decay_towards

__all__ = [
    "AverageState", "TowardsState", "averaged", "decay_towards", "depth_decay", "lora_plus", "per_group",
    "warmup_cosine", "with_average",
]  # fmt: skip
