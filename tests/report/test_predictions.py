"""Predictions: every image with what was said about it, mistakes marked."""

import numpy as np
import pytest

from transferjax import TransferError
from transferjax.report import predictions


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 8, 1), (3, 8, 8, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_each_image_gets_its_prediction_and_the_truth_where_it_differs(shape, dtype):
    figure = predictions(np.ones(shape, dtype), [0, 1, 2], [0, 0, 2], ["shirt", "coat"])
    assert [panel.get_xlabel() for panel in figure.axes] == ["shirt", "shirt\nis: coat", "2"]
    assert figure.get_suptitle() == "Predictions: 2 of 3 right"


def test_at_most_48_are_drawn_but_all_are_counted():
    figure = predictions(np.zeros((50, 4, 4)), np.zeros(50), np.zeros(50))
    assert len(figure.axes) == 48 and figure.get_suptitle() == "Predictions: 50 of 50 right"


@pytest.mark.parametrize(
    ("images", "labels"), [(np.zeros((2, 4, 4)), [0]), (np.zeros((0, 4, 4)), []), (np.zeros(2), [0, 0])]
)
def test_lengths_that_differ_raise(images, labels):
    with pytest.raises(TransferError, match=r"expects images \[N, H, W, C\] with N labels"):
        predictions(images, labels, labels)
