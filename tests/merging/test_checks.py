"""Weights: one per model, and of a mean a sum of one."""

import pathlib

import jax
import numpy as np
import pytest

from transferjax._errors import DataError
from transferjax.merging import fisher, karcher, search, soup, task_arithmetic, ties

TREES = [{"w": np.full(2, value)} for value in (1.0, 2.0)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"ties\(\) got weights of shape \(1,\) for 2 models. Expected one per model"),
        ([1.0, 1.0, 1.0], r"got weights of shape \(3,\) for 2 models"),
        (1.0, r"got weights of shape \(\) for 2 models. .*Density and scale go by name: density=0.2"),
        ([1.0, np.nan], r"ties\(\) got weights \[1.0, nan\]. Expected finite numbers"),
        ("ab", r"ties\(\) got str as weights. Expected one number per model"),
        ({"a": 1.0}, r"ties\(\) got dict as weights. Expected one number per model"),
    ],
)
def test_one_finite_weight_per_model(weights, message):
    with pytest.raises(DataError, match=message):
        ties(TREES[0], TREES, weights)


def test_traced_weights_of_a_mean_of_another_sum_give_nan_which_wins_no_search():
    run = jax.jit(lambda weights: soup(TREES, weights)["w"])
    np.testing.assert_allclose(run(np.array([0.25, 0.75])), 1.75)
    assert np.isnan(run(np.array([3.0, 3.0]))).all()
    trees = jax.tree.map(lambda leaf: leaf.astype(np.float32), TREES)
    found = search(lambda weights: soup(trees, weights), [[0.5, 0.5], [3.0, 3.0]], lambda tree: tree["w"].sum())
    assert found.metadata["best"] == (0.5, 0.5)


@pytest.mark.parametrize("tree", ["base.npz", pathlib.Path("base.npz")])
def test_a_path_is_no_tree(tree):
    with pytest.raises(
        DataError, match=r"soup\(\) got \w+ as model 0. .*transferjax.io.load\(path\), or leafwise\(soup"
    ):
        soup([tree])


@pytest.mark.parametrize("method", [soup, karcher])
def test_the_weights_of_a_mean_sum_to_one(method):
    with pytest.raises(DataError, match=r"got weights that sum to 1.1. Expected a sum of one, as those of a mean"):
        method(TREES, [0.6, 0.5])
    method(TREES, np.array([0.6, 0.4], np.float32))


def test_the_weights_of_a_karcher_mean_are_not_negative():
    with pytest.raises(DataError, match=r"karcher\(\) got weights .*Expected none below zero, and one above"):
        karcher(TREES, [1.5, -0.5])


@pytest.mark.parametrize("traced", [lambda w: w, lambda w: [w[0], w[1]], lambda w: (w[0], 0.5)])
def test_traced_weights_are_counted_too(traced):
    jax.jit(lambda w: task_arithmetic(TREES[0], TREES, traced(w)))(np.ones(2))
    with pytest.raises(DataError, match=r"task_arithmetic\(\) got 2 traced weights for 1 models. Expected one per"):
        jax.jit(lambda w: task_arithmetic(TREES[0], TREES[:1], traced(w)))(np.ones(2))


def test_traced_weights_are_the_same_numbers():
    fishers = [{"w": np.ones(2)}, {"w": np.full(2, 2.0)}]
    for call in (
        lambda w: soup(TREES, w),
        lambda w: karcher(TREES, w),
        lambda w: fisher(TREES, fishers, w),
        lambda w: ties(TREES[0], TREES, w, 0.5),
    ):
        weights = np.array([0.25, 0.75], np.float32)
        np.testing.assert_allclose(jax.jit(call)(weights)["w"], call(weights)["w"], rtol=1e-5)
