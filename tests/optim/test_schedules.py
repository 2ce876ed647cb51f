"""Schedules and moving averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj


@pytest.mark.parametrize(
    "options, values",
    [
        ({"steps": 100}, {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0, 200: 0.0}),
        ({"steps": 100, "warmup": 0.0}, {0: 1.0, 50: 0.5, 100: 0.0}),
        ({"steps": 10, "warmup": 0.5, "end": 0.2}, {0: 0.0, 5: 1.0, 10: 0.2}),
        ({"steps": 1}, {0: 1.0, 1: 0.0}),
        ({"steps": 2, "warmup": 0.5}, {0: 0.0, 1: 1.0, 2: 0.0}),
    ],
)
def test_warmup_cosine(options, values):
    schedule = tj.optim.warmup_cosine(1.0, **options)
    assert {step: round(float(schedule(step)), 6) for step in values} == values


def test_a_schedule_outside_its_range_raises():
    with pytest.raises(tj.TransferError, match=r"warmup_cosine\(\) expects at least 1 step, got 0\."):
        tj.optim.warmup_cosine(1.0, 0)
    for warmup in (-0.1, 1.0):
        with pytest.raises(tj.TransferError, match=r"expects warmup as a fraction in \[0, 1\), got"):
            tj.optim.warmup_cosine(1.0, 10, warmup=warmup)


def test_the_average_is_exponential_and_found_wherever_it_sits():
    tx = optax.chain(optax.clip(10.0), tj.optim.with_average(optax.sgd(1.0), 0.9), optax.identity())
    params, average = {"w": jnp.ones(2), "b": tj.Hole()}, np.ones(2)
    state = tx.init(params)
    for number in range(3):
        updates, state = tx.update({"w": jnp.full(2, 1.0 + number), "b": tj.Hole()}, state, params)
        params = optax.apply_updates(params, updates)
        average = 0.9 * average + 0.1 * np.asarray(params["w"])
    found = tj.optim.averaged(state)
    np.testing.assert_allclose(found["w"], average, rtol=1e-6)
    assert found["b"] == tj.Hole()
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(state)


def test_a_wrong_average_raises():
    for decay in (-0.1, 1.0):
        with pytest.raises(tj.TransferError, match=r"with_average\(\) expects a decay in \[0, 1\), got"):
            tj.optim.with_average(optax.sgd(1.0), decay)
    tx = tj.optim.with_average(optax.sgd(1.0))
    with pytest.raises(tj.TransferError, match=r"with_average\(\) needs the parameters: call tx\.update\(gradients"):
        tx.update(1.0, tx.init(jnp.ones(())))
    for state, count in ((optax.adam(1.0).init(1.0), 0), ((tx.init(1.0), tx.init(1.0)), 2)):
        with pytest.raises(tj.TransferError) as error:
            tj.optim.averaged(state)
        assert str(error.value) == (
            f"expected one moving average in the optimizer state, found {count}: use with_average()."
        )


def test_the_average_of_bfloat16_weights_moves_in_float32():
    tx = tj.optim.with_average(optax.sgd(1.0), 0.999)
    params = jnp.ones((), jnp.bfloat16)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jnp.ones((), jnp.bfloat16), state, params)
        params = optax.apply_updates(params, updates)
    found = tj.optim.averaged(state)
    assert found.dtype == jnp.float32 and 0.99 < float(found) < 1.0


@pytest.mark.parametrize(("warmup", "end"), [(0.1, 0.0), (0.0, 0.0), (0.25, 0.01)])
def test_a_traced_peak_gives_the_same_rates(warmup, end):
    plain = tj.optim.warmup_cosine(0.3, 40, warmup=warmup, end=end)
    traced = jax.jit(lambda peak, step: tj.optim.warmup_cosine(peak, 40, warmup=warmup, end=end)(step))
    for step in (0, 3, 4, 9, 10, 11, 25, 40, 50):
        np.testing.assert_allclose(traced(0.3, step), plain(step), rtol=1e-5, atol=1e-7)
