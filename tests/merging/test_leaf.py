"""Leaf: chunks and threads change nothing."""

import jax
import numpy as np
import pytest

from transferjax.merging import (
    _leaf,
    breadcrumbs,
    dare,
    fisher,
    karcher,
    model_stock,
    regmean,
    slerp,
    soup,
    task_arithmetic,
    ties,
)
from transferjax.merging._leaf import Leaf

RNG = np.random.default_rng(0)
BASE, *MODELS = ({"w": RNG.standard_normal((13, 7)).astype(np.float32)} for _ in range(4))
CALLS = {
    "soup": lambda: soup(MODELS),
    "task_arithmetic": lambda: task_arithmetic(BASE, MODELS),
    "ties": lambda: ties(BASE, MODELS),
    "slerp": lambda: slerp(*MODELS[:2], 0.3),
    "karcher": lambda: karcher(MODELS),
    "model_stock": lambda: model_stock(BASE, MODELS),
    "fisher": lambda: fisher(MODELS, [{"w": model["w"] ** 2} for model in MODELS]),
    "regmean": lambda: regmean(MODELS, [{"w": np.eye(13)}] * 3),
}


@pytest.mark.parametrize("name", CALLS)
def test_small_chunks_and_threads_change_nothing(name, monkeypatch):
    whole = CALLS[name]()["w"]
    monkeypatch.setattr(_leaf, "CHUNK", 8)
    monkeypatch.setattr(_leaf, "ALONE", 0)
    np.testing.assert_allclose(CALLS[name]()["w"], whole, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), ()])
@pytest.mark.parametrize("traced", [False, True])
def test_leaves_without_elements_and_without_axes(shape, traced):
    trees, key = [{"w": np.ones(shape, np.float32)} for _ in range(3)], jax.random.key(0)
    calls = [
        soup,
        karcher,
        lambda trees: ties(trees[0], trees),
        lambda trees: task_arithmetic(trees[0], trees),
        lambda trees: model_stock(trees[0], trees),
        lambda trees: slerp(trees[0], trees[1], 0.3),
        lambda trees: dare(trees[0], trees, None, 0.5, key, rescale="l1"),
        lambda trees: breadcrumbs(trees[0], trees),
        lambda trees: fisher(trees, trees),
        lambda trees: regmean(trees, [{}] * 3),
    ]
    for call in calls:
        found = (jax.jit(call) if traced else call)(trees)["w"]
        np.testing.assert_allclose(found, np.ones(shape), rtol=1e-6)


def test_chunks_that_need_no_cast_are_views():
    array = np.ones(5, np.float32)
    leaf = Leaf("w", {"a": array, "b": array.astype(np.float16)}, traced=False)
    first, second = leaf.chunks(slice(1, 3))
    assert np.shares_memory(first, array) and second.dtype == np.float32


def test_the_first_error_of_several_threads_is_raised(monkeypatch):
    monkeypatch.setattr(_leaf, "ALONE", 0)
    leaf = Leaf("w", {"a": np.ones(3 * _leaf.CHUNK, np.float32)}, traced=False)

    def fail(at):
        raise ValueError(f"at {at.start}")

    with pytest.raises(ValueError, match="at 0"):
        leaf.each(fail)
