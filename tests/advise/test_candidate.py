"""A candidate: its features, its size, and what a step would cost."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax import DataError
from transferjax.advise import measure

WIDTHS = (6, 32, 32, 32, 32, 32, 4)


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    shapes = itertools.pairwise(WIDTHS)
    params = {f"layer{n}": {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)} for n, s in enumerate(shapes)}

    def apply(params, x):
        for name in sorted(params):
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    return tj.interop.pure(apply, params)


def batches(count=12):
    x = np.random.default_rng(1).normal(size=(count, 6)).astype(np.float32)
    return [{"inputs": x[n : n + 4], "labels": np.arange(4) % 2, "id": np.arange(n, n + 4)} for n in range(0, count, 4)]


def test_one_pass_gives_features_size_and_costs(model):
    found = measure(model, batches())
    assert len(found.features) == 12 and found.features["outputs"].shape == (12, 4)
    assert found.parameters == sum(a * b for a, b in itertools.pairwise(WIDTHS))
    assert found.step_seconds["full"] > found.step_seconds["last 4"] > found.step_seconds["last 3"] > 0


def test_a_full_step_costs_three_passes_and_fewer_stages_less(model):
    from transferjax.advise._candidate import _ratios

    ratios = _ratios(model, batches()[0]["inputs"], None)
    assert 2.5 < ratios["full"] < 3.2 and 1.5 < ratios["last 4"] < ratios["full"]


def test_the_order_of_stages_can_be_given(model):
    from transferjax.advise._candidate import _ratios

    order = [f"layer{n}/**" for n in (5, 4, 3, 2, 1, 0)]
    assert (
        _ratios(model, batches()[0]["inputs"], order)["last 4"] > _ratios(model, batches()[0]["inputs"], None)["last 4"]
    )


def test_what_can_be_gone_over_once_only_raises(model):
    with pytest.raises(
        DataError, match=r"the data set is .*, which cannot be gone over more than once. Expected a list"
    ):
        measure(model, iter(batches()))
