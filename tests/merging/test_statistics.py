"""Fisher-weighted means and RegMean against what they minimise."""

import jax
import numpy as np
import pytest

from transferjax._errors import DataError
from transferjax.merging import fisher, regmean, soup

RNG = np.random.default_rng(0)
MODELS = [{"w": RNG.standard_normal((3, 4)).astype(np.float32)} for _ in range(3)]
FISHERS = [{"w": RNG.random((3, 4)).astype(np.float32)} for _ in range(3)]


def test_fisher_is_the_mode_of_the_product_of_the_models_posteriors():
    """Of Gaussians around each model, with the Fisher information as precision: there the gradient is zero."""
    weights = np.array([0.5, 1.0, 2.0])
    found = fisher(MODELS, FISHERS, weights)["w"]
    gradient = sum(w * f["w"] * (m["w"] - found) for w, f, m in zip(weights, FISHERS, MODELS))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_equal_fishers_give_the_soup():
    np.testing.assert_allclose(fisher(MODELS, FISHERS[:1] * 3)["w"], soup(MODELS)["w"], rtol=1e-6)


def test_where_no_model_knows_anything_the_models_are_averaged():
    fishers = [{"w": np.array([[0.0, 1.0]])}, {"w": np.array([[0.0, 3.0]])}]
    models = [{"w": np.array([[1.0, 0.0]])}, {"w": np.array([[5.0, 4.0]])}]
    assert fisher(models, fishers)["w"].tolist() == [[3.0, 3.0]]
    assert fisher(models, fishers, [3, 1])["w"].tolist() == [[2.0, 2.0]]


def test_fishers_may_be_of_another_dtype_and_need_no_integers():
    models = [{"w": np.ones(2, np.float16), "steps": np.array(3)}, {"w": np.zeros(2, np.float16), "steps": np.array(3)}]
    found = fisher(models, [{"w": np.array([1.0, 3.0])}, {"w": np.array([1.0, 1.0])}])
    assert found["w"].dtype == np.float16 and found["w"].tolist() == [0.5, 0.75] and found["steps"] == 3


def test_fisher_under_jit():
    np.testing.assert_allclose(jax.jit(fisher)(MODELS, FISHERS)["w"], fisher(MODELS, FISHERS)["w"], rtol=1e-5)


@pytest.mark.parametrize(
    ("fishers", "message"),
    [
        (FISHERS[:2], r"fisher\(\) got 2 fishers for 3 models. Expected one per model"),
        ([*FISHERS[:2], {"wo": FISHERS[2]["w"]}], "fisher 2 lacks 'w', which the models have.*Nearest: wo"),
        ([*FISHERS[:2], {**FISHERS[2], "v": np.ones(1)}], "fisher 2 has 'v', which the models lack.*Nearest: w"),
        ([*FISHERS[:2], {"w": np.ones((4, 3))}], r"'w' is \(4, 3\) float64 in fisher 2 and \(3, 4\) float32"),
        ([*FISHERS[:2], {"w": -FISHERS[2]["w"]}], "'w' is negative in fisher 2. Expected squares of gradients"),
        ([*FISHERS[:2], {"w": np.full((3, 4), np.nan)}], "'w' has NaN or infinity in fisher 2"),
        (FISHERS[0], r"fisher\(\) expects a list of trees as fishers, got dict"),
    ],
    ids=["number", "missing", "surplus", "shape", "negative", "NaN", "no list"],
)
def test_fishers_fit_their_models(fishers, message):
    with pytest.raises(DataError, match=message):
        fisher(MODELS, fishers)


@pytest.mark.parametrize("weights", [[1, 1, -1], [0, 0, 0]])
def test_fisher_weights_are_not_negative(weights):
    with pytest.raises(DataError, match=r"fisher\(\) got weights .*Expected none below zero, and one above"):
        fisher(MODELS, FISHERS, weights)


def layers(count=3, d_in=5, d_out=4, examples=40):
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal((examples, d_in)) @ rng.standard_normal((d_in, d_in)) for _ in range(count)]
    models = [{"kernel": rng.standard_normal((d_in, d_out)), "bias": rng.standard_normal(d_out)} for _ in range(count)]
    return models, inputs, [{"kernel": x.T @ x} for x in inputs]


def test_regmean_minimises_the_distance_to_each_models_outputs():
    models, inputs, grams = layers()
    found = regmean(models, grams, alpha=1.0)
    outputs = [x @ model["kernel"] for x, model in zip(inputs, models)]
    expected = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(outputs), rcond=None)[0]
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-9)
    np.testing.assert_allclose(found["bias"], soup(models)["bias"])


def test_alpha_scales_what_is_off_the_diagonal():
    models, _, grams = layers()
    shrunk = [{"kernel": np.where(np.eye(5), g["kernel"], 0.9 * g["kernel"])} for g in grams]
    np.testing.assert_allclose(regmean(models, grams)["kernel"], regmean(models, shrunk, alpha=1.0)["kernel"])
    diagonal = fisher(
        [{"w": m["kernel"]} for m in models], [{"w": np.diag(g["kernel"])[:, None] + np.zeros((5, 4))} for g in grams]
    )
    np.testing.assert_allclose(regmean(models, grams, alpha=0.0)["kernel"], diagonal["w"])


@pytest.mark.parametrize("shape", [(5, 2, 2), (5, 4), (1, 5, 4), (5, 1, 4)])
def test_kernels_of_convolutions_and_heads(shape):
    models, _, grams = layers()
    shaped = [{"kernel": model["kernel"].reshape(shape)} for model in models]
    expected = regmean(models, grams)["kernel"]
    np.testing.assert_allclose(regmean(shaped, grams)["kernel"], expected.reshape(shape))


def test_inputs_that_are_always_zero_average_their_row():
    models, inputs, _ = layers()
    for x in inputs:
        x[:, 2] = 0
    grams = [{"kernel": x.T @ x} for x in inputs]
    np.testing.assert_allclose(regmean(models, grams)["kernel"][2], soup(models)["kernel"][2])


def test_regmean_under_jit():
    models, _, grams = jax.tree.map(np.float32, layers())
    np.testing.assert_allclose(jax.jit(regmean)(models, grams)["kernel"], regmean(models, grams)["kernel"], rtol=2e-3)


def test_few_examples_leave_the_grams_singular():
    models, inputs, _ = layers(examples=1)
    inputs = [np.round(x[:, :1]) * np.ones((1, 5)) for x in inputs]
    with pytest.raises(DataError, match=r"the grams of 'kernel' sum to a singular matrix. Expected alpha below one"):
        regmean(models, [{"kernel": x.T @ x} for x in inputs], alpha=1.0)
    assert np.isfinite(regmean(models, [{"kernel": x.T @ x} for x in inputs])["kernel"]).all()


@pytest.mark.parametrize(
    ("grams", "message"),
    [
        ([{}] * 2, r"regmean\(\) expects grams as a list .* one for each of 3 models; got 2 of them"),
        ({}, r"regmean\(\) expects grams as a list .* got dict"),
        ([{"kern": np.eye(5)}] * 3, "gram 0 of 'kern' has no kernel in the models. Nearest: kernel"),
        ([{"kernel": np.eye(5)}] * 2 + [{}], "'kernel' has a gram in only some of the models"),
        ([{"kernel": np.eye(4)}] * 3, r"gram 0 of 'kernel' is \(4, 4\) float64; expected \(5, 5\) for \(5, 4\)"),
        ([{"bias": np.eye(4)}] * 3, r"gram 0 of 'bias' .*expected none, as it has no two axes"),
        ([{"kernel": np.full((5, 5), np.inf)}] * 3, "gram 0 of 'kernel' has NaN or infinity"),
    ],
    ids=["number", "no list", "no kernel", "some models", "size", "vector", "infinite"],
)
def test_grams_fit_their_kernels(grams, message):
    with pytest.raises(DataError, match=message):
        regmean(layers()[0], grams)


def test_alpha_is_a_share():
    models, _, grams = layers()
    with pytest.raises(DataError, match=r"regmean\(\) got alpha=1.1. Expected a share of the elements in \[0, 1\]"):
        regmean(models, grams, alpha=1.1)
