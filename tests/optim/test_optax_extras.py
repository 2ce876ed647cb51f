"""What optax has beside plain optimizers works in a step as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import transferjax as tj

RNG = np.random.default_rng(0)
PARAMS = {
    "head": {"kernel": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)},
    "stem": {"kernel": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)},
}
BATCH = {"inputs": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32), "labels": jnp.arange(8) % 2}
TUNING = tj.chain(low=tj.lora("stem/kernel", 2), head=tj.train("head/**"))
SAM = contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05)))


def apply(params, extra, inputs, *, key=None, train=False):
    return jnp.tanh(inputs @ params["stem"]["kernel"]) @ params["head"]["kernel"], extra


MODEL = tj.Model(apply, None, PARAMS, {})
LOSS = tj.objectives.cross_entropy(apply)


def train(tx, steps, visit=lambda state: None, tuning=TUNING):
    state, frozen = tj.init(jax.random.key(0), MODEL, tuning, tx)
    step = tj.make_step(LOSS, tuning, tx)
    for _ in range(steps):
        state, _ = step(state, frozen, BATCH)
        visit(state)
    return state, frozen


def test_sharpness_aware_minimisation_takes_a_step_from_the_gradient_uphill():
    state, frozen = train(optax.GradientTransformation(*SAM), 6)
    weights, _ = TUNING.init(jax.random.split(jax.random.key(0))[0], PARAMS)
    value = jax.grad(lambda weights: LOSS(TUNING.merge(weights, frozen), {}, BATCH, None, True).value)
    for _ in range(3):
        gradients = value(weights)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
        uphill = jax.tree.map(lambda w, g, norm=norm: w + 0.05 * g / norm, weights, gradients)
        weights = jax.tree.map(lambda w, g: w - 0.1 * g, weights, value(uphill))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.trainable, weights)


def test_sharpness_aware_minimisation_needs_its_keywords_dropped_and_cannot_be_opaque():
    with pytest.raises(TypeError, match="unexpected keyword argument 'value'"):
        train(SAM, 1)
    opaque = contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True)
    with pytest.raises(ValueError, match="grad_fn must be provided when opaque_mode=True"):
        train(optax.GradientTransformation(*opaque), 1)


def test_schedule_free_weights_are_evaluated_where_they_are_averaged():
    state, frozen = train(contrib.schedule_free_adamw(0.1, warmup_steps=5), 60)
    average = contrib.schedule_free_eval_params(state.opt_state, state.trainable)
    evaluate = tj.make_eval(apply, {"accuracy": tj.objectives.accuracy}, TUNING)
    loss = lambda weights: float(LOSS(TUNING.merge(weights, frozen), {}, BATCH, None, False).value)
    assert loss(average) < 0.3 < loss(TUNING.init(jax.random.key(0), PARAMS)[0])
    averaged = dataclasses.replace(state, trainable=average)
    assert evaluate(averaged, frozen, [BATCH])["accuracy"] > 0.8


def test_an_average_of_the_updates_and_one_of_the_weights():
    seen = []
    state, _ = train(optax.chain(optax.sgd(0.1), optax.ema(0.9, debias=False)), 3, lambda s: seen.append(tj.copy(s)))
    moved = jax.tree.map(lambda a, b: b - a, seen[1].trainable, seen[2].trainable)
    jax.tree.map(lambda m, e: np.testing.assert_allclose(m, e, rtol=1e-3, atol=1e-6), moved, state.opt_state[1].ema)
    seen = [TUNING.init(jax.random.split(jax.random.key(0))[0], PARAMS)[0]]
    tx = tj.optim.with_average(optax.adamw(0.1), decay=0.5)
    state, _ = train(tx, 3, lambda s: seen.append(tj.copy(s.trainable)))
    expected = jax.tree.map(lambda *w: w[0] / 8 + w[1] / 8 + w[2] / 4 + w[3] / 2, *seen)
    found = tj.optim.averaged(state.opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
