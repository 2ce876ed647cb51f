"""Matrix: names at both sides, numbers in the cells while they can be read."""

import numpy as np
import pytest

from transferjax import TransferError
from transferjax.report import matrix


def test_cells_carry_numbers_while_there_are_few():
    axes = matrix([[1.0, 0.25, np.nan]], ["a"], ["x", "y", "z"], name="CKA").axes
    assert [text.get_text() for text in axes[0].texts] == ["1.00", "0.25"]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["x", "y", "z"]
    assert axes[1].get_ylabel() == "CKA"
    many = [str(n) for n in range(13)]
    assert not matrix(np.eye(13), many, many).axes[0].texts


def test_names_that_do_not_fit_raise():
    with pytest.raises(TransferError, match=r"matrix\(\) got \(1, 2\) float64 for 2 rows and 2 columns\. Expected"):
        matrix([[1.0, 2.0]], ["a", "b"], ["x", "y"])
