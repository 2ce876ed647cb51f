"""What features, labels and weights may be."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from transferjax._errors import DataError
from transferjax.numerics._tables import as_classes, as_features, as_weights


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (np.ones((3, 2), np.float32), "float32"),
        (np.ones((3, 2)), "float64"),
        (np.ones((3, 2), np.uint8), "float64"),
        (np.ones((3, 2), ml_dtypes.bfloat16), "float32"),
        (np.ones((3, 2), np.float16), "float32"),
        (jnp.ones((3, 2)), "float32"),
    ],
)
def test_features_keep_their_width_and_become_floats(given, dtype):
    found = as_features(given)
    assert found.dtype == dtype and found.shape == (3, 2)


def test_features_in_floats_are_not_copied():
    x = np.ones((4, 3), np.float32)
    assert np.shares_memory(as_features(x), x)


def test_large_values_are_finite():
    assert as_features(np.full((2, 3), 1e308)).shape == (2, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.ones((2, 3, 3, 4)), r"features are \(2, 3, 3, 4\) float64; expected numbers \[N, d\].*pooled first"),
        (np.array([["a"]]), r"expected numbers \[N, d\]"),
        (np.ones((1, 4)), r"expected at least 2 examples and one column"),
        (np.ones((4, 0)), r"expected at least 2 examples and one column"),
        (np.array([[1.0], [np.nan], [np.inf]]), r"not finite in 2 of 3 examples, first in row 1\. Expected finite"),
    ],
)
def test_what_are_no_features(given, message):
    with pytest.raises(DataError, match=message):
        as_features(given, least=2)


def test_classes_are_those_that_occur():
    codes, values, counts = as_classes(np.array([9, 2, 9, 5], np.uint8), 4)
    assert (codes.tolist(), values.tolist(), counts.tolist()) == ([2, 0, 2, 1], [2, 5, 9], [1, 1, 2])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.ones(3), r"labels are \(3,\) float64; expected integers \[N\], one class per example.*argmax"),
        (np.ones((3, 2), int), r"expected integers \[N\]"),
        (np.arange(4), r"labels have 4 examples and features 3\. Expected one row of each per example"),
        (np.zeros(3, int), r"labels hold 1 class\(es\) \(0\); expected at least 2\. A slice of a data set sorted"),
    ],
)
def test_what_are_no_classes(labels, message):
    with pytest.raises(DataError, match=message):
        as_classes(labels, 3)


def test_weights_are_ones_unless_given():
    assert as_weights(None, 3).tolist() == [1, 1, 1]
    assert as_weights([0, 2], 2).tolist() == [0, 2]
    with pytest.raises(DataError, match=r"weights are \(2, 1\) float64; expected numbers \[N\], one per example"):
        as_weights(np.ones((2, 1)), 2)
    with pytest.raises(DataError, match="weights have 2 examples and features 3"):
        as_weights([1, 1], 3)
    for bad in ([-1, 1], [np.nan, 1], [0, 0]):
        with pytest.raises(DataError, match="weights are negative, not finite or all zero; expected numbers of at"):
            as_weights(bad, 2)
