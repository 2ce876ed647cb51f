"""Means of models: soups, greedy soups, and the line between two."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from transferjax._errors import DataError
from transferjax.merging import greedy_soup, soup, wise_ft


def one(value):
    return {"bias": np.array([value], np.float32)}


def test_a_weighted_soup_is_that_of_mergekit(peer, close):
    close(soup(peer.models, **peer.options("linear")), peer.tree("linear"))


def test_a_soup_is_the_mean(peer, close):
    close(soup(peer.models), {path: np.mean([m[path] for m in peer.models], axis=0) for path in peer.base})


def test_the_mean_of_small_floats_is_computed_in_float32():
    models = [{"w": np.full(300, 1.0, ml_dtypes.bfloat16)} for _ in range(300)]
    assert set(soup(models)["w"].tolist()) == {1.0}  # in bfloat16 the sum would stop at 256


def test_weights_may_be_negative_where_they_sum_to_one():
    assert soup([one(1.0), one(2.0)], [2.0, -1.0])["bias"].tolist() == [0.0]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_both_ends_of_wise_ft_are_exact(dtype):
    rng = np.random.default_rng(0)
    base, tuned = ({"w": rng.standard_normal(999).astype(dtype)} for _ in range(2))
    base["w"][:2], tuned["w"][:2] = [0.0, -0.0], [-0.0, 0.0]
    for alpha, end in ((0, base), (0.0, base), (np.float32(1.0), tuned)):
        assert wise_ft(base, tuned, alpha)["w"].tobytes() == end["w"].tobytes()


def test_both_ends_of_a_traced_wise_ft_are_exact():
    base, tuned = one(0.1), one(0.7)
    along = jax.jit(jax.vmap(lambda alpha: wise_ft(base, tuned, alpha)["bias"]))(jnp.array([0.0, 0.5, 1.0]))
    assert along[0] == base["bias"] and along[2] == tuned["bias"]
    np.testing.assert_allclose(along[1], 0.4, rtol=1e-6)


def test_wise_ft_extrapolates():
    assert wise_ft(one(1.0), one(2.0), 3.0)["bias"].tolist() == [4.0]
    assert wise_ft(one(1.0), one(2.0), -1.0)["bias"].tolist() == [0.0]


def test_the_coefficient_has_a_gradient():
    loss = lambda alpha: jnp.sum(wise_ft(one(1.0), one(3.0), alpha)["bias"] ** 2)
    np.testing.assert_allclose(jax.grad(loss)(0.25), 2 * 1.5 * 2)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), None, "half"])
def test_alpha_is_a_finite_number(alpha):
    with pytest.raises(DataError, match=r"wise_ft\(\) got alpha=.*Expected a finite number"):
        wise_ft(one(1.0), one(2.0), alpha)


def test_a_greedy_soup_takes_what_does_not_lower_the_score():
    models = [one(value) for value in (9.0, 1.0, -1.0, 3.0)]
    params, report = greedy_soup(models, lambda params: -abs(float(params["bias"][0])))
    assert params["bias"].tolist() == [0.0]
    assert report.columns == ("model", "own score", "score with it", "taken")
    assert report.rows == ((1, -1, -1, True), (2, -1, 0, True), (3, -3, -1, False), (0, -9, -3, False))
    assert report.metadata == {"score": 0.0, "taken": 2}


def test_the_best_model_is_always_taken():
    params, report = greedy_soup([one(2.0), one(4.0)], lambda params: jnp.max(params["bias"]))
    assert params["bias"].tolist() == [4.0] and report.column("taken") == [True, False]


@pytest.mark.parametrize("value", [float("nan"), None, np.zeros(2)])
def test_a_score_is_a_finite_number(value):
    with pytest.raises(DataError, match=r"greedy_soup\(\) got the score of model 0=.*Expected a finite number"):
        greedy_soup([one(1.0)], lambda params: value)


def test_unlike_models_are_told_before_any_is_evaluated():
    with pytest.raises(DataError, match="model 1 lacks 'bias', which model 0 has"):
        greedy_soup([one(1.0), {"other": np.zeros(1)}], lambda params: pytest.fail("it was evaluated"))
