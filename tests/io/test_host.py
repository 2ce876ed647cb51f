"""Leaves in host memory and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax._errors import CheckpointError
from transferjax.io._host import from_host, kind_of, to_host


@pytest.mark.parametrize("leaf", [True, 3, -(2**63), 0.5, float("inf"), 1 + 2j])
def test_python_numbers(leaf):
    array = to_host("x", leaf)
    back = from_host(array, kind_of(leaf))
    assert array.shape == () and (back, type(back)) == (leaf, type(leaf))


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_typed_keys(implementation):
    for key in (jax.random.key(3, impl=implementation), jax.random.split(jax.random.key(3, impl=implementation), 2)):
        back = from_host(to_host("x", key), kind_of(key))
        assert back.dtype == key.dtype and back.shape == key.shape
        np.testing.assert_array_equal(jax.random.key_data(back), jax.random.key_data(key))


@pytest.mark.parametrize(
    "leaf",
    [
        np.float32(2),
        np.array(2),
        jnp.ones((2, 2)).T,
        np.arange(6).reshape(2, 3).T,
        np.arange(3, dtype=">i4"),
        jnp.bfloat16(1),
    ],
)
def test_arrays_come_native_and_contiguous(leaf):
    array = to_host("x", leaf)
    assert array.flags.c_contiguous and array.dtype.isnative and array.shape == np.shape(leaf)
    np.testing.assert_array_equal(array, np.asarray(leaf))
    assert from_host(array, kind_of(leaf)) is array


def _donated():
    array = jnp.ones(3)
    array.delete()
    return array


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("text", "'x' is str. Expected an array or a number; text goes into metadata"),
        (None, "'x' is NoneType"),
        (b"ab", "'x' is bytes"),
        (jax.ShapeDtypeStruct((2,), "float32"), r"'x' is \(2,\) float32. Expected an array or a number"),
        (np.array(["a"]), r"'x' is \(1,\) <U1. Expected an array of numbers"),
        (np.array([None]), r"'x' is \(1,\) object. Expected an array of numbers"),
        (np.zeros(2, "datetime64[s]"), r"Expected an array of numbers"),
        (np.zeros(2, [("a", "f4")]), r"Expected an array of numbers"),
        (np.zeros(2, np.longdouble), r"which no format here holds. Cast it to float64"),
        (2**70, "'x' is an integer beyond 64 bits. Put it into metadata as text"),
    ],
)
def test_leaves_that_cannot_be_kept(leaf, message):
    with pytest.raises(CheckpointError, match=message):
        to_host("x", leaf)


def test_a_donated_array():
    with pytest.raises(CheckpointError, match=r"'x' \(3,\) float32 was donated and is gone. Copy it with transferjax"):
        to_host("x", _donated())


def test_an_array_of_several_processes(monkeypatch):
    array = jnp.ones(3)
    monkeypatch.setattr(type(array), "is_fully_addressable", False)
    with pytest.raises(CheckpointError, match=r"'x' \(3,\) float32 lies on several processes. Gather it first"):
        to_host("x", array)
