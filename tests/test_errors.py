"""Errors and what they are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax._errors import describe, listing, nearest, nearest_hint


def test_every_error_is_a_transfer_error_and_what_callers_expect():
    for error, base in [
        (tj.SelectionError, ValueError),
        (tj.PlanError, ValueError),
        (tj.CheckpointError, ValueError),
        (tj.DataError, ValueError),
        (tj.LawError, AssertionError),
        (tj.NonFiniteError, ArithmeticError),
    ]:
        assert issubclass(error, tj.TransferError) and issubclass(error, base)
    error = tj.NonFiniteError("step 3: the loss is not finite.", state="state", step=3, ids=[1])
    assert (str(error), error.state, error.step, error.ids) == ("step 3: the loss is not finite.", "state", 3, [1])


def test_the_nearest_names_come_first_and_once():
    names = ["stem/kernel", "head/bias", "head/kernel", "head/bias"]
    assert nearest("heda/bias", names) == ["head/bias", "head/kernel", "stem/kernel"]
    assert nearest_hint("heda/kernel", names, 2) == " Nearest: head/kernel, stem/kernel."
    assert nearest_hint("head", []) == ""


@pytest.mark.parametrize(
    "leaf, text",
    [
        (np.zeros((3, 3, 32, 64), np.float32), "(3, 3, 32, 64) float32"),
        (jnp.zeros((), jnp.bfloat16), "() bfloat16"),
        (jax.ShapeDtypeStruct((2,), jnp.int8), "(2,) int8"),
        (1.0, "float"),
        (None, "NoneType"),
        (tj.Hole(), "Hole"),
    ],
)
def test_a_leaf_is_described_by_shape_and_type(leaf, text):
    assert describe(leaf) == text


def test_a_listing_says_how_many_more():
    assert listing([]) == "" and listing(["a"]) == "a" and listing(["a", "b", "c"], 3) == "a, b, c"
    assert listing(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_an_unknown_public_name_raises():
    with pytest.raises(AttributeError, match="module 'transferjax' has no attribute 'trainer'"):
        tj.trainer  # noqa: B018
