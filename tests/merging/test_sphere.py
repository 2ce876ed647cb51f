"""Merges by angles against mergekit, and against what defines them."""

import jax
import numpy as np
import pytest

from transferjax._errors import DataError
from transferjax.merging import karcher, model_stock, slerp


@pytest.mark.parametrize(("case", "other"), [("slerp", "far"), ("slerp-line", "near")])
def test_slerp_is_that_of_mergekit(case, other, peer, close):
    close(slerp(peer.base, peer.tree(other), **peer.options(case)), peer.tree(case))


@pytest.mark.parametrize("case", ["karcher", "karcher-far"])
def test_karcher_is_that_of_mergekit(case, peer, close):
    models = [peer.base, peer.tree("far"), peer.tree("near")] if case == "karcher-far" else peer.models
    close(karcher(models), peer.tree(case))


def test_model_stock_is_that_of_mergekit(peer, close):
    close(model_stock(peer.base, peer.models), peer.tree("model_stock"))


def test_slerp_keeps_the_norm_between_equal_norms():
    a, b = {"w": np.array([3.0, 4.0])}, {"w": np.array([-4.0, 3.0])}
    for t in (0.1, 0.5, 0.9):
        assert np.linalg.norm(slerp(a, b, t)["w"]) == pytest.approx(5.0)


def test_slerp_of_opposite_vectors_is_a_line():
    a, b = {"w": np.array([1.0, 2.0])}, {"w": np.array([-1.0, -2.0])}
    assert slerp(a, b, 0.25)["w"].tolist() == [0.5, 1.0]


def test_slerp_of_zeros():
    zeros = {"w": np.zeros(3)}
    assert slerp(zeros, zeros, 0.5)["w"].tolist() == [0, 0, 0]
    np.testing.assert_allclose(slerp(zeros, {"w": np.ones(3)}, 0.5)["w"], np.sqrt(0.5))


def test_both_ends_of_slerp(peer):
    far = peer.tree("far")
    for path in far:
        np.testing.assert_array_equal(slerp(peer.base, far, 0.0)[path], peer.base[path])
        np.testing.assert_allclose(slerp(peer.base, far, 1.0)[path], far[path], rtol=1e-6)


@pytest.mark.parametrize("traced", [False, True])
def test_the_karcher_mean_of_two_is_the_middle_of_their_arc(traced):
    a, b = {"w": np.array([4.0, 0.0], np.float32)}, {"w": np.array([0.0, 2.0], np.float32)}
    mean = jax.jit(karcher) if traced else karcher
    np.testing.assert_allclose(mean([a, b])["w"], 3 * np.sqrt([0.5, 0.5]), rtol=1e-6)


def test_the_karcher_mean_is_where_the_weighted_logarithms_cancel():
    rng = np.random.default_rng(0)
    models = [{"w": rng.standard_normal(6) + 1} for _ in range(4)]
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    found = karcher(models, weights)["w"]
    units = [m["w"] / np.linalg.norm(m["w"]) for m in models]
    mean = found / np.linalg.norm(found)
    pull = 0
    for weight, unit in zip(weights, units):
        angle = np.arccos(unit @ mean)
        pull = pull + weight * angle / np.sin(angle) * (unit - (unit @ mean) * mean)
    assert np.abs(pull).max() < 1e-7
    assert np.linalg.norm(found) == pytest.approx(sum(w * np.linalg.norm(m["w"]) for w, m in zip(weights, models)))


@pytest.mark.parametrize("traced", [False, True])
def test_opposite_models_zeros_and_single_ones_have_a_karcher_mean(traced):
    mean = jax.jit(karcher) if traced else karcher
    up, down, zeros = ({"w": np.array(values, np.float32)} for values in ([1, 2], [-1, -2], [0, 0]))
    np.testing.assert_allclose(mean([up, down])["w"], up["w"], rtol=1e-6)
    np.testing.assert_array_equal(mean([zeros, zeros])["w"], [0, 0])
    np.testing.assert_allclose(mean([up, zeros])["w"], up["w"] / 2, rtol=1e-6)
    np.testing.assert_array_equal(mean([up])["w"], up["w"])


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([[2.0, 0.0], [2.0, 0.0]], [2.0, 0.0]),
        ([[2.0, 0.0], [0.0, 2.0]], [0.0, 0.0]),
        ([[2.0, 0.0], [-2.0, 0.0]], [0.0, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
    ],
    ids=["the same way", "across", "opposed", "unchanged"],
)
def test_model_stock_by_hand(models, expected):
    found = model_stock({"w": np.zeros(2)}, [{"w": np.array(model)} for model in models])
    np.testing.assert_allclose(found["w"], expected, atol=1e-12)


def test_model_stock_needs_two_models():
    with pytest.raises(DataError, match=r"model_stock\(\) expects at least 2 trees as models, got 1"):
        model_stock({"w": np.zeros(2)}, [{"w": np.zeros(2)}])


@pytest.mark.parametrize("t", [float("nan"), None, np.zeros(2)])
def test_t_is_a_finite_number(t):
    with pytest.raises(DataError, match=r"slerp\(\) got t=.*Expected a finite number"):
        slerp({"w": np.zeros(2)}, {"w": np.zeros(2)}, t)
