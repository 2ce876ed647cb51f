"""Supervised objectives against their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import transferjax as tj

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(6, 4)).astype(np.float32)
KERNEL = RNG.normal(size=(4, 3)).astype(np.float32)
LOGITS = INPUTS @ KERNEL
LABELS = RNG.integers(0, 3, 6)


def apply(params, extra, inputs, *, key=None, train=False):
    return inputs @ params, extra


def call(objective, batch, key=None, train=True):
    return objective(jnp.asarray(KERNEL), {"seen": 1}, batch, key, train)


def test_cross_entropy_with_smoothing_and_class_weights():
    log_p = np.asarray(jax.nn.log_softmax(LOGITS))
    batch = {"inputs": INPUTS, "labels": LABELS}
    loss = call(tj.objectives.cross_entropy(apply), batch)
    np.testing.assert_allclose(loss.value, -log_p[np.arange(6), LABELS].mean(), rtol=1e-6)
    assert float(loss.metrics["accuracy"]) == pytest.approx((LOGITS.argmax(-1) == LABELS).mean())
    assert loss.extra == {"seen": 1}
    smooth = 0.9 * np.eye(3)[LABELS] + 0.1 / 3
    loss = call(tj.objectives.cross_entropy(apply, label_smoothing=0.1), batch)
    np.testing.assert_allclose(loss.value, -(smooth * log_p).sum(-1).mean(), rtol=1e-6)
    weights = np.array([1.0, 2.0, 5.0], np.float32)
    loss = call(tj.objectives.cross_entropy(apply, class_weights=weights), batch)
    expected = np.average(-log_p[np.arange(6), LABELS], weights=weights[LABELS])
    np.testing.assert_allclose(loss.value, expected, rtol=1e-6)


def test_soft_targets_equal_one_hot_labels():
    hard = call(tj.objectives.cross_entropy(apply), {"inputs": INPUTS, "labels": LABELS})
    soft = call(tj.objectives.cross_entropy(apply), {"inputs": INPUTS, "labels": np.eye(3, dtype="f")[LABELS]})
    np.testing.assert_allclose(hard.value, soft.value, rtol=1e-6)
    assert float(hard.metrics["accuracy"]) == float(soft.metrics["accuracy"])


def test_a_label_outside_the_classes_gives_nan():
    labels = LABELS.copy()
    labels[2] = 3
    assert np.isnan(call(tj.objectives.cross_entropy(apply), {"inputs": INPUTS, "labels": labels}).value)


def test_binary_cross_entropy():
    labels = (RNG.random((6, 3)) > 0.5).astype(np.float32)
    batch = {"inputs": INPUTS, "labels": labels}
    expected = optax.sigmoid_binary_cross_entropy(LOGITS, labels).mean()
    loss = call(tj.objectives.binary_cross_entropy(apply), batch)
    np.testing.assert_allclose(loss.value, expected, rtol=1e-6)
    assert float(loss.metrics["accuracy"]) == pytest.approx(((LOGITS > 0) == (labels > 0.5)).mean())
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    weighted = -(np.array([1.0, 2.0, 3.0]) * labels * np.log(p) + (1 - labels) * np.log(1 - p))
    loss = call(tj.objectives.binary_cross_entropy(apply, positive_weight=jnp.array([1.0, 2.0, 3.0])), batch)
    np.testing.assert_allclose(loss.value, weighted.mean(), rtol=1e-5)
    one = tj.objectives.binary_cross_entropy(lambda p, e, x, *, key=None, train=False: (x[:, 0], e))
    np.testing.assert_allclose(
        call(one, {"inputs": INPUTS, "labels": labels[:, 0] > 0}).value,
        optax.sigmoid_binary_cross_entropy(INPUTS[:, 0], labels[:, 0]).mean(),
        rtol=1e-6,
    )


def test_mean_squared_error():
    labels = RNG.normal(size=(6, 3)).astype(np.float32)
    loss = call(tj.objectives.mean_squared_error(apply), {"inputs": INPUTS, "labels": labels})
    np.testing.assert_allclose(loss.value, ((LOGITS - labels) ** 2).mean(), rtol=1e-6)
    np.testing.assert_allclose(loss.metrics["mean_absolute_error"], np.abs(LOGITS - labels).mean(), rtol=1e-6)


def test_next_token_counts_masked_and_weighted_targets_only():
    table = RNG.normal(size=(5, 5)).astype(np.float32)
    tokens = RNG.integers(0, 5, (3, 4))
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]])
    weight = np.array([1.0, 2.0, 0.5], np.float32)
    lookup = lambda params, extra, inputs, *, key=None, train=False: (params[inputs], extra)
    batch = {"inputs": tokens, "mask": mask, "weight": weight}
    loss = tj.objectives.next_token(lookup)(jnp.asarray(table), {}, batch, None, True)
    log_p = np.asarray(jax.nn.log_softmax(table))
    counted = (mask * weight[:, None])[:, 1:]
    values = -log_p[tokens[:, :-1], tokens[:, 1:]]
    right = table[tokens[:, :-1]].argmax(-1) == tokens[:, 1:]
    np.testing.assert_allclose(loss.value, (values * counted).sum() / counted.sum(), rtol=1e-6)
    np.testing.assert_allclose(loss.metrics["accuracy"], (right * counted).sum() / counted.sum(), rtol=1e-6)
    named = tj.objectives.next_token(lambda p, e, x, *, key=None, train=False: (p[x["tokens"]], e))
    loss = named(jnp.asarray(table), {}, {"inputs": {"tokens": tokens}}, None, True)
    np.testing.assert_allclose(loss.value, values.mean(), rtol=1e-6)


def test_augmentations_run_in_order_with_their_own_keys_and_only_with_a_key():
    seen = []

    def note(name):
        def function(batch, key):
            seen.append((name, jax.random.key_data(key).tolist()))
            return {**batch, "inputs": batch["inputs"] * 2}

        return function

    objective = tj.objectives.augment(tj.objectives.cross_entropy(apply), note("a"), note("b"))
    batch = {"inputs": INPUTS, "labels": LABELS}
    plain = tj.objectives.cross_entropy(apply)
    loss = call(objective, batch, jax.random.key(0))
    np.testing.assert_allclose(loss.value, call(plain, {**batch, "inputs": 4 * INPUTS}).value, rtol=1e-6)
    assert [name for name, _ in seen] == ["a", "b"] and seen[0][1] != seen[1][1]
    assert float(call(objective, batch, None, False).value) == float(call(plain, batch).value)
    with pytest.raises(tj.TransferError, match=r"augment\(\) needs a key in training: pass key=jax.random.key"):
        call(objective, batch)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_outside_its_range_raises(smoothing):
    with pytest.raises(tj.TransferError, match=r"cross_entropy\(\) expects label_smoothing in \[0, 1\), got"):
        tj.objectives.cross_entropy(apply, label_smoothing=smoothing)


def test_class_weights_of_another_number_of_classes_raise():
    objective = tj.objectives.cross_entropy(apply, class_weights=jnp.ones(4))
    with pytest.raises(tj.DataError, match=r"class_weights has shape \(4,\); expected \(3,\), one per class\."):
        call(objective, {"inputs": INPUTS, "labels": LABELS})


OBJECTIVES = {
    "cross_entropy": lambda: tj.objectives.cross_entropy(apply),
    "binary_cross_entropy": lambda: tj.objectives.binary_cross_entropy(apply),
    "mean_squared_error": lambda: tj.objectives.mean_squared_error(apply),
    "next_token": lambda: tj.objectives.next_token(apply),
    "augment": lambda: tj.objectives.augment(tj.objectives.mean_squared_error(apply), jnp.subtract),
    "supervised": lambda: tj.objectives.supervised(apply, Partial(jnp.subtract), {}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_made_twice_is_one_program(name):
    first, second = OBJECTIVES[name](), OBJECTIVES[name]()
    assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_without_its_entries_raises(name):
    wanted = "inputs" if name == "next_token" else "inputs and labels"
    with pytest.raises(tj.DataError) as error:
        call(OBJECTIVES[name](), {"images": INPUTS}, train=False)
    assert str(error.value) == f"the batch has no 'inputs': it has ['images']. Expected {wanted}."


@pytest.mark.parametrize("label", [-100, 99])
def test_a_label_outside_the_classes_counts_nothing_where_the_weight_is_zero(label):
    objective = tj.objectives.cross_entropy(apply)
    batch = {"inputs": jnp.eye(3), "labels": jnp.array([0, 1, label]), "weight": jnp.array([1.0, 1.0, 0.0])}
    value, gradient = jax.value_and_grad(lambda p: objective(p, {}, batch, None, True).value)(jnp.ones((3, 4)))
    short = {"inputs": jnp.eye(3)[:2], "labels": jnp.array([0, 1])}
    expected, wanted = jax.value_and_grad(lambda p: objective(p, {}, short, None, True).value)(jnp.ones((3, 4)))
    assert value == expected
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)


def test_a_masked_token_may_be_any_number():
    table = lambda params, extra, inputs, *, key=None, train=False: (params[jnp.clip(inputs, 0, 3)], extra)
    objective = tj.objectives.next_token(table)
    batch = {"inputs": jnp.array([[1, 2, -100]]), "mask": jnp.array([[1, 1, 0]])}
    value, gradient = jax.value_and_grad(lambda p: objective(p, {}, batch, None, True).value)(jnp.zeros((4, 4)))
    assert jnp.isfinite(value) and bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize(
    "make",
    [
        tj.objectives.cross_entropy,
        tj.objectives.binary_cross_entropy,
        tj.objectives.mean_squared_error,
        tj.objectives.next_token,
        functools.partial(tj.objectives.supervised, loss=tj.objectives.squared_error, metrics={}),
    ],
)
def test_an_objective_wants_the_apply_of_a_model(make):
    name = getattr(make, "__name__", "supervised")
    form = rf"{name}\(\) expects a function \(params, extra, inputs, \*, key, train\) first, got "
    with pytest.raises(tj.TransferError, match=form + r"Model: pass model\.apply\."):
        make(tj.Model(abs, None, {}, {}))
    with pytest.raises(tj.TransferError, match=form + r"function of \(outputs, batch\): pass model\.apply\."):
        make(tj.objectives.accuracy)
    make(max)  # a function without a signature is taken on trust
