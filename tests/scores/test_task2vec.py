"""Task2Vec against the Fisher information of a linear classifier, which has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax._errors import DataError, SelectionError
from transferjax.scores import task2vec, task2vec_distance

RNG = np.random.default_rng(0)
KERNEL, BIAS = RNG.normal(size=(4, 3)).astype(np.float32), RNG.normal(size=3).astype(np.float32)


def apply(params, extra, inputs, *, key=None, train=False):
    return inputs @ params["head"]["kernel"] + params["head"]["bias"], extra


MODEL = tj.Model(apply, None, {"head": {"bias": jnp.asarray(BIAS), "kernel": jnp.asarray(KERNEL)}}, {})
INPUTS = RNG.normal(size=(20, 4)).astype(np.float32)


def batches(inputs=INPUTS, size=7):
    return [{"inputs": inputs[start : start + size]} for start in range(0, len(inputs), size)]


def expected(inputs=INPUTS):
    """E over y of (d log p(y) / d logit_c)^2 = p_c (1 - p_c), times x^2."""
    p = np.asarray(jax.nn.softmax(inputs @ KERNEL + BIAS), np.float64)
    bias = p * (1 - p)
    kernel = np.square(inputs)[:, :, None] * bias[:, None]
    return np.concatenate([bias.mean(0), kernel.mean((0, 1))])


def test_it_is_the_diagonal_of_the_fisher_information():
    found = task2vec(MODEL, batches())
    assert found.dtype == np.float64 and found.shape == (6,)
    np.testing.assert_allclose(found, expected(), rtol=1e-5)
    np.testing.assert_allclose(task2vec(MODEL, batches(size=20)), found, rtol=1e-5)


def test_a_selection_and_the_weights_of_examples():
    np.testing.assert_allclose(task2vec(MODEL, batches(), select="head/kernel"), expected()[3:], rtol=1e-5)
    padded = {"inputs": np.concatenate([INPUTS, INPUTS[:3] * 9]), "weight": np.repeat([1.0, 0.0], [20, 3])}
    np.testing.assert_allclose(task2vec(MODEL, [padded]), expected(), rtol=1e-5)


def test_drawn_labels_give_the_same_in_the_mean():
    many = np.tile(INPUTS, (200, 1))
    found = task2vec(MODEL, batches(many, 1000), key=jax.random.key(0))
    np.testing.assert_allclose(found, expected(), rtol=0.1)
    assert not np.allclose(found, expected(), rtol=1e-4)
    np.testing.assert_array_equal(found, task2vec(MODEL, batches(many, 1000), key=jax.random.key(0)))


def test_tasks_that_use_other_inputs_are_far_apart():
    masks = [np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])]
    deep = lambda params, extra, inputs, **_: (jnp.tanh(inputs * params["scale"]) @ params["kernel"], extra)
    model = tj.Model(deep, None, {"scale": jnp.ones(4), "kernel": jnp.asarray(KERNEL)}, {})
    one, same, other = (
        task2vec(model, batches((RNG.normal(size=(40, 4)) * masks[k]).astype(np.float32)), select="scale")
        for k in (0, 0, 1)
    )
    assert task2vec_distance(one, same) < 0.1 < 0.9 < task2vec_distance(one, other)


def test_the_distance_is_its_formula():
    a, b = np.abs(RNG.normal(size=(2, 9)))
    a[3] = b[3] = 0.0  # what neither task uses
    u, v = np.delete(a / (a + b + 1e-300), 3), np.delete(b / (a + b + 1e-300), 3)
    cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    assert task2vec_distance(a, b) == pytest.approx(1 - cosine, rel=1e-9)
    assert task2vec_distance(b, a) == task2vec_distance(a, b) and task2vec_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_bad_inputs():
    flat = MODEL._replace(apply=lambda params, extra, inputs, **_: (inputs.sum((1,)), extra))
    with pytest.raises(DataError, match=r"the model's outputs are \(7,\) float32; task2vec needs logits \[B, C\]"):
        task2vec(flat, batches())
    with pytest.raises(DataError, match=r"task2vec got no example\. Expected batches with inputs"):
        task2vec(MODEL, [])
    with pytest.raises(DataError, match="the Fisher information is not finite, or zero throughout"):
        task2vec(MODEL, batches(INPUTS * 0), select="head/kernel")
    with pytest.raises(SelectionError, match=r"'haed/\*' matched none"):
        task2vec(MODEL, batches(), select="haed/*")
    with pytest.raises(DataError, match=r"the embeddings are \(2,\) float64 and \(3,\) float64; expected two vectors"):
        task2vec_distance([1.0, 2.0], [1.0, 2.0, 3.0])
    for bad in ([0.0, 0.0], [-1.0, 1.0], [np.nan, 1.0]):
        with pytest.raises(DataError, match="an embedding is negative, zero throughout or not finite"):
            task2vec_distance([1.0, 2.0], bad)
