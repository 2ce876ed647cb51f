"""LoRA+: two rates for two factors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.optim import lora_plus

PARAMS = {"fc": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}


def trainable():
    tuning = tj.chain(low=tj.lora("fc/kernel", 2), bias=tj.train("fc/bias"))
    return tuning.init(jax.random.key(0), PARAMS)[0]


def run(tx, steps=3):
    weights = trainable()
    state = tx.init(weights)
    for step in range(steps):
        gradients = jax.tree.map(lambda w, step=step: w * 0.1 + step + 1, weights)
        updates, state = tx.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


def test_it_equals_two_optimizers_with_two_rates():
    labels = tj.label(trainable(), {"fast": "**/lora_b"}, default="slow")
    apart = optax.partition(
        {"fast": optax.adamw(0.8, weight_decay=0.1), "slow": optax.adamw(0.1, weight_decay=0.1)}, labels
    )
    found = run(lora_plus(optax.adamw(0.1, weight_decay=0.1), 8.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, run(apart))


def test_another_leaf():
    found = run(lora_plus(optax.sgd(1.0), 2.0, leaf="bias"), 1)
    np.testing.assert_allclose(found["bias"]["fc"]["bias"], 1 - 2 * 1.1, rtol=1e-6)


def test_without_such_a_leaf_it_raises():
    with pytest.raises(tj.SelectionError, match="found no leaf 'lora_b' among the trainable ones"):
        lora_plus(optax.sgd(1.0)).init({"kernel": jnp.ones(2)})


@pytest.mark.parametrize("ratio", [0, -1.0, "16", True])
def test_a_bad_ratio_raises(ratio):
    with pytest.raises(tj.SelectionError, match="expects ratio as a number above 0, got"):
        lora_plus(optax.sgd(1.0), ratio)


def test_what_is_no_transform_raises():
    with pytest.raises(tj.SelectionError, match=r"lora_plus\(\) expects an optax transform, got float"):
        lora_plus(1e-3)
