import jax
import jax.numpy as jnp
import numpy as np

from transferjax.numerics import relu6


def test_values_and_derivatives_at_the_corners():
    x = jnp.array([-1.0, 0.0, 3.0, 6.0, 8.0])
    np.testing.assert_array_equal(relu6(x), [0, 0, 3, 6, 6])
    np.testing.assert_array_equal(jax.jvp(relu6, (x,), (jnp.ones(5),))[1], [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(jax.grad(lambda x: relu6(x).sum())(x), [0, 0, 1, 0, 0])


def test_half_precision_stays_half():
    assert relu6(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
