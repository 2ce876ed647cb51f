"""Leaves that stand for a matrix: what they stand for, in every form, and how close quantised ones come."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.program import (
    LowRank,
    Scaled,
    Stacked,
    is_lifted,
    lift,
    quantise_int8,
    quantise_nf4,
)

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


LOW_RANK = LowRank(normal(2, 3, 4), normal(2, 3, 2), normal(2, 4), 0.5)
LEAVES = {
    "low rank": LOW_RANK,
    "scale that is an array": LowRank(normal(2, 3, 4), normal(2, 2), normal(2, 3, 4), jnp.asarray(3.0)),
    "outputs first": LowRank(normal(2, 3, 4), normal(4, 2), normal(2, 2, 3), 1.0, "bba"),
    "scaled": Scaled(normal(2, 3, 4), normal(2, 4), (0, 2)),
    "scaled low rank": Scaled(LOW_RANK, normal(4), (2,)),
    "int8": quantise_int8(normal(2, 3, 4), (0, 2)),
    "nf4": quantise_nf4(normal(2, 3, 4)),
    "low rank over nf4": LowRank(quantise_nf4(normal(2, 3, 4)), normal(2, 3, 2), normal(2, 4)),
    "stack": Stacked(LowRank(normal(2, 3, 4), normal(2, 3, 2), normal(2, 2, 4), 0.5)),
    "stack of nf4": Stacked(jax.vmap(quantise_nf4)(normal(2, 3, 4))),
}


def same(leaf, array):
    assert (leaf.shape, leaf.dtype, leaf.ndim, leaf.size) == (array.shape, array.dtype, array.ndim, array.size)
    np.testing.assert_allclose(leaf.dense(), array, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_is_a_pytree_and_says_what_it_stands_for(name):
    leaf = LEAVES[name]
    assert is_lifted(leaf) and leaf.problem() is None
    array = leaf.dense()
    same(leaf, array)
    same(jax.tree.map(lambda x: x, leaf), array)
    shapes = jax.eval_shape(lambda: leaf)
    assert (shapes.shape, shapes.dtype) == (array.shape, array.dtype)


@pytest.mark.parametrize("name", LEAVES)
def test_every_order_of_axes(name):
    leaf, stays = LEAVES[name], 0
    array = leaf.dense()
    for order in itertools.permutations(range(3)):
        turned = leaf.transpose(order)
        if turned is None:
            assert name.startswith("stack") and order[0] != 0
            continue
        same(turned, jnp.transpose(array, order))
        back = turned.transpose([order.index(axis) for axis in range(3)])
        same(back, array)
        stays += 1
    assert stays >= 2


@pytest.mark.parametrize("shape", [(6, 4), (2, 12), (2, 1, 3, 4, 1), (1, 2, 3, 2, 2), (24,), (4, 6), (3, 8)])
@pytest.mark.parametrize("name", LEAVES)
def test_every_shape_that_mixes_no_axes(name, shape):
    leaf = LEAVES[name]
    found = leaf.reshape(shape)
    possible = {
        "low rank": {(6, 4), (2, 1, 3, 4, 1), (1, 2, 3, 2, 2)},
        "scale that is an array": {(2, 12), (2, 1, 3, 4, 1), (1, 2, 3, 2, 2)},
        "outputs first": {(6, 4), (2, 1, 3, 4, 1), (1, 2, 3, 2, 2)},
        "scaled": {(2, 1, 3, 4, 1), (1, 2, 3, 2, 2)},
        "scaled low rank": {(6, 4), (2, 1, 3, 4, 1), (1, 2, 3, 2, 2)},
        "int8": {(2, 1, 3, 4, 1), (1, 2, 3, 2, 2)},
        "low rank over nf4": {(6, 4), (2, 1, 3, 4, 1), (1, 2, 3, 2, 2)},
        "stack": {(2, 1, 3, 4, 1)},
        "stack of nf4": {(2, 12), (2, 1, 3, 4, 1)},
    }
    assert (found is not None) == (name not in possible or shape in possible[name])
    if found is not None:
        same(found, leaf.dense().reshape(shape))


@pytest.mark.parametrize("name", LEAVES)
def test_a_cast_leaf(name):
    leaf = LEAVES[name].cast(jnp.bfloat16)
    assert leaf.dtype == leaf.dense().dtype == jnp.bfloat16
    expected = LEAVES[name].dense()
    np.testing.assert_allclose(leaf.dense().astype(jnp.float32), expected, rtol=0.03, atol=0.05)


def test_types_promote():
    leaf = LowRank(normal(3, 2).astype(jnp.bfloat16), normal(3, 1), normal(1, 2))
    same(leaf, leaf.base + leaf.a @ leaf.b)
    assert leaf.dtype == jnp.float32


def test_an_array_without_entries_has_no_other_shape():
    assert LowRank(jnp.zeros((0, 2)), jnp.zeros((0, 1)), jnp.zeros((1, 2))).reshape((2, 0)) is None


def test_a_layer_and_a_part_of_a_stack():
    leaf = LEAVES["stack"]
    same(leaf.layer(1), leaf.dense()[1])
    same(leaf.part(1, 1), leaf.dense()[1:])
    same(leaf.part(1, 1).reshape((3, 4)), leaf.dense()[1])


def test_int8_moves_no_weight_by_more_than_half_a_step():
    weights = normal(16, 8) * jnp.geomspace(1e-3, 1e3, 8)
    leaf = quantise_int8(weights)
    assert leaf.codes.dtype == jnp.int8 and leaf.scale.shape == (8,)
    np.testing.assert_allclose(jnp.abs(leaf.codes).max(0), 127)
    assert (jnp.abs(leaf.dense() - weights) <= 0.5001 * jnp.abs(weights).max(0) / 127).all()
    assert not quantise_int8(jnp.zeros((2, 2))).dense().any()
    rows = quantise_int8(weights, (0,))
    assert rows.scale.shape == (16,)


@pytest.mark.parametrize("shape, blocks", [((64, 64), 64), ((5, 7), 1), ((300, 70), 329)])
def test_nf4_is_four_bits_and_near(shape, blocks):
    weights = normal(*shape)
    leaf = quantise_nf4(weights)
    assert leaf.codes.shape == (blocks, 32) and leaf.codes.dtype == jnp.uint8
    error = leaf.dense() - weights
    assert float(jnp.sqrt(jnp.mean(error**2))) < 0.12  # 4-bit rounding of unit normal weights
    if weights.size > 4000:
        assert sum(x.nbytes for x in jax.tree.leaves(leaf)) <= 0.16 * weights.nbytes
    again = quantise_nf4(leaf.dense())
    np.testing.assert_allclose(again.dense(), leaf.dense(), atol=0.05)


def test_nf4_has_the_values_of_the_paper_and_packs_two_per_byte():
    levels = jnp.asarray([0.0, 1.0, -1.0, 0.5626170039176941] * 16)
    leaf = quantise_nf4(levels)
    assert leaf.codes[0, :2].tolist() == [0x7F, 0x0D]
    np.testing.assert_allclose(leaf.dense(), levels, rtol=1e-6)
    assert not quantise_nf4(jnp.zeros(3)).dense().any()


@pytest.mark.parametrize("function", [quantise_int8, quantise_nf4])
def test_what_cannot_be_quantised_raises(function):
    message = (
        rf"{function.__name__}\(\) expects a floating-point array with axes, got \(3,\) int32. Narrow the selector"
    )
    with pytest.raises(tj.SelectionError, match=message):
        function(jnp.arange(3))
    with pytest.raises(tj.SelectionError, match=r"a floating-point array with axes, got float\."):
        function(1.0)


def test_axes_that_are_not_there_raise():
    with pytest.raises(tj.SelectionError, match=r"quantise_int8\(\) expects axes of \(3, 2\) float32, got \(2,\)\."):
        quantise_int8(jnp.ones((3, 2)), (2,))


BROKEN = {
    "a (3, 1) and b (1, 4) do not make its base (3, 2)": LowRank(normal(3, 2), normal(3, 1), normal(1, 4)),
    "a (3, 2) and b (1, 2) do not make its base (3, 2)": LowRank(normal(3, 2), normal(3, 2), normal(1, 2)),
    "axes 'aa' do not count those of a (3, 1) and b (1, 2)": LowRank(normal(3, 2), normal(3, 1), normal(1, 2), 1, "aa"),
    "scale (3,) is not that of axes (1,) of its base (3, 2)": Scaled(normal(3, 2), normal(3), (1,)),
    "scale (2, 3) is not that of axes (1, 0) of its base (3, 2)": Scaled(normal(3, 2), normal(2, 3), (1, 0)),
    "its arrays have [3, 5] layers": Stacked(LowRank(normal(3, 3, 2), normal(5, 3, 1), normal(3, 1, 2))),
    "scale (3,) is not that of axes (0,) of its base (4, 2)": LowRank(
        Scaled(normal(4, 2), normal(3), (0,)), normal(4, 1), normal(1, 2)
    ),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_leaf_whose_parts_do_not_fit_raises(problem):
    with pytest.raises(tj.SelectionError) as error:
        lift(lambda params: params["fc"]["kernel"])({"fc": {"kernel": BROKEN[problem]}})
    kind = type(BROKEN[problem]).__name__
    expected = f"the lifted leaf at 'fc/kernel' does not fit together: {problem}. Expected the shapes that {kind}"
    assert str(error.value) == f"{expected} documents."
