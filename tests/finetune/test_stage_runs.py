"""Several stages over one stream of batches."""

import jax
import jax.numpy as jnp
import optax
import pytest

import transferjax as tj
from transferjax.finetune import Stage, run_stages

BATCH = {"inputs": jnp.ones(4), "labels": jnp.zeros(4)}


def apply(params, extra, x, *, key=None, train=False):
    return x * params["stem"] * params["head"], extra


def setting():
    model = tj.Model(apply, None, {"head": jnp.ones(()), "stem": jnp.ones(())}, {})
    tx, objective = tj.finetune.each_group(optax.adam(0.1)), tj.objectives.mean_squared_error(apply)
    steps = [tj.make_step(objective, tuning, tx) for tuning in tj.finetune.lp_ft("head")]
    return steps, *tj.init(jax.random.key(0), model, steps[0].tuning, tx)


def test_a_plateau_ends_a_stage_and_the_rest_of_the_batches_is_the_next_ones():
    steps, state, frozen = setting()
    wrap = lambda pairs, frozen: tj.early_stopping(pairs, "loss", patience=1, highest=True)
    stages = [Stage(steps[0], wrap=wrap), Stage(steps[1], steps=2)]
    reached = [progress.at for progress in run_stages(stages, state, frozen, [BATCH] * 9)]
    assert reached[-2:] == [(1, 1), (1, 2)]
    assert 1 <= reached[-3][1] < 7


def test_stages_that_cannot_run_are_named():
    steps, state, frozen = setting()
    run = lambda stages, batches=(BATCH,) * 9, **options: list(run_stages(stages, state, frozen, batches, **options))
    with pytest.raises(tj.TransferError, match=r"expected a list of stages, got .*Write \[Stage\("):
        run([])
    with pytest.raises(
        tj.TransferError, match=r"stage 1 of 2 never ends\. Give it steps, or a wrap that ends its loop"
    ):
        run([Stage(steps[0]), Stage(steps[1], 1)])
    with pytest.raises(tj.TransferError, match=r"stage 1 has a step .* and steps 0\. Expected what"):
        run([Stage(steps[0], 0)])
    with pytest.raises(tj.TransferError, match=r"at is \(2, 0\); expected \(stage, steps done in it\)"):
        run([Stage(steps[0], 1)], at=(2, 0))
    with pytest.raises(tj.DataError):
        run([Stage(steps[0], 3), Stage(steps[1], 3)], batches=[BATCH] * 4)
