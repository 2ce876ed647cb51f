import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from transferjax import _errors
from transferjax.data import batches, to_device
from transferjax.data._device import put


@pytest.mark.parametrize("ahead", [0, 1, 3, 20])
def test_order_and_values_stay(ten, ahead):
    some = batches(ten, 2, seed=0, epochs=2)
    on_device = to_device(some, ahead=ahead)
    assert len(on_device) == len(some)
    assert on_device.steps_per_epoch == 5
    for a, b in zip(on_device, list(some), strict=True):
        assert isinstance(a["inputs"], jax.Array)
        assert a["id"].dtype == np.int32
        np.testing.assert_array_equal(a["inputs"], b["inputs"])
        np.testing.assert_array_equal(a["id"], b["id"])


@pytest.mark.parametrize("position", [0, 1, 9, 10])
def test_the_state_counts_what_was_given_out_only(ten, position):
    on_device = to_device(batches(ten, 2, seed=0, epochs=2), ahead=3)
    everything = [b["id"].tolist() for b in on_device]
    running = iter(on_device)
    for _ in range(position):
        next(running)
    state = on_device.get_state()
    assert state["position"] == position
    again = to_device(batches(ten, 2, seed=0, epochs=2))
    again.set_state(state)
    assert again.get_state() == state
    assert [b["id"].tolist() for b in again] == everything[position:]


def test_any_iterable_of_dicts_will_do():
    on_device = to_device([{"inputs": {"tokens": np.ones((2, 3), np.int64)}}])
    assert next(iter(on_device))["inputs"]["tokens"].shape == (2, 3)
    assert on_device.get_state() is None


def test_a_sharding_is_followed(ten):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batch = next(iter(to_device(batches(ten, 4, seed=0), sharding)))
    assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in batch.values())


def test_an_id_that_would_lose_bits_raises():
    assert put({"id": np.array([2**31 - 1])})["id"].tolist() == [2**31 - 1]
    with pytest.raises(_errors.DataError, match="an integer up to 2147483648 does not fit int32; give ids below"):
        put({"id": np.array([2**31])})


def test_ahead_is_not_negative():
    with pytest.raises(_errors.DataError, match="ahead is -1; expected 0 or more"):
        to_device([], ahead=-1)
