"""DoRA: the formula, the detached norm, and agreement with peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.testing import check_tuning

NAMES = {
    "lora_a": ("lora_A", lambda w: w.T if w.ndim == 2 else w.transpose(2, 3, 1, 0)),
    "lora_b": ("lora_B", lambda w: w.reshape(w.shape[:2]).T),
    "magnitude": ("lora_magnitude_vector", lambda w: w.reshape(-1)),
}


def test_a_dense_network_agrees_with_peft(against_peft):
    against_peft("dense", "dora", tj.dora("**/kernel", 3, alpha=6.0), NAMES)


def test_a_convolution_agrees_with_peft(against_peft):
    against_peft("conv", "dora", tj.dora("**/kernel", 2, alpha=6.0), NAMES)


def test_length_and_direction_learn_apart():
    kernel = jax.random.normal(jax.random.key(0), (5, 3))
    tuning = tj.dora("w", 2)
    trainable, frozen = tuning.init(jax.random.key(1), {"w": kernel})
    np.testing.assert_allclose(trainable["w"]["magnitude"], np.linalg.norm(kernel, axis=0), rtol=1e-6)
    weights = {**trainable["w"], "lora_b": jnp.ones((2, 3)), "magnitude": jnp.array([1.0, 2.0, 3.0])}
    merged = tuning.merge({"w": weights}, frozen)["w"]
    np.testing.assert_allclose(np.linalg.norm(merged, axis=0), [1.0, 2.0, 3.0], rtol=1e-6)
    v = kernel + weights["lora_a"] @ weights["lora_b"]
    np.testing.assert_allclose(merged / np.linalg.norm(merged, axis=0), v / np.linalg.norm(v, axis=0), rtol=1e-5)


def test_no_gradient_flows_through_the_norm():
    """Along the direction itself the gradient of LoRA survives; with a differentiated norm it would be zero."""
    tuning = tj.dora("w", 1)
    trainable, frozen = tuning.init(jax.random.key(0), {"w": jnp.ones((2, 1))})
    trainable["w"]["lora_a"] = jnp.ones((2, 1))
    gradient = jax.grad(lambda t: tuning.merge(t, frozen)["w"].sum())(trainable)["w"]["lora_b"]
    np.testing.assert_allclose(gradient, [[2.0]], rtol=1e-6)


def test_a_column_of_zeros_is_finite_and_learns():
    params = {"w": jnp.zeros((3, 2))}
    tuning = tj.dora("w", 1)
    check_tuning(tuning, params)
    trainable, frozen = tuning.init(jax.random.key(0), params)
    gradient = jax.grad(lambda t: tuning.merge(t, frozen)["w"].sum())(trainable)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient["w"]["lora_b"]).max()) > 0


def test_ranks_and_alphas_may_differ_per_pattern():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    trainable, _ = tj.dora("*", {"a": 1, "b": 3}, alpha={"b": 2.0, "**": 1.0}).init(jax.random.key(0), params)
    assert trainable["a"]["lora_a"].shape == (4, 1) and trainable["b"]["lora_a"].shape == (4, 3)


def test_rank_stabilised():
    one = tj.dora("w", 4, alpha=2.0, rank_stabilised=True)
    other = tj.dora("w", 4, alpha=4.0)
    trainable, frozen = one.init(jax.random.key(0), {"w": jnp.eye(4)})
    trainable["w"]["lora_b"] = jnp.ones((4, 4))
    np.testing.assert_array_equal(one.merge(trainable, frozen)["w"], other.merge(trainable, frozen)["w"])


def test_a_bad_rank_raises():
    with pytest.raises(tj.SelectionError, match=r"dora\(\) expects rank to be a whole number of at least 1, got 0\."):
        tj.dora("w", 0)
