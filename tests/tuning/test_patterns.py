"""Ranks and strengths per pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.testing import check_tuning

PARAMS = {"a": {"kernel": jnp.ones((4, 3))}, "b": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}


def init(tuning, params=PARAMS):
    return tuning.init(jax.random.key(0), params)


def test_lora_agrees_with_peft(against_peft):
    names = {"lora_a": ("lora_A", lambda w: w.T), "lora_b": ("lora_B", lambda w: w.T)}
    tuning = tj.lora("**/kernel", {"fc2/*": 2, "**": 3}, alpha={"fc1/*": 1.5, "**": 6.0})
    against_peft("dense", "patterns", tuning, names)
    against_peft("dense", "lora", tj.lora("**/kernel", 3, alpha=6.0), names)
    against_peft("dense", "rslora", tj.lora("**/kernel", 3, alpha=6.0, rank_stabilised=True), names)


def test_a_convolution_by_lora_agrees_with_peft(against_peft):
    names = {
        "lora_a": ("lora_A", lambda w: w.transpose(2, 3, 1, 0)),
        "lora_b": ("lora_B", lambda w: w[:, :, 0, 0].T),
    }
    against_peft("conv", "lora", tj.lora("**/kernel", 2, alpha=6.0), names)


def test_each_leaf_has_its_rank_and_strength():
    tuning = tj.lora("**/kernel", {"a/*": 1, "**": 2}, alpha={"b/*": 6.0, "**": 5.0})
    check_tuning(tuning, PARAMS)
    trainable, frozen = init(tuning)
    merged = tuning.merge(jax.tree.map(jnp.ones_like, trainable), frozen)
    np.testing.assert_allclose(merged["a"]["kernel"], 1 + 5.0 * 1)
    np.testing.assert_allclose(merged["b"]["kernel"], 1 + 3.0 * 2)


def test_new_weights_are_those_of_one_rank_for_all():
    one, many = init(tj.lora("**/kernel", 2))[0], init(tj.lora("**/kernel", {"a/*": 2, "**": 2}))[0]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one, many))


def test_it_goes_into_a_chain():
    tuning = tj.chain(low=tj.lora("**/kernel", {"a/*": 1, "**": 2}), bias=tj.train("b/bias"))
    check_tuning(tuning, PARAMS)


def test_a_leaf_without_a_pattern_raises():
    message = r"lora\(\) gives no rank for 'b/kernel': it matches none of \['a/\*'\]\. Add a glob for it"
    with pytest.raises(tj.SelectionError, match=message):
        init(tj.lora("**/kernel", {"a/*": 1}))


@pytest.mark.parametrize("rank, idle", [({"c/*": 1, "**": 2}, r"c/\*"), ({"**": 1, "a/*": 2}, r"a/\*")])
def test_a_pattern_that_decides_for_no_leaf_raises(rank, idle):
    with pytest.raises(tj.SelectionError, match=rf"decides the rank of no selected leaf by \['{idle}'\]"):
        init(tj.lora("**/kernel", rank))


def test_an_empty_mapping_raises():
    with pytest.raises(tj.SelectionError, match=r"lora\(\) got an empty mapping as rank\. Write, for example"):
        tj.lora("**/kernel", {})


def test_a_bad_rank_of_one_pattern_raises_at_once():
    with pytest.raises(tj.SelectionError, match="a whole number of at least 1 as rank, got 0"):
        tj.lora("**/kernel", {"a/*": 0, "**": 1})
