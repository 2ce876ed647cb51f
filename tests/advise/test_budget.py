"""Budget: what a user can spend."""

import pytest

from transferjax import DataError
from transferjax.advise import Budget
from transferjax.advise._budget import as_budget


def test_a_number_is_steps_and_examples_are_counted_as_often_as_they_come():
    assert as_budget(128) == Budget(128, 32, None) and Budget(10, 8).examples == 80
    assert as_budget(Budget(3)) == Budget(3)


@pytest.mark.parametrize("steps", [-1, 2.5, "many", True])
def test_steps_are_a_whole_number(steps):
    with pytest.raises(
        DataError, match=r"a budget of .* steps cannot be used. Expected a whole number, 0 for features"
    ):
        as_budget(steps)


def test_the_other_numbers_are_above_zero():
    with pytest.raises(DataError, match=r"batch_size is 0; expected a whole number above 0"):
        Budget(1, 0)
    with pytest.raises(DataError, match=r"a budget of 0 seconds cannot be used. Expected a number above 0, or None"):
        Budget(1, seconds=0)
