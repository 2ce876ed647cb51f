import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from transferjax._errors import TransferError
from transferjax.numerics import map_chunks


def sizes(count, examples):
    """The batch sizes with which the function is traced: that of the whole batch, and that of a chunk."""
    seen = []

    def function(x):
        seen.append(x.shape[0])
        return x + 1

    jax.jit(lambda x: map_chunks(function, x, examples))(jnp.arange(float(count)))
    return sorted(set(seen))


@pytest.mark.parametrize(
    ("count", "examples", "expected"),
    [(8, 8, [8]), (32, 8, [8, 32]), (30, 8, [6, 30]), (10, 4, [2, 10]), (6, 1, [1, 6]), (7, 4, [7])],
)
def test_a_chunk_is_the_largest_divisor_from_half_of_the_most_up_to_it(count, examples, expected):
    assert sizes(count, examples) == expected


def test_trees_in_and_out_keep_their_examples_in_order():
    inputs = {"a": jnp.arange(12.0).reshape(6, 2), "b": jnp.arange(6)}
    function = lambda tree: (tree["a"].sum(1), {"c": tree["b"] * 2})
    found = jax.jit(lambda tree: map_chunks(function, tree, 3))(inputs)
    jax.tree.map(np.testing.assert_array_equal, found, function(inputs))


def test_outside_of_a_compiled_program_the_function_is_called_once():
    assert map_chunks(lambda x: x.shape[0], np.ones((32, 2)), 4) == 32


def test_a_symbolic_batch_is_taken_whole():
    (b,) = export.symbolic_shape("b")
    seen = []
    function = lambda x: seen.append(x.shape[0]) or x + 1
    jax.jit(lambda x: map_chunks(function, x, 2)).trace(jax.ShapeDtypeStruct((b, 3), jnp.float32))
    assert seen == [b]


def test_inputs_of_different_lengths_are_taken_whole():
    found = jax.jit(lambda a, b: map_chunks(lambda ab: (ab[0] + 1, ab[1]), (a, b), 2))(jnp.zeros(4), jnp.zeros(8))
    assert [x.shape for x in found] == [(4,), (8,)]


@pytest.mark.parametrize("examples", [0, -2, 2.5, "8", None])
def test_a_chunk_has_a_whole_number_of_examples(examples):
    with pytest.raises(TransferError, match="expected a whole number of at least 1 example in a chunk, got"):
        map_chunks(lambda x: x, jnp.ones(4), examples)
