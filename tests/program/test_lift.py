"""A function on lifted leaves computes, and differentiates to, what it does on arrays; and says where it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import transferjax as tj
from transferjax.program import (
    LowRank,
    Scaled,
    Stacked,
    cost,
    is_lifted,
    lift,
    materialised,
    quantise_int8,
    quantise_nf4,
)

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(0.4 * rng.normal(size=shape).astype(np.float32))


def low_rank(*shape, inputs=1, rank=2, scale=0.5):
    return LowRank(normal(*shape), normal(*shape[:inputs], rank), normal(rank, *shape[inputs:]), scale)


def convolve(x, w, numbers=("NHWC", "HWIO", "NHWC"), **options):
    return lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=numbers, **options)


def run_over(w, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum(0)), x, w)


@jax.custom_vjp
def own(x, w):
    return x @ w


own.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (-(g @ r[1].T), 5.0 * (r[0].T @ g)))

kernel, square, cube = low_rank(6, 5), low_rank(6, 6), low_rank(6, 2, 3)
filters = low_rank(3, 3, 4, 6, inputs=3)
stack = Stacked(LowRank(normal(3, 6, 6), normal(3, 6, 2), normal(3, 2, 6), 0.5))
x, image, rows = normal(3, 6), normal(2, 5, 5, 4), np.array([[0, 3], [5, -1]])
over = lambda base, like: LowRank(base, like.a, like.b, like.scale)

PASSES = {
    "dense": (lambda w, x: x @ w, kernel, x),
    "a vector": (lambda w, x: x @ w, kernel, x[0]),
    "from the left": (lambda w, x: w.T @ x.T, kernel, x),
    "tied": (lambda w, x: x @ w @ w.T, kernel, x),
    "reshaped and renamed": (lambda w, x: jnp.einsum("bi,iho->hbo", x, w.reshape(6, 1, 5)[None][0]), kernel, x),
    "cast": (lambda w, x: (x.astype(jnp.bfloat16).astype(jnp.float32) @ w.astype(jnp.float32)), kernel, x),
    "heads": (lambda w, x: jnp.einsum("ti,ihd->htd", x, w), cube, x),
    "heads as inputs": (lambda w, x: jnp.einsum("thd,hdo->to", x, w), low_rank(2, 3, 4, inputs=2), normal(5, 2, 3)),
    "scaled outputs": (lambda w, x: x @ w, Scaled(kernel, normal(5), (1,)), x),
    "scaled inputs": (lambda w, x: x @ w, Scaled(kernel, normal(6), (0,)), x),
    "scaled inputs, tied": (lambda w, x: x @ w.T, Scaled(kernel, normal(6), (0,)), normal(3, 5)),
    "scaled heads": (lambda w, x: jnp.einsum("ti,ihd->htd", x, w), Scaled(cube, normal(2, 3), (1, 2)), x),
    "int8": (lambda w, x: x @ w, quantise_int8(normal(6, 5)), x),
    "nf4": (lambda w, x: x @ w.T, quantise_nf4(normal(5, 6)), x),
    "low rank over int8": (lambda w, x: x @ w, over(quantise_int8(normal(6, 5)), kernel), x),
    "low rank over nf4": (lambda w, x: x @ w, over(quantise_nf4(normal(6, 5)), kernel), x),
    "convolution": (lambda w, x: convolve(x, w), filters, image),
    "convolution over int8": (lambda w, x: convolve(x, w), over(quantise_int8(normal(3, 3, 4, 6)), filters), image),
    "convolution, scaled": (
        lambda w, x: convolve(x, w), Scaled(Scaled(filters, normal(6), (3,)), normal(4), (2,)), image
    ),
    "convolution, channels first": (
        lambda w, x: convolve(x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1), ("NCHW", "OIHW", "NCHW")),
        filters, image,
    ),
    "look-up": (lambda w, i: jnp.take(w, i, axis=0), kernel, rows),
    "look-up out of bounds": (lambda w, i: jnp.take(w, i + 3, axis=0, mode="fill", fill_value=2.0), kernel, rows),
    "look-up, scaled rows": (lambda w, i: w[i], Scaled(kernel, normal(6), (0,)), rows),
    "look-up, scaled columns": (lambda w, i: w[i], Scaled(kernel, normal(5), (1,)), rows),
    "look-up in int8": (lambda w, i: w[i], quantise_int8(normal(6, 5), (0,)), rows),
    "look-up in nf4": (lambda w, i: w[i], quantise_nf4(normal(6, 5)), rows),
    "scan over a stack": (run_over, stack, x),
    "scan backwards over quantised layers": (
        lambda w, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w, reverse=True)[0],
        Stacked(LowRank(jax.vmap(quantise_nf4)(normal(3, 6, 6)), stack.leaf.a, stack.leaf.b)), x,
    ),
    "scan over layers quantised together, int8": (run_over, quantise_int8(normal(3, 6, 6)), x),
    "scan over layers quantised together, int8 with a scale per layer": (
        run_over, quantise_int8(normal(3, 6, 6), (0, 2)), x
    ),
    "scan over layers quantised together, nf4": (run_over, quantise_nf4(normal(2, 128, 128)), normal(3, 128)),
    "scan over a cast stack": (lambda w, x: run_over(w.astype(jnp.float16).astype(jnp.float32), x), stack, x),
    "scan with constant weights": (
        lambda w, x: lax.scan(lambda h, x: (jnp.tanh(h @ w + x), h), x[0], x)[1], square, normal(4, 3, 6)
    ),
    "every layer on inputs of its own": (lambda w, x: jnp.einsum("bli,lio->blo", x, w), stack, normal(2, 3, 6)),
    "layers by number": (lambda w, x: x @ w[1] @ w[-1], stack, x),
    "layers in a loop": (lambda w, x: lax.fori_loop(0, 3, lambda i, x: x @ w[i], x), stack, x),
    "branches": (lambda w, x: lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ w.T, w), square, x),
    "platforms": (
        lambda w, x: lax.platform_dependent(w, cpu=lambda w: x @ w, tpu=lambda w: x, default=lambda w: 2 * x), square, x
    ),
    "remat": (lambda w, x: jnp.sin(jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x)), square, x),
    "jit": (lambda w, x: jax.jit(lambda w: x @ w)(w), square, x),
    "vmap": (lambda w, x: jax.vmap(lambda x: x @ w)(x), square, x),
}  # fmt: skip


def dense(params):
    return jax.tree.map(lambda leaf: leaf.dense() if is_lifted(leaf) else leaf, params, is_leaf=is_lifted)


def check(function, leaves, rest, atol=1e-5):
    """Outputs and gradients on lifted leaves are those on their arrays."""

    def gradients(run):
        def loss(leaves, rest):
            outputs = run(leaves, rest)
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(outputs)), outputs

        return jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))(leaves, rest)

    (_, expected), slopes = gradients(lambda leaves, rest: function(dense(leaves), rest))
    (_, found), ours = gradients(lift(function))
    for a, b in zip(jax.tree.leaves((found, ours)), jax.tree.leaves((expected, slopes)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", PASSES)
def test_a_leaf_passes(name):
    function, leaf, rest = PASSES[name]
    assert materialised(function, leaf, rest) == ()
    check(function, leaf, rest, atol=1e-3 if "cast stack" in name else 1e-5)


NO_LAYER = "a part is taken that is no layer of a stack"
AT_ONCE = "the layers of a stack are used at once"
REFUSED = [
    (lambda w, x: jnp.tanh(w) @ x.T, square, x, "tanh", "it is no linear operation that knows lifted leaves"),
    (lambda w, x: own(x, w), square, x, "custom_vjp_call", "it has a derivative of its own"),
    (lambda w, x: w, square, x, "output", "it is an output"),
    (lambda w, x: x @ w.reshape(2, 15).reshape(6, 5), kernel, x, "reshape",
     "axes of both factors, or scaled and other axes, would become one"),
    (lambda w, x: x + w.astype(int), square, x[0], "convert_element_type",
     "it is cast to a type that is no floating-point one"),
    (lambda w, x: jnp.einsum("bi,bio->bo", x, jnp.broadcast_to(w, (3, 6, 5))), kernel, x, "broadcast_in_dim",
     "its entries are repeated"),
    (lambda w, x: jnp.broadcast_to(w, (6, 6)) @ x[0], low_rank(1, 6), x, "broadcast_in_dim",
     "its entries are repeated"),
    (lambda w, x: x @ w[:, :2], kernel, x, "slice", NO_LAYER),
    (lambda w, x: jnp.einsum("bi,lio->lbo", x, w[::2]), stack, x, "slice", NO_LAYER),
    (lambda w, x: w @ w.T @ x.T, square, x, "dot_general", "it is multiplied by another lifted leaf"),
    (lambda w, x: jnp.einsum("bi,bio->bo", x, w), low_rank(3, 6, 4, inputs=2), x, "dot_general",
     "an axis of one matrix is a batch axis of the product"),
    (lambda w, x: jnp.einsum("io,io->", x, w), kernel, normal(6, 5), "dot_general",
     "the product sums over axes of both factors, or over none"),
    (lambda w, x: jnp.einsum("bi,io->bo", x, w), Scaled(normal(6, 5), normal(6, 5), (0, 1)), x, "dot_general",
     "the product sums over some of the axes that are scaled, not over all"),
    (lambda w, x: jnp.einsum("li,lio->o", x, w), stack, x, "dot_general", AT_ONCE),
    (lambda w, x: convolve(x, w), Stacked(LowRank(normal(3, 3, 4, 6), normal(3, 3, 4, 2), normal(3, 2, 6))), image,
     "conv_general_dilated", AT_ONCE),
    (lambda w, i: w[i], stack, rows % 3, "gather", AT_ONCE),
    (lambda w, x: convolve(x, w, feature_group_count=4), low_rank(3, 3, 1, 8, inputs=3), image,
     "conv_general_dilated", "the convolution has groups"),
    (lambda w, x: convolve(x, w), low_rank(3, 3, 4, 6, inputs=2), image, "conv_general_dilated",
     "the output channels of the convolution share a factor with other axes"),
    (lambda w, x: convolve(x, w), Scaled(normal(3, 3, 4, 6), normal(3), (0,)), image, "conv_general_dilated",
     "the convolution's kernel is scaled along other axes than its input or output channels"),
    (lambda w, x: convolve(w, x), low_rank(2, 5, 5, 4), normal(3, 3, 4, 6), "conv_general_dilated",
     "it is the input of a convolution"),
    (lambda w, i: w[i], low_rank(6, 2, 3, inputs=2), rows, "gather",
     "the rows of the table share a factor with other axes"),
    (lambda w, i: w[:, i], kernel, rows % 2, "gather", "the look-up takes something else than whole rows"),
    (lambda w, i: jnp.take(w, i + 3, axis=0, mode="fill", fill_value=2.0), Scaled(normal(6, 5), normal(5), (1,)), rows,
     "gather", "rows out of bounds are filled with a number"),
    (lambda w, i: w[i], Scaled(normal(6, 5), normal(6, 5), (0, 1)), rows, "gather",
     "the table is scaled along its rows and other axes at once"),
    (lambda w, x: lax.scan(lambda h, _: (h @ h, None), w, None, length=2)[0], square, x, "scan",
     "it changes from one iteration to the next"),
    (lambda w, x: lax.scan(lambda h, w: (h + w, None), x[0], w)[0], square, x, "scan",
     "its first axis is run over, and it is no stack of layers"),
    (run_over, quantise_nf4(normal(3, 6, 6)), x, "scan", "its first axis is run over, and it is no stack of layers"),
]  # fmt: skip


@pytest.mark.parametrize("function, leaf, rest, primitive, reason", REFUSED, ids=[f"{c[3]}: {c[4]}" for c in REFUSED])
def test_what_cannot_pass_becomes_an_array_and_is_reported(function, leaf, rest, primitive, reason):
    call = lambda params, rest: function(params["block"]["kernel"], rest)
    params = {"block": {"kernel": leaf}}
    assert materialised(call, params, rest) == (("block/kernel", primitive, reason),)
    check(call, params, rest)
    message = (
        f"the lifted leaf at 'block/kernel' reaches '{primitive}', which it cannot pass: {reason}. Expected products "
        "only: leave the leaf out of the selector, or allow its array with strict=False."
    )
    with pytest.raises(tj.SelectionError) as error:
        lift(call, strict=True)(params, rest)
    assert str(error.value) == message


def test_a_product_that_says_where_its_result_lies_gets_the_array():
    mesh = jax.make_mesh((1,), ("data",))
    spec = jax.sharding.PartitionSpec("data", None)
    with jax.set_mesh(mesh):
        put = lambda w, x: jnp.einsum("bi,io->bo", x, w, out_sharding=spec)
        (fact,) = materialised(put, kernel, x)
    assert fact == ("", "dot_general", "the product says where its result lies")


def test_a_rule_of_its_own_keeps_its_gradient():
    """``own`` has a deliberately wrong derivative: neither form may look into it."""
    leaf = low_rank(6, 5)
    slope = jax.grad(lambda leaf: jnp.sum(lift(lambda w, x: own(x, w))(leaf, x)))(leaf)
    np.testing.assert_allclose(slope.base, 5.0 * x.T @ jnp.ones((3, 5)), rtol=1e-5)


def test_a_function_without_lifted_leaves_is_called_as_it_is():
    assert lift(lambda params, word: (params["w"], word))({"w": 1.0}, "any") == (1.0, "any")


def test_arguments_that_are_no_arrays_reach_the_function():
    call = lambda params, x, train, key: {"y": x @ params["w"] * (2.0 if train else 1.0), "key": key}
    found = lift(call)({"w": kernel}, x, True, None)
    assert found["key"] is None
    np.testing.assert_allclose(found["y"], 2 * x @ kernel.dense(), rtol=1e-5, atol=1e-6)
    assert materialised(call, {"w": kernel}, jax.ShapeDtypeStruct(x.shape, x.dtype), True, None) == ()


def test_each_fact_comes_once():
    twice = lambda p: jnp.tanh(p["a"]) + jnp.tanh(p["a"]) + jnp.tanh(p["b"])
    facts = materialised(twice, {"a": square, "b": square})
    assert [(fact.path, fact.primitive) for fact in facts] == [("a", "tanh"), ("b", "tanh")]


def test_a_quantised_base_is_not_kept_decoded_for_the_backward_pass():
    """What the backward pass gets are the codes; the decoded matrix is made anew there."""
    x, leaf = normal(4, 32), over(quantise_int8(normal(32, 32)), low_rank(32, 32))
    _, pullback = jax.vjp(lambda x: lift(lambda w, x: jnp.tanh(x @ w))(leaf, x), x)
    kept = [y for y in jax.tree.leaves(pullback) if hasattr(y, "shape")]
    assert not any(y.shape == (32, 32) and y.dtype == jnp.float32 for y in kept)
    assert any(y.dtype == jnp.int8 for y in kept)


def test_a_quantised_product_costs_what_a_plain_one_does():
    x, whole = normal(64, 32), normal(32, 48)
    loss = lambda x, w: jnp.sum(jnp.sin(lift(lambda w, x: x @ w)(w, x)))
    plain = cost(jax.grad(loss), x, whole).contractions
    assert cost(jax.grad(loss), x, quantise_int8(whole)).contractions == plain
    assert cost(jax.grad(loss), x, quantise_nf4(whole)).contractions == plain


def test_bfloat16_stays_bfloat16():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), LowRank(kernel.base, kernel.a, kernel.b, jnp.asarray(0.5)))
    found = lift(lambda w, x: x @ w, strict=True)(half, x.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), x @ kernel.dense(), atol=0.05)
    wide = lambda w, x: jnp.einsum("bi,io->bo", x, w, preferred_element_type=jnp.float32)
    assert lift(wide, strict=True)(half, x.astype(jnp.bfloat16)).dtype == jnp.float32
