"""Trees are compared leaf by leaf, and the first difference is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.testing._compare import deleted, difference, require_same

KEY = jax.random.key(0)
F = np.float32


@pytest.mark.parametrize(
    "a, b, options, text",
    [
        (F(1), F(1), {}, ""),
        (F(0.0), F(-0.0), {}, "() float32 differs by up to 0; expected the same bits."),
        (F(np.nan), F(np.nan), {}, ""),
        (F(1), F(1.1), {"rtol": 0.2}, ""),
        (F(1), F(1.5), {"rtol": 0.1}, "() float32 differs by up to 0.5; expected at most 0 + 0.1 times the value."),
        (F(1), F(np.nan), {"atol": 0.1}, "() float32 differs (NaN); expected at most 0.1 + 0 times the value."),
        (np.zeros(2, F), np.zeros(3, F), {}, "expected (2,) float32, got (3,) float32."),
        (np.zeros(2, F), np.zeros(2, np.int32), {}, "expected (2,) float32, got (2,) int32."),
        (jnp.ones(2, jnp.bfloat16), jnp.ones(2), {"promoted": True}, ""),
        (jnp.ones(2), jnp.ones(2, jnp.bfloat16), {"promoted": True}, "expected (2,) float32, got (2,) bfloat16."),
        (jax.ShapeDtypeStruct((2,), F), np.ones(2, F), {}, ""),
        (jax.ShapeDtypeStruct((2,), F), np.ones(1, F), {}, "expected (2,) float32, got (1,) float32."),
        (tj.Hole(), tj.Hole(), {}, ""),
        (tj.Hole(), F(1), {}, "expected Hole, got () float32."),
        (KEY, jax.random.key(0), {}, ""),
        (KEY, jax.random.key(1), {}, "() key<fry> differs by up to 1; expected the same bits."),
        ("a", "a", {}, ""),
        ("a", "b", {}, "expected str, got str."),
        (1.0, 1.0, {}, ""),
        (1.0, jnp.ones(()), {}, ""),
    ],
)
def test_two_leaves(a, b, options, text):
    assert difference(a, b, **options) == text


def test_two_trees():
    require_same("law", {"a": F(1), "b": tj.Hole()}, {"a": F(1), "b": tj.Hole()})
    with pytest.raises(
        tj.LawError, match=r"^the law 'law' is broken at 'a/1': \(\) float32 differs by up to 1; expected"
    ):
        require_same("law", {"a": [F(1), F(2)]}, {"a": [F(1), F(3)]})
    with pytest.raises(tj.LawError, match=r"the law 'law' is broken at 'a': only one of the two trees has this path\."):
        require_same("law", {"a": F(1), "b": F(2)}, {"b": F(2)})
    with pytest.raises(tj.LawError, match=r"the law 'law' is broken: their containers differ\."):
        require_same("law", [F(1)], (F(1),))


def test_a_donated_leaf_is_found():
    tree = {"a": jnp.ones(2), "b": jnp.ones(2)}
    assert deleted(tree) is None
    tree["b"].delete()
    assert deleted(tree) == "b"
