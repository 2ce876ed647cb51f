"""XLA's own figures."""

import jax
import jax.numpy as jnp
import pytest

from transferjax.program import measure


def test_measure_reads_memory_and_cost():
    f = jax.jit(lambda x, y: (x + 1.0, x @ y), donate_argnums=0)
    found = measure(f.lower(jnp.ones((8, 8)), jnp.ones((8, 8))).compile())
    assert found.argument_bytes == 2 * 256
    assert found.output_bytes is not None and found.output_bytes >= 2 * 256
    assert found.alias_bytes == 256
    assert found.flops is not None and found.flops >= 2 * 8**3


def test_a_backend_that_says_nothing():
    class Silent:
        cost_analysis = staticmethod(lambda: None)
        memory_analysis = staticmethod(lambda: None)

    assert measure(Silent()) == (None,) * 7


def test_not_compiled():
    with pytest.raises(TypeError, match=r"expects a compiled program, got function\. Write measure\(jax\.jit"):
        measure(lambda x: x)
