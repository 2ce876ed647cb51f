"""OFT: rotations by blocks, and agreement with peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj

NAMES = {"oft": ("oft_R", lambda w: w)}


def turned(size, block, out=3):
    """A random kernel, and the same after random rotations."""
    kernel = jax.random.normal(jax.random.key(0), (size, out))
    tuning = tj.tuning.oft("w", block)
    trainable, frozen = tuning.init(jax.random.key(1), {"w": kernel})
    upper = jax.random.normal(jax.random.key(2), trainable["w"]["oft"].shape)
    return kernel, upper, tuning.merge({"w": {"oft": upper}}, frozen)["w"]


def test_a_dense_network_agrees_with_peft_where_it_inverts(against_peft):
    """With ``use_cayley_neumann=False``; peft's default sums five terms of a series instead."""
    against_peft("dense", "oft", tj.tuning.oft("**/kernel", 4), NAMES)


def test_the_cayley_transform_of_each_block():
    kernel, upper, found = turned(6, 3)
    expected = []
    for triangle, rows in zip(np.asarray(upper, np.float64), np.asarray(kernel, np.float64).reshape(2, 3, 3)):
        q = np.zeros((3, 3))
        q[np.triu_indices(3, 1)] = triangle
        q = q - q.T
        expected.append((np.eye(3) - q) @ np.linalg.inv(np.eye(3) + q) @ rows)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-5, atol=1e-5)


def test_angles_and_lengths_of_columns_stay():
    kernel, _, found = turned(4, 4)
    np.testing.assert_allclose(found.T @ found, kernel.T @ kernel, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(found - kernel).max()) > 0.1


def test_a_block_size_that_does_not_divide_raises():
    message = r"got block_size 4, which does not divide the 6 in-features of 'w' \(6, 2\) float32\. .* does: 3\."
    with pytest.raises(tj.SelectionError, match=message):
        tj.tuning.oft("w", 4).init(jax.random.key(0), {"w": jnp.ones((6, 2))})


def test_a_block_of_one_raises():
    with pytest.raises(tj.SelectionError, match=r"oft\(\) expects a block_size of at least 2: a block of 1"):
        tj.tuning.oft("w", 1)
