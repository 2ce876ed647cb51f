"""A quantised base is smaller, stays as it is, and learns like the rounded weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax._errors import SelectionError
from transferjax.program import is_lifted, materialised
from transferjax.tuning import frozen_matrices, quantisation_error, quantise

KEY = jax.random.key(0)
LORA = tj.lora("body/*/kernel", rank=2)
TUNINGS = {
    "lora": LORA,
    "head": tj.train("head/**"),
    "chain": tj.chain(head=tj.train("head/**"), lora=LORA),
}


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(KEY, 3)
    dense = lambda key, m, n: {"kernel": jax.random.normal(key, (m, n)) / m**0.5, "bias": jnp.zeros(n)}
    body = {"0": dense(keys[0], 64, 64), "1": dense(keys[1], 64, 64)}
    return {"body": body, "head": dense(keys[2], 64, 3)}


def apply(params, extra, x, *, key=None, train=False):
    for layer in params["body"].values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"], extra


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", TUNINGS)
def test_merging_gives_the_rounded_weights_and_the_lifted_form_the_same(params, name, kind):
    tuning = quantise("body/*/kernel", kind, TUNINGS[name])
    trainable, frozen = tuning.init(KEY, params)
    merged = tuning.merge(trainable, frozen)
    error = 0.01 if kind == "int8" else 0.12
    for number in "01":
        rounded, exact = merged["body"][number]["kernel"], params["body"][number]["kernel"]
        assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < error
        np.testing.assert_array_equal(merged["body"][number]["bias"], params["body"][number]["bias"])
    trainable = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), trainable)
    merged, lifted = tuning.merge(trainable, frozen), tuning.lifted(trainable, frozen)
    assert is_lifted(lifted["body"]["0"]["kernel"])
    dense = jax.tree.map(lambda x: x.dense() if is_lifted(x) else x, lifted, is_leaf=is_lifted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), dense, merged)
    shapes = jax.eval_shape(tuning.init, KEY, params)
    assert jax.tree.structure(shapes) == jax.tree.structure((trainable, frozen))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_step_learns_as_on_the_rounded_weights_and_leaves_the_codes(params, kind):
    model = tj.Model(apply, None, params, {})
    rounded = quantise("body/*/kernel", kind, LORA)
    batch = {"inputs": jax.random.normal(KEY, (8, 64)), "labels": jnp.arange(8) % 3}
    objective, tx = tj.objectives.cross_entropy(apply), optax.adam(0.01)
    state, frozen = tj.init(KEY, model, rounded, tx)
    before = tj.copy(frozen)
    plain = tj.Model(apply, None, rounded.merge(state.trainable, frozen), {})
    other, base = tj.init(KEY, plain, LORA, tx)
    step, reference = tj.make_step(objective, rounded, tx), tj.make_step(objective, LORA, tx)
    for _ in range(3):
        state, metrics = step(state, frozen, batch)
        other, expected = reference(other, base, batch)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, before, frozen)
    assert float(metrics["loss"]) < 1.2


def test_nothing_but_the_codes_is_kept(params):
    trainable, frozen = quantise("body/*/kernel", "int8", LORA).init(KEY, params)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert size(frozen["body"]) < 0.3 * size(params["body"])
    lifted = quantise("body/*/kernel", "int8", LORA).lifted(trainable, frozen)
    found = materialised(lambda params, x: apply(params, {}, x)[0], lifted, jnp.ones((2, 64)))
    assert found == ()


def test_the_report_says_what_it_costs(params):
    report = quantisation_error(params, "**/kernel", "nf4")
    assert report.column("path") == ["body/0/kernel", "body/1/kernel", "head/kernel"]
    assert all(0.01 < error < 0.12 for error in report.column("relative error"))
    assert report.metadata["ratio"] < 0.18


def test_frozen_matrices_are_what_a_tuning_leaves_alone(params):
    tuning = tj.chain(head=tj.train("head/**"), lora=LORA)
    chosen = frozen_matrices(tuning, params)
    assert tj.tree.matches(params, chosen) == [p for p, x in tj.paths(params).items() if x.ndim > 1 and "head" not in p]
    again = quantise(chosen, "int8", tuning)
    with pytest.raises(SelectionError, match="the tuning freezes no floating-point matrix, so there is nothing to"):
        frozen_matrices(again, params)
    with pytest.raises(SelectionError, match=r"frozen_matrices\(\) expects a Tuning first, got"):
        frozen_matrices("lora", params)


def test_bad_kinds_and_leaves_are_named(params):
    with pytest.raises(SelectionError, match="knows the kinds int8, nf4, got 'int3'"):
        quantise("**/kernel", "int3", LORA)
    with pytest.raises(SelectionError, match="expects a Tuning third, got"):
        quantise("**/kernel", "int8", "lora")
    with pytest.raises(SelectionError, match="selects 'head/kernel', which learns as a whole"):
        quantise("**/kernel", "int8", tj.train("head/**")).init(KEY, params)
    with pytest.raises(SelectionError, match="expects floating-point matrices; 'head/bias' is"):
        quantise("head/bias", "int8", LORA).init(KEY, params)
