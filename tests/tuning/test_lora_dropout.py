"""Dropout of an adapter's inputs: what a step drops, what it does not, and that nothing else ever drops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax import interop
from transferjax._context import tracing_step
from transferjax._errors import SelectionError
from transferjax.testing import check_step
from transferjax.tuning import lora_dropout

KEY = jax.random.key(0)
RATE = 0.4


def normal(key, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, key), shape)


PARAMS = {"stem": normal(0, 30, 12), "head": {"kernel": normal(1, 12, 3), "bias": normal(2, 3)}}
BATCH = {"inputs": np.asarray(normal(3, 8, 30)), "labels": np.arange(8) % 3}


@pytest.fixture(scope="module")
def model():
    apply = lambda params, x: jnp.tanh(x @ params["stem"]) @ params["head"]["kernel"] + params["head"]["bias"]
    return interop.pure(apply, PARAMS)


def trained(tuning):
    trainable, frozen = tuning.init(KEY, PARAMS)
    return jax.tree.map(lambda x: x + 0.3 * normal(x.size, *x.shape), trainable), frozen


@functools.partial(jax.jit, static_argnums=(0, 1))
def within(tuning, form, trainable, frozen, step):
    with tracing_step(step):
        return getattr(tuning, form)(trainable, frozen)


def test_a_step_drops_rows_of_a_and_makes_the_others_larger():
    tuning = lora_dropout(tj.lora("{stem,head/kernel}", 2, alpha=6.0), RATE)
    trainable, frozen = trained(tuning)
    merged = within(tuning, "merge", trainable, frozen, 5)
    factors = {}
    for name, kernel, found, own in (
        ("stem", PARAMS["stem"], merged["stem"], trainable["stem"]),
        ("head", PARAMS["head"]["kernel"], merged["head"]["kernel"], trainable["head"]["kernel"]),
    ):
        change, whole = found - kernel, 3.0 * own["lora_a"] @ own["lora_b"]
        factor = np.asarray(jnp.sum(change * whole, 1) / jnp.sum(whole**2, 1))
        np.testing.assert_allclose(change, factor[:, None] * whole, atol=1e-5)
        np.testing.assert_allclose(np.minimum(abs(factor), abs(factor - 1 / (1 - RATE))), 0.0, atol=1e-5)
        factors[name] = factor > 0.5
        assert 0 < factors[name].sum() < len(factor)
    assert not np.array_equal(factors["stem"][:12], factors["head"])
    np.testing.assert_array_equal(merged["head"]["bias"], PARAMS["head"]["bias"])


def test_the_lifted_form_of_a_step_is_the_adapter_of_dropped_inputs(model):
    tuning = lora_dropout(tj.lora("stem", 2), RATE)
    trainable, frozen = trained(tuning)
    leaf = within(tuning, "lifted", trainable, frozen, 5)["stem"]
    kept = jnp.any(leaf.a != 0, 1) / (1 - RATE)
    x = BATCH["inputs"]
    expected = x @ PARAMS["stem"] + (x * kept) @ trainable["stem"]["lora_a"] @ trainable["stem"]["lora_b"]
    np.testing.assert_allclose(x @ leaf.dense(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(leaf.dense(), within(tuning, "merge", trainable, frozen, 5)["stem"], rtol=1e-5)


def test_draws_differ_by_step_and_seed_and_average_to_the_adapter():
    tuning, other = (lora_dropout(tj.lora("stem", 2), RATE, seed=seed) for seed in (0, 1))
    trainable, frozen = trained(tuning)
    at = lambda tuning, step: within(tuning, "merge", trainable, frozen, step)["stem"]
    np.testing.assert_array_equal(at(tuning, 2), at(tuning, 2))
    assert not np.allclose(at(tuning, 2), at(tuning, 3))
    assert not np.allclose(at(tuning, 2), at(other, 2))
    mean = np.mean([at(tuning, step) for step in range(400)], 0)
    whole = tuning.merge(trainable, frozen)["stem"]
    spread = np.sqrt(RATE / (1 - RATE) / 400) * np.abs(whole - PARAMS["stem"]).max()
    np.testing.assert_allclose(mean, whole, atol=4 * spread)


def test_outside_of_a_step_nothing_is_dropped():
    plain = tj.lora("stem", 2)
    tuning = lora_dropout(plain, RATE)
    trainable, frozen = trained(tuning)
    jax.tree.map(np.testing.assert_array_equal, tuning.init(KEY, PARAMS), plain.init(KEY, PARAMS))
    for form in ("merge", "lifted"):
        made = [getattr(one, form)(trainable, frozen) for one in (tuning, plain)]
        jax.tree.map(np.testing.assert_array_equal, *made)
    with tracing_step(jnp.array(1)):
        none = lora_dropout(plain, 0.0).merge(trainable, frozen)
    jax.tree.map(np.testing.assert_array_equal, none, plain.merge(trainable, frozen))


def test_embedding_tables_are_not_dropped():
    params = {"words": {"embedding": normal(0, 9, 4)}, "fc": {"kernel": normal(1, 4, 4)}}
    tuning = lora_dropout(tj.lora("**", 2), 0.9)
    trainable, frozen = tuning.init(KEY, params)
    found = within(tuning, "lifted", trainable, frozen, 0)
    np.testing.assert_array_equal(found["words"]["embedding"].a, trainable["words"]["embedding"]["lora_a"])
    assert not np.array_equal(found["fc"]["kernel"].a, trainable["fc"]["kernel"]["lora_a"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_with_dropout_keeps_the_laws_of_a_step(model, accumulate):
    tuning = tj.chain(lora=tj.lora("stem", 2), head=tj.train("head/**"))
    objective = tj.objectives.cross_entropy(model.apply)
    tx = tj.per_group(lora=optax.sgd(0.1), head=optax.sgd(0.1))
    check_step(objective, model, lora_dropout(tuning, RATE), tx, BATCH, accumulate=accumulate)


def test_steps_drop_anew_and_a_hoisted_step_drops_the_same(model):
    tuning, tx = lora_dropout(tj.lora("head/kernel", 2), RATE), optax.sgd(0.0)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    state, frozen = tj.init(KEY, model, tuning, tx)
    state = type(state)(state.step, state.key, trained(tuning)[0], state.extra, state.opt_state)
    hoisted = tj.hoist(step, state, frozen, BATCH)
    residual = hoisted.prefix(frozen, state.extra, step.objective, BATCH)
    other, losses = tj.copy(state), []
    for _ in range(3):
        state, metrics = step(state, frozen, BATCH)
        other, again = hoisted.step(other, frozen, residual)
        losses.append(float(metrics["loss"]))
        assert losses[-1] == pytest.approx(float(again["loss"]), rel=1e-6)
    assert len(set(losses)) == 3


def test_a_sweep_over_rates_is_one_program(model):
    def recipe(hyper):
        tuning = lora_dropout(tj.lora("stem", 2), hyper["rate"])
        return tj.objectives.cross_entropy(model.apply), tuning, optax.sgd(0.5)

    swept = tj.sweep(recipe, {"rate": [0.0, 0.5]}, model, [BATCH] * 3, key=KEY)
    losses = [row[list(swept.report.columns).index("loss")] for row in swept.report.rows]
    assert np.isfinite(losses).all() and losses[0] != losses[1]


def test_what_cannot_be_dropped_is_named():
    with pytest.raises(SelectionError, match=r"lora_dropout\(\) expects a rate from 0 to below 1, got 1"):
        lora_dropout(tj.lora("stem", 2), 1)
    with pytest.raises(SelectionError, match=r"lora_dropout\(\) expects a Tuning first, got float"):
        lora_dropout(0.1, 0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SelectionError, match=r"lora_dropout\(\) expects a seed from 0"):
        lora_dropout(tj.lora("stem", 2), 0.1, seed=-1)
    with pytest.raises(SelectionError, match=r"lora_dropout\(\) found no lora_a among the trainable leaves"):
        lora_dropout(tj.train("stem"), 0.1).init(KEY, PARAMS)
    with pytest.raises(SelectionError, match=r"does not apply to DoRA: 'a/stem' has a magnitude"):
        lora_dropout(tj.chain(a=tj.dora("stem", 2)), 0.1).init(KEY, PARAMS)
