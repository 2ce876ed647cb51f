"""Objectives with a second loss of the same pass, and sums of objectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax import TransferError

ob = tj.objectives
RNG = np.random.default_rng(0)
BATCH = {
    "inputs": RNG.normal(size=(4, 3)).astype(np.float32),
    "labels": np.array([0, 1, 0, 1]),
    "id": np.arange(4),
}


def network(params, x):
    body = tj.interop.mark("body", jnp.tanh(x @ params["body"]))
    return body @ params["head"]


@pytest.fixture
def model():
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape).astype(np.float32))
    return tj.interop.pure(network, {"body": draw(3, 5), "head": draw(5, 2)})


def squares(params, batch, layers):
    values = jnp.mean(layers["body"] ** 2, axis=1)
    weight = batch.get("weight", jnp.ones(len(values)))
    return jnp.sum(weight * values) / jnp.sum(weight)


def test_the_value_is_the_weighted_sum_and_metrics_are_those_of_both(model):
    plain = ob.cross_entropy(model.apply)(model.params, {}, BATCH, None, True)
    body = np.tanh(BATCH["inputs"] @ np.asarray(model.params["body"]))
    found = ob.auxiliary_loss(ob.cross_entropy, model, squares, at="body", weight=0.3, supervised_weight=0.7)(
        model.params, {}, BATCH, None, True
    )
    np.testing.assert_allclose(found.value, 0.7 * plain.value + 0.3 * np.mean(body**2), rtol=1e-6)
    assert set(found.metrics) == {"accuracy", "auxiliary_loss"}
    named = lambda params, batch, layers: (jnp.zeros(()), {"size": jnp.ones(())})
    assert set(ob.auxiliary_loss(None, model, named)(model.params, {}, BATCH, None, True).metrics) == {"size"}


def test_without_a_supervised_objective_no_labels_are_needed(model):
    objective = ob.auxiliary_loss(None, model, squares, at="body")
    assert objective(model.params, {}, {"inputs": BATCH["inputs"]}, None, True).value > 0
    with pytest.raises(tj.DataError, match="the batch has no 'inputs'"):
        objective(model.params, {}, {"labels": BATCH["labels"]}, None, True)


def test_what_is_no_maker_or_no_model_is_refused(model):
    with pytest.raises(TransferError, match=r"auxiliary_loss\(\) expects what makes an objective of a network"):
        ob.auxiliary_loss(ob.cross_entropy(model.apply), model, squares)
    with pytest.raises(TransferError, match=r"auxiliary_loss\(\) expects a Model.*capture is None"):
        ob.auxiliary_loss(None, model._replace(capture=None), squares, at="body")
    called_so = tj.interop.pure(lambda params, x: tj.interop.mark("outputs", x * params["scale"]), {"scale": 1.0})
    objective = ob.auxiliary_loss(None, called_so, squares, at="outputs")
    with pytest.raises(tj.SelectionError, match="a module is called 'outputs', which stands for the network's own"):
        objective(called_so.params, {}, BATCH, None, True)


def test_a_total_is_the_weighted_sum(model):
    one, other = ob.cross_entropy(model.apply), ob.auxiliary_loss(None, model, squares, at="body")
    found = ob.total({"small": 0.1}, task=one, small=other)(model.params, {}, BATCH, None, True)
    parts = [part(model.params, {}, BATCH, None, True).value for part in (one, other)]
    np.testing.assert_allclose(found.value, parts[0] + 0.1 * parts[1], rtol=1e-6)
    assert set(found.metrics) == {"task", "small", "accuracy", "auxiliary_loss"}
    twice = ob.total(a=one, b=one)(model.params, {}, BATCH, None, True)
    assert set(twice.metrics) == {"a", "b", "a/accuracy", "b/accuracy"}


def test_a_total_computes_alike_passes_once(model):
    objective = ob.total({"b": 0.5}, a=ob.cross_entropy(model.apply), b=ob.cross_entropy(model.apply))
    flops = lambda one: jax.jit(one, static_argnums=4).lower(model.params, {}, BATCH, None, False).compile()
    once, both = (flops(one).cost_analysis()["flops"] for one in (ob.cross_entropy(model.apply), ob.total(a=objective)))
    assert both < 1.5 * once


def test_a_part_of_a_total_that_is_no_objective_is_named(model):
    one = ob.cross_entropy(model.apply)
    with pytest.raises(TransferError, match=r"total\(\): 'keep' cannot be called as .* of what makes one, the result"):
        ob.total(task=one, keep=ob.l2_sp)
    keep = lambda params, extra, batch, key, train: jnp.sum(params["head"] ** 2)
    with pytest.raises(TransferError, match=r"total\(\): 'keep' returned \(\) float32; expected tj.Loss\(value"):
        ob.total(task=one, keep=keep)(model.params, {}, BATCH, None, True)


def test_statistics_of_a_total_are_those_of_the_part_that_changes_them():
    def apply(params, extra, inputs):
        return inputs @ params["kernel"], {"mean": extra["mean"] + inputs.mean()}

    model = tj.interop.pure(apply, {"kernel": jnp.eye(3)}, {"mean": jnp.zeros(())})
    still = jax.tree_util.Partial(lambda params, extra, batch, key, train: tj.Loss(jnp.zeros(()), {}, extra))
    found = ob.total(still=still, task=ob.cross_entropy(model.apply))(model.params, model.extra, BATCH, None, True)
    np.testing.assert_allclose(found.extra["mean"], BATCH["inputs"].mean(), rtol=1e-6)


def test_accumulation_of_a_total_counts_as_its_weighted_part(model):
    weights = jnp.array([1.0, 3.0])
    objective = ob.total(task=ob.cross_entropy(model.apply, class_weights=weights))
    tuning, tx = tj.full(), optax.sgd(0.1)
    results = []
    for parts in (1, 2):
        state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
        state, _ = tj.make_step(objective, tuning, tx, accumulate=parts)(state, frozen, BATCH)
        results.append(state.trainable)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)


def test_what_total_cannot_sum_is_refused(model):
    one = ob.cross_entropy(model.apply)
    with pytest.raises(TransferError, match=r"total\(\) got no objective"):
        ob.total()
    with pytest.raises(TransferError, match=r"total\(\): 'task' is .* expected an Objective"):
        ob.total(task=model)
    with pytest.raises(TransferError, match=r"total\(\) got float as weights. Expected them by name: \{'name': 0.1\}"):
        ob.total(0.5, task=one)
    with pytest.raises(TransferError, match=r"total\(\) has a weight for other, which is none of task"):
        ob.total({"other": 1.0}, task=one)
