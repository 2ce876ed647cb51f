"""Layer-wise decay of the rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.optim import depth_decay

ORDER = ["stem/**", "block/**", "head/**"]
PARAMS = {
    "block": {"bn": {"bias": jnp.ones(3), "scale": jnp.ones(3)}, "kernel": jnp.ones((4, 3))},
    "head": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))},
    "stem": {"kernel": jnp.ones((2, 4))},
}


def scales(tuning, tx=None, params=PARAMS):
    """What a gradient of ones becomes, by path."""
    tx = depth_decay(0.5, ORDER) if tx is None else tx
    trainable = tuning.init(jax.random.key(0), params)[0]
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable), trainable)
    return {path: float(leaf.ravel()[0]) for path, leaf in tj.paths(updates).items()}


def test_each_stage_is_slower_than_the_next():
    assert scales(tj.full()) == {
        "block/bn/bias": 0.5, "block/bn/scale": 0.5, "block/kernel": 0.5,
        "head/bias": 1.0, "head/kernel": 1.0, "stem/kernel": 0.25,
    }  # fmt: skip


def test_what_is_frozen_stays_a_hole_and_keeps_its_place_in_the_order():
    assert scales(tj.train("stem/**")) == {"stem/kernel": 0.25}


def test_groups_and_adapters_have_the_rates_of_the_leaves_they_belong_to():
    tuning = tj.chain(low=tj.lora("{stem,block}/kernel", 2), rest=tj.train("head/**"))
    expected = {
        "low/block/kernel/lora_a": 0.5, "low/block/kernel/lora_b": 0.5, "low/stem/kernel/lora_a": 0.25,
        "low/stem/kernel/lora_b": 0.25, "rest/head/bias": 1.0, "rest/head/kernel": 1.0,
    }  # fmt: skip
    assert scales(tuning) == expected
    inside = tj.per_group(low=depth_decay(0.5, ORDER), rest=optax.identity())
    assert scales(tuning, inside) == expected
    leaves = ["stem/*", "block/*", "block/bn/*", "head/*"]  # as tj.stages writes them
    assert scales(tuning, depth_decay(0.5, leaves))["low/stem/kernel/lora_a"] == 0.125


@pytest.mark.parametrize("name", ["stem", "head", "block"])
def test_a_group_may_be_called_like_a_module(name):
    assert scales(tj.chain(**{name: tj.train("head/**")})) == {f"{name}/head/bias": 1.0, f"{name}/head/kernel": 1.0}
    assert scales(tj.chain(**{name: tj.train("stem/**")})) == {f"{name}/stem/kernel": 0.25}


def test_modules_that_look_like_groups_are_none():
    params = {name: {"kernel": jnp.ones(2)} for name in ("block", "head", "stem")}
    assert scales(tj.full(), params=params) == {"block/kernel": 0.5, "head/kernel": 1.0, "stem/kernel": 0.25}
    assert scales(tj.train("block/*"), params=params) == {"block/kernel": 0.5}


def test_the_last_stage_that_matches_a_leaf_is_its_own():
    found = scales(tj.full(), depth_decay(0.5, ["**", "block/**", "block/bn/*"]))
    assert found["block/bn/scale"] == 1.0 and found["block/kernel"] == 0.5 and found["head/bias"] == 0.25


def test_a_leaf_without_a_stage_raises():
    message = (
        r"1 of 2 trainable leaves are in no stage of depth_decay\(\): block/kernel\. Add selectors for them to order"
    )
    with pytest.raises(tj.SelectionError, match=message):
        scales(tj.chain(a=tj.train("{block,stem}/kernel")), depth_decay(0.5, ["stem/**", "head/**"]))


@pytest.mark.parametrize("decay", [0, -0.5, 1.5, "0.5", True, None, float("nan")])
def test_a_bad_decay_raises(decay):
    with pytest.raises(tj.SelectionError, match=r"depth_decay\(\) expects decay as a number in \(0, 1\], got"):
        depth_decay(decay, ORDER)


def test_a_bad_order_raises():
    with pytest.raises(tj.SelectionError, match=r"depth_decay\(\) expects order as a list of selectors, one per stage"):
        depth_decay(0.5, "stem/**")
    with pytest.raises(tj.SelectionError, match=r"depth_decay\(\) got an order without stages"):
        depth_decay(0.5, [])


def test_a_decay_may_be_traced_and_dtypes_stay():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)

    @jax.jit
    def updates(decay):
        tx = depth_decay(decay, ORDER)
        return tx.update(half, tx.init(half), half)[0]

    found = updates(0.5)
    assert found["stem"]["kernel"].dtype == jnp.bfloat16 and float(found["stem"]["kernel"][0, 0]) == 0.25


def apply(params, extra, inputs, *, key=None, train=False):
    hidden = jnp.tanh(inputs @ params["stem"]["kernel"]) @ params["block"]["kernel"]
    hidden = hidden * params["block"]["bn"]["scale"] + params["block"]["bn"]["bias"]
    return jnp.tanh(hidden) @ params["head"]["kernel"] + params["head"]["bias"], extra


def test_with_the_order_of_use_steps_equal_one_optimizer_per_rate():
    keys = iter(jax.random.split(jax.random.key(1), 9))
    params = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), PARAMS)
    model = tj.Model(apply, None, params, {})
    batch = {"inputs": jax.random.normal(next(keys), (6, 2)), "labels": jnp.arange(6) % 2}
    order = tj.stages(model, batch["inputs"])
    assert [repr(stage) for stage in order] == ["'stem/*'", "'block/*'", "'block/bn/*'", "'head/*'"]
    labels = tj.label(params, {str(number): stage for number, stage in enumerate(order)})
    apart = optax.partition({str(n): optax.adamw(0.1 * 0.8 ** (3 - n), weight_decay=0.1) for n in range(4)}, labels)
    found = []
    for tx in (optax.chain(optax.adamw(0.1, weight_decay=0.1), depth_decay(0.8, order)), apart):
        state, frozen = tj.init(jax.random.key(0), model, tj.full(), tx)
        step = tj.make_step(tj.objectives.cross_entropy(apply), tj.full(), tx)
        for _ in range(3):
            state, _ = step(state, frozen, batch)
        found.append(state.trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found)
