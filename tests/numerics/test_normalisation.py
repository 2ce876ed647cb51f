"""Batch normalisation equals Flax's in value, statistics and derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax.numerics import batch_norm


def plain(x, scale, bias, *, epsilon):
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    variance = jnp.maximum(0.0, (x**2).mean(axes) - mean**2)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon) * scale + bias, mean, variance


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (7, 6)], ids=str)
def test_values_and_all_cotangents_equal_plain_autodiff(shape):
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], shape) * 2 + 1
    scale, bias = jax.random.normal(keys[1], (6,)), jax.random.normal(keys[2], (6,))
    # Cotangents of the statistics too: somebody may put them into a loss.
    cotangents = jax.random.normal(keys[3], shape), *jax.random.normal(keys[4], (2, 6))

    def both(function):
        out, pull = jax.vjp(lambda *a: function(*a, epsilon=1e-3), x, scale, bias)
        return out, pull(cotangents)

    ours, theirs = jax.jit(lambda: (both(batch_norm), both(plain)))()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_half_precision_keeps_statistics_in_float32():
    x = jnp.ones((8, 2), jnp.bfloat16)
    y, mean, variance = batch_norm(x, jnp.ones(2, jnp.bfloat16), jnp.zeros(2, jnp.bfloat16), epsilon=1e-3)
    assert (y.dtype, mean.dtype, variance.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    gradient = jax.grad(lambda x: batch_norm(x, jnp.ones(2), jnp.zeros(2), epsilon=1e-3)[0].astype(jnp.float32).sum())
    assert gradient(x).dtype == jnp.bfloat16


def test_a_constant_channel_has_a_finite_gradient():
    gradient = jax.grad(lambda x: (batch_norm(x, jnp.ones(2), jnp.zeros(2), epsilon=1e-3)[0] ** 2).sum())
    assert np.isfinite(gradient(jnp.full((4, 2), 3.0))).all()
