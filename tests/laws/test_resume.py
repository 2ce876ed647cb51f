"""Run N steps == run k, keep the state, run N - k: the same bits."""

import jax
import optax

import transferjax as tj
from transferjax.testing._compare import require_same

N, k = 5, 2


def test_a_run_that_is_interrupted_ends_with_the_same_bits(dict_model, batch):
    tuning = tj.chain(head=tj.train("head/**"), lora=tj.lora("blocks/*/kernel", 1))
    tx = tj.optim.with_average(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(tj.optim.warmup_cosine(0.1, N))))
    step = tj.make_step(tj.objectives.cross_entropy(dict_model.apply), tuning, tx)
    batches = [{**batch, "labels": (batch["labels"] + number) % 3} for number in range(N)]
    *_, (whole, _) = tj.fit(step, *tj.init(jax.random.key(0), dict_model, tuning, tx), batches)
    start, frozen = tj.init(jax.random.key(0), dict_model, tuning, tx)
    *_, (half, _) = tj.fit(step, start, frozen, batches[:k])
    kept = tj.copy(half)
    step = tj.make_step(tj.objectives.cross_entropy(dict_model.apply), tuning, tx)
    *_, (resumed, _) = tj.fit(step, kept, frozen, batches[k:])
    require_same("resume is exact", whole, resumed)
