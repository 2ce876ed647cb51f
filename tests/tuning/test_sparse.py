"""Entries that learn: SHiRA's random mask, slices of an axis, single entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.tuning._sparse import _places

KERNEL = jnp.arange(12.0).reshape(4, 3)


def init(tuning, leaf=KERNEL):
    return tuning.init(jax.random.key(0), {"w": leaf})


def test_shira_adds_to_the_places_of_its_mask():
    tuning = tj.tuning.shira("w", 0.5, seed=3)
    _, frozen = init(tuning)
    change = jnp.arange(1.0, 7.0)
    merged = tuning.merge({"w": {"shira": change}}, frozen)["w"]
    places = _places(3, (4, 3), 6)
    expected = np.arange(12.0)
    expected[places] += np.arange(1.0, 7.0)
    np.testing.assert_array_equal(merged, expected.reshape(4, 3))


def test_shira_agrees_with_peft_on_its_places(peft):
    """peft draws other places; with its places and values the merged weight is the same sum."""
    found = peft("dense/shira")
    for module in ("fc1", "fc2"):
        base = peft("dense/base")[f"{module}.weight"]
        out, wide = found[f"indices/{module}"]
        coordinates = np.stack([wide, out], -1)
        tuning = tj.tuning.entries("w", coordinates)
        trainable, frozen = init(tuning, jnp.asarray(base.T))
        trainable["w"]["entries"] = trainable["w"]["entries"] + found[f"weights/{module}.shira_weight"]
        merged = tuning.merge(trainable, frozen)["w"]
        np.testing.assert_allclose(merged, found[f"merged/{module}.weight"].T, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 7, 50, 51, 99, 100])
def test_places_are_different_sorted_and_fixed(count):
    found = _places(0, (10, 10), count)
    assert len(set(found.tolist())) == count == len(found) and found.min() >= 0 and found.max() < 100
    np.testing.assert_array_equal(found, np.sort(found))
    np.testing.assert_array_equal(found, _places(0, (10, 10), count))


def test_the_first_places_never_change():
    """Saved changes are worthless with another mask: these are written down."""
    assert _places(0, (100, 50), 4).tolist() == [250, 464, 1892, 2341]
    assert _places(1, (100, 50), 4).tolist() != [250, 464, 1892, 2341]


def test_places_are_spread_evenly():
    found = _places(0, (200, 500), 20_000)
    counts = np.histogram(found, bins=10, range=(0, 100_000))[0]
    assert abs(counts - 2_000).max() < 200


def test_a_bfloat16_leaf_gets_float32_changes():
    tuning = tj.tuning.shira("w", 0.01)
    trainable, frozen = init(tuning, KERNEL.astype(jnp.bfloat16))
    assert trainable["w"]["shira"].shape == (1,) and trainable["w"]["shira"].dtype == jnp.float32
    assert tuning.merge(trainable, frozen)["w"].dtype == jnp.float32


@pytest.mark.parametrize("indices, axis", [([1, 3], 0), ([2], -1), ([-1, 0], 1)])
def test_rows_replaces_slices_and_leaves_the_others(indices, axis):
    tuning = tj.tuning.rows("w", indices, axis=axis)
    trainable, frozen = init(tuning)
    np.testing.assert_array_equal(trainable["w"]["rows"], np.take(np.asarray(KERNEL), indices, axis))
    trainable["w"]["rows"] = jnp.full_like(trainable["w"]["rows"], -5.0)
    merged = np.moveaxis(np.asarray(tuning.merge(trainable, frozen)["w"]), axis, 0)
    expected = np.moveaxis(np.array(KERNEL), axis, 0).copy()
    expected[np.array(indices)] = -5.0
    np.testing.assert_array_equal(merged, expected)


def test_heads_of_an_attention_kernel():
    leaf = jax.random.normal(jax.random.key(0), (4, 3, 2))
    trainable, _ = init(tj.tuning.rows("w", [2], axis=1), leaf)
    np.testing.assert_array_equal(trainable["w"]["rows"], leaf[:, 2:])


def test_only_the_slices_get_gradients():
    tuning = tj.tuning.rows("w", [1])
    trainable, frozen = init(tuning)
    gradient = jax.grad(lambda t: jnp.sum(tuning.merge(t, frozen)["w"] ** 2))(trainable)
    np.testing.assert_array_equal(gradient["w"]["rows"], 2 * KERNEL[1:2])


def test_entries():
    tuning = tj.tuning.entries("w", [(0, 1), (-1, -1)])
    trainable, frozen = init(tuning)
    np.testing.assert_array_equal(trainable["w"]["entries"], [1.0, 11.0])
    trainable["w"]["entries"] = jnp.array([70.0, 80.0])
    merged = np.asarray(tuning.merge(trainable, frozen)["w"])
    assert merged[0, 1] == 70.0 and merged[3, 2] == 80.0 and (merged != np.asarray(KERNEL)).sum() == 2


def test_numpy_leaves_will_do():
    for tuning in (tj.tuning.rows("w", [0]), tj.tuning.entries("w", [(0, 0)]), tj.tuning.shira("w", 0.5)):
        trainable, frozen = init(tuning, np.ones((2, 2), np.float32))
        np.testing.assert_array_equal(tuning.merge(trainable, frozen)["w"], np.ones((2, 2)))


@pytest.mark.parametrize("density", [0.0, 1.5, "half", True])
def test_a_bad_density_raises(density):
    with pytest.raises(tj.SelectionError, match=r"expects density as a part of the entries, in \(0, 1\], got"):
        tj.tuning.shira("w", density)


def test_a_bad_seed_raises():
    with pytest.raises(tj.SelectionError, match=r"shira\(\) expects a seed from 0 to 2\*\*32 - 1, got -1"):
        tj.tuning.shira("w", 0.5, seed=-1)


@pytest.mark.parametrize(
    "tuning", [tj.tuning.shira("w", 0.5), tj.tuning.rows("w", [0]), tj.tuning.entries("w", [(0, 0)])]
)
def test_integers_raise(tuning):
    with pytest.raises(tj.SelectionError, match=r"expects floating-point arrays; 'w' is \(2, 2\) int32\. Narrow"):
        init(tuning, jnp.ones((2, 2), jnp.int32))


@pytest.mark.parametrize("indices, came", [([], "none"), ([0.5], r"\(1,\) float64"), ([[1]], r"\(1, 1\) int64")])
def test_indices_that_are_no_whole_numbers_raise(indices, came):
    with pytest.raises(tj.SelectionError, match=rf"rows\(\) expects a list of whole numbers, \[5, 7\]; got {came}\."):
        tj.tuning.rows("w", indices)


def test_coordinates_that_are_no_rows_raise():
    with pytest.raises(tj.SelectionError, match=r"entries\(\) expects rows of whole numbers, .*; got \(2,\) int64"):
        tj.tuning.entries("w", [0, 1])


@pytest.mark.parametrize("index", [4, -5])
def test_an_index_out_of_range_raises(index):
    message = rf"rows\(\) got the index {index}, which is out of range for 'w' \(4, 3\) float32"
    with pytest.raises(tj.SelectionError, match=message):
        init(tj.tuning.rows("w", [0, index]))


def test_an_entry_out_of_range_raises():
    with pytest.raises(tj.SelectionError, match=r"entries\(\) got the index 3, which is out of range for 'w'"):
        init(tj.tuning.entries("w", [(3, 0), (0, 3)]))


@pytest.mark.parametrize("tuning", [tj.tuning.rows("w", [3, -1]), tj.tuning.entries("w", [(0, 0), (-4, 0)])])
def test_an_index_that_comes_twice_raises(tuning):
    with pytest.raises(tj.SelectionError, match=r"got an index of 'w' twice\. Expected each once"):
        init(tuning)


def test_an_axis_that_is_missing_raises():
    with pytest.raises(tj.SelectionError, match=r"rows\(\) got axis 2, but 'w' \(4, 3\) float32 has 2 axes"):
        init(tj.tuning.rows("w", [0], axis=2))


def test_coordinates_of_another_number_of_axes_raise():
    message = r"entries\(\) got coordinates of 3 axes, but 'w' \(4, 3\) float32 has 2"
    with pytest.raises(tj.SelectionError, match=message):
        init(tj.tuning.entries("w", [(0, 0, 0)]))
