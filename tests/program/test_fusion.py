"""Which operations run together, and what they write."""

import jax
import jax.numpy as jnp

from transferjax.program._fusion import fuse
from transferjax.program._lowering import lower
from transferjax.program._walk import live


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def kernels(function, *args):
    """The kernels of a function of two matrices: names of the roots."""
    args = args or (array(64, 64), array(64, 64))
    return [kernel.root.name for kernel in fuse(lower(live(jax.make_jaxpr(function)(*args), platform="cpu")))]


def test_what_has_one_reader_is_computed_in_it():
    assert kernels(lambda x, w: (jnp.sin(x) * 2.0) @ w) == ["mul", "dot_general"]
    assert kernels(lambda x, w: jnp.where(x > 0, x, jnp.exp(x) - 1.0) + w) == ["add"]


def test_cheap_values_are_computed_again_and_dear_ones_once():
    twice = lambda f: lambda x, w: (jnp.sin(f(x)), jnp.cos(f(x) + w))
    assert kernels(twice(jnp.negative)) == ["sin", "cos"]
    assert kernels(twice(jnp.exp)) == ["exp", "sin", "cos"]
    multiplied = lambda f: lambda x, w: (f(x) @ w, f(x) + w)
    assert kernels(multiplied(jnp.negative)) == ["neg", "dot_general", "add"]
    assert kernels(multiplied(jnp.exp)) == ["exp", "dot_general", "add"]


def test_a_value_of_several_arrays_that_a_product_reads_is_written_once():
    assert kernels(lambda x, w: ((x + w) @ w, (x + w) * 2.0)) == ["add", "dot_general", "mul"]


def test_a_dear_value_is_not_computed_for_every_element_of_a_broadcast():
    def spread(x, w):
        return x * jnp.exp(w[:, :1])

    assert kernels(spread) == ["exp", "mul"]


def test_reductions_take_the_arithmetic_in_front_of_them():
    assert kernels(lambda x, w: jnp.sum((x - w) * x, axis=1), array(256, 64), array(256, 64)) == ["reduce_sum"]
    assert kernels(lambda x, w: jnp.sum(jnp.sin(x), axis=1), array(256, 64), array(256, 64)) == ["sin", "reduce_sum"]


def test_softmax_goes_with_its_product_where_the_rows_are_many():
    def attend(q, k):
        logits = q @ k.T
        return jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))

    assert kernels(attend, array(256, 64), array(256, 64)) == ["exp"]


def test_operations_that_nobody_reads_are_left_out():
    def run(x, w):
        jnp.sin(x @ w)
        return x + w

    assert kernels(run) == ["add"]
