"""The largest differences: exactly as many as are asked for, on every distribution."""

import numpy as np
import pytest

from transferjax.merging import _largest
from transferjax.merging._largest import largest
from transferjax.merging._leaf import CHUNK, Leaf

SIZE = 3 * CHUNK + 1001
RNG = np.random.default_rng(0)
DIFFERENCES = {
    "normal": RNG.standard_normal(SIZE).astype(np.float32),
    "heavy tails": RNG.standard_cauchy(SIZE).astype(np.float32),
    "mostly zero": np.where(RNG.random(SIZE) < 0.9, 0, RNG.standard_normal(SIZE)).astype(np.float32),
    "few values": RNG.integers(-3, 4, SIZE).astype(np.float32),
    "all equal": np.ones(SIZE, np.float32),
    "all zero": np.zeros(SIZE, np.float32),
    "sorted": np.linspace(-1, 2, SIZE, dtype=np.float32),
    "float64": RNG.standard_normal(SIZE),
    "float16": RNG.standard_normal(SIZE).astype(np.float16),
}


def expected(values, count):
    """By a stable sort."""
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-np.abs(values), kind="stable")[:count]] = True
    return mask


def found(values, count):
    leaf = Leaf("w", {"base": np.zeros_like(values), "model": values}, traced=False)
    keeps = largest(leaf, 1, count)
    return np.concatenate([keeps(at, np.abs(values[at].astype(leaf.work))) for at in leaf.spans()])


@pytest.mark.parametrize("count", [0, 1, 2, 77, SIZE // 100, SIZE // 5, SIZE // 2, SIZE - 1, SIZE])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_they_are_those_of_a_stable_sort(name, count):
    np.testing.assert_array_equal(found(DIFFERENCES[name], count), expected(DIFFERENCES[name], count))


@pytest.mark.parametrize("count", [1, 50, 99])
def test_of_small_leaves_too(count):
    values = RNG.integers(-9, 9, 100).astype(np.float32)
    np.testing.assert_array_equal(found(values, count), expected(values, count))


@pytest.mark.parametrize("edges", [(np.float32(8.0), np.float32(9.0)), (np.float32(0.0), np.float32(1e-9))])
def test_a_sample_that_misleads_costs_time_only(edges, monkeypatch):
    monkeypatch.setattr(_largest, "_bracket", lambda *args: edges)
    values = DIFFERENCES["normal"]
    np.testing.assert_array_equal(found(values, SIZE // 5), expected(values, SIZE // 5))


def test_only_a_few_percent_are_sorted(monkeypatch):
    seen, split = [], _largest._split
    monkeypatch.setattr(_largest, "_split", lambda values, *rest: seen.append(len(values)) or split(values, *rest))
    found(DIFFERENCES["normal"], SIZE // 5)
    assert len(seen) == 1 and seen[0] < 0.05 * SIZE


def test_the_same_from_call_to_call():
    values = DIFFERENCES["few values"]
    np.testing.assert_array_equal(found(values, 1234), found(values, 1234))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("size", [100, SIZE])
def test_what_is_not_finite_is_left_to_who_makes_the_leaf(bad, size):
    values = np.zeros(size, np.float32)
    values[3] = bad
    assert found(values, size // 2).shape == (size,)
