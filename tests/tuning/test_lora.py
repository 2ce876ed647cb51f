"""Low-rank adaptation: shapes, formula and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.testing import check_tuning

PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 4, 6))},
    "fc": {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)},
    "table": jnp.arange(4),
}


def init(tuning, params=PARAMS):
    return tuning.init(jax.random.key(0), params)


def test_a_dense_kernel_becomes_w_plus_s_a_b():
    tuning = tj.lora("fc/kernel", 2, alpha=6.0)
    trainable, frozen = init(tuning)
    a, b = trainable["fc"]["kernel"]["lora_a"], jnp.arange(10.0).reshape(2, 5)
    assert a.shape == (6, 2) and not trainable["fc"]["kernel"]["lora_b"].any()
    trainable["fc"]["kernel"]["lora_b"] = b
    merged = tuning.merge(trainable, frozen)
    np.testing.assert_allclose(merged["fc"]["kernel"], 1 + 3.0 * a @ b, rtol=1e-6)
    assert merged["conv"]["kernel"] is PARAMS["conv"]["kernel"]


@pytest.mark.parametrize(
    "options, scale", [({}, 1.0), ({"alpha": 8.0}, 2.0), ({"alpha": 8.0, "rank_stabilised": True}, 4.0)]
)
def test_the_scale(options, scale):
    tuning = tj.lora("fc/kernel", 4, **options)
    trainable, frozen = init(tuning)
    weights = {"lora_a": jnp.ones((6, 4)), "lora_b": jnp.ones((4, 5))}
    merged = tuning.merge({**trainable, "fc": {"kernel": weights, "bias": tj.Hole()}}, frozen)
    np.testing.assert_allclose(merged["fc"]["kernel"], 1 + scale * 4)


def test_a_convolution_is_k_by_k_to_r_channels_and_then_one_by_one():
    """``conv(x, W + A @ B)`` equals ``conv(x, W) + conv1x1(conv(x, A), B)``."""
    tuning = tj.lora("conv/kernel", 2)
    trainable, frozen = init(tuning)
    weights = trainable["conv"]["kernel"]
    assert weights["lora_a"].shape == (3, 3, 4, 2) and weights["lora_b"].shape == (2, 6)
    weights["lora_b"] = jax.random.normal(jax.random.key(1), (2, 6))
    x = jax.random.normal(jax.random.key(2), (1, 5, 5, 4))
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    side = conv(conv(x, weights["lora_a"]), weights["lora_b"][None, None])
    merged = tuning.merge(trainable, frozen)["conv"]["kernel"]
    np.testing.assert_allclose(conv(x, merged), conv(x, PARAMS["conv"]["kernel"]) + side, rtol=1e-5, atol=1e-5)


def test_a_is_kaiming_uniform_and_differs_per_leaf():
    params = {name: jnp.zeros((400, 50)) for name in ("x", "y")}
    trainable, _ = init(tj.lora("*", 50), params)
    a = trainable["x"]["lora_a"]
    assert float(jnp.abs(a).max()) <= 1 / 20 and float(a.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert (a != trainable["y"]["lora_a"]).any()


def test_a_bfloat16_kernel_stays_and_merges_in_float32():
    trainable, frozen = init(tj.lora("w", 1), {"w": jnp.ones((2, 2), jnp.bfloat16)})
    assert frozen["w"].dtype == jnp.bfloat16 and trainable["w"]["lora_a"].dtype == jnp.float32
    assert tj.lora("w", 1).merge(trainable, frozen)["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    "selector, rank, message",
    [
        ("fc/*", 1, "lora() expects kernels [in, out] or [h, w, in, out]; 'fc/bias' is (5,) float32. "
                    "Narrow the selector, for example to '**/kernel'."),
        ("table", 1, "lora() expects kernels [in, out] or [h, w, in, out]; 'table' is (4,) int32. "
                     "Narrow the selector, for example to '**/kernel'."),
        ("fc/kernel", 6, "lora() got rank 6 for 'fc/kernel' (6, 5) float32: expected at most 5, "
                         "the smaller of its input and output widths."),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_raises(selector, rank, message):
    with pytest.raises(tj.SelectionError) as error:
        init(tj.lora(selector, rank))
    assert str(error.value) == message


def test_a_rank_below_one_raises():
    with pytest.raises(tj.SelectionError, match=r"lora\(\) expects a whole number of at least 1 as rank, got 0\."):
        tj.lora("fc/kernel", 0)


def test_a_leaf_without_shape_raises():
    with pytest.raises(tj.SelectionError, match=r"'w' is float\. Narrow the selector"):
        init(tj.lora("w", 1), {"w": 1.0})


@pytest.mark.parametrize(
    "weights, came",
    [
        (jnp.ones(2), r"\(2,\) float32"),
        ({}, "an empty dict"),
        ({"scale": 1.0}, "float under 'scale'"),
        ({0: jnp.ones(2)}, r"\(2,\) float32 under 0"),
    ],
)
def test_an_adapter_whose_create_returns_no_named_arrays_raises(weights, came):
    tuning = tj.tuning.adapter("fc/bias", lambda key, path, leaf: weights, lambda w, leaf: leaf)
    message = (
        rf"to return a dict \{{name: array\}}; for 'fc/bias' it returned {came}\. Write, for example, \{{'scale': jnp"
    )
    with pytest.raises(tj.SelectionError, match=message):
        init(tuning)


ATTENTION = {"attention": {"query": {"kernel": jnp.ones((6, 2, 3))}, "out": {"kernel": jnp.ones((2, 3, 5))}}}
LAYERS = {"mlp": {"kernel": jnp.ones((4, 6, 5))}, "value": {"kernel": jnp.ones((4, 6, 2, 3))}}


def shapes(tuning, params):
    trainable, _ = init(tuning, params)
    return {path.removesuffix("/kernel/lora_a"): (leaf.shape, tj.paths(trainable)[path[:-1] + "b"].shape)
            for path, leaf in tj.paths(trainable).items() if path.endswith("a")}  # fmt: skip


def test_attention_kernels_are_told_by_the_name_of_their_module():
    found = shapes(tj.lora("**", 2), ATTENTION)
    assert found == {"attention/query": ((6, 2), (2, 2, 3)), "attention/out": ((2, 3, 2), (2, 5))}
    check_tuning(tj.lora("**", 2), ATTENTION)


def test_axes_tell_layers_inputs_and_outputs():
    tuning = tj.lora("**", 2, alpha=1.0, axes={"value/*": "lioo", "**": "lio"})
    assert shapes(tuning, LAYERS) == {"mlp": ((4, 6, 2), (4, 2, 5)), "value": ((4, 6, 2), (4, 2, 2, 3))}
    check_tuning(tuning, LAYERS)
    trainable, frozen = init(tuning, LAYERS)
    trainable = jax.tree.map(lambda x: x + 1.0, trainable)
    merged = tuning.merge(trainable, frozen)
    for name, letters in (("mlp", "lir,lro->lio"), ("value", "lir,lrhd->lihd")):
        weights = trainable[name]["kernel"]
        expected = 1.0 + 0.5 * jnp.einsum(letters, weights["lora_a"], weights["lora_b"])
        np.testing.assert_allclose(merged[name]["kernel"], expected, rtol=1e-6)


def test_every_layer_of_a_stack_has_the_bound_of_one_layer():
    trainable, _ = init(tj.lora("mlp/*", 5, axes={"mlp/*": "lio"}), LAYERS)
    a = trainable["mlp"]["kernel"]["lora_a"]
    assert 0.9 / 6**0.5 < float(jnp.abs(a).max()) <= 1 / 6**0.5 and (a[0] != a[1]).any()


@pytest.mark.parametrize(
    "params, example",
    [({"mlp": {"kernel": jnp.ones((4, 6, 5))}}, "lio"), ({"key": {"kernel": jnp.ones((4, 6, 2, 3))}}, "lioo")],
)
def test_a_kernel_that_could_be_several_things_raises(params, example):
    ((path, leaf),) = tj.paths(params).items()
    with pytest.raises(tj.SelectionError) as error:
        init(tj.lora("**", 1), params)
    assert str(error.value) == (
        f"lora() cannot tell the inputs of '{path}' {leaf.shape} float32 from its outputs. "
        f"Pass axes={{'{path}': letters}} with one letter per axis: 'l' layers, 'i' inputs, 'o' outputs, "
        f"for example '{example}'."
    )


@pytest.mark.parametrize("letters", ["io", "oio", "lil", "llo", "xyz"])
def test_axes_that_do_not_fit_raise(letters):
    message = rf"lora\(\) got axes '{letters}' for 'mlp/kernel' \(4, 6, 5\) float32\. Expected one letter per axis: 'l'"
    with pytest.raises(tj.SelectionError, match=message):
        init(tj.lora("mlp/*", 1, axes={"mlp/*": letters}), LAYERS)


def test_axes_of_a_leaf_that_is_not_there_raise():
    with pytest.raises(tj.SelectionError, match=r"'heda/\*\*' matched none"):
        init(tj.lora("mlp/*", 1, axes={"mlp/*": "lio", "heda/**": "io"}), LAYERS)


AXES = {"layers": "lio", "conv/kernel": "iiio"}


@pytest.mark.parametrize("options", [{}, {"alpha": 3.0}, {"alpha": 3.0, "rank_stabilised": True}])
def test_a_padded_rank_is_that_rank(options):
    """Beginning, merged weight and gradients; what lies beyond the rank is zero and stays it."""
    params = {**PARAMS, "layers": jnp.ones((2, 6, 5))}
    padded = jax.jit(lambda rank: init(tj.lora("{layers,conv/*}", rank, max_rank=4, axes=AXES, **options), params)[0])
    tuning = lambda rank: tj.lora("{layers,conv/*}", rank, max_rank=4, axes=AXES, **options)
    alone = tj.lora("{layers,conv/*}", 2, axes=AXES, **options)
    small, frozen = init(alone, params)
    large = padded(2)
    first = lambda tree: jax.tree.map(lambda x, like: x[tuple(map(slice, like.shape))], tree, small)
    jax.tree.map(np.testing.assert_array_equal, first(large), small)
    jax.tree.map(np.testing.assert_array_equal, init(tuning(2), params)[0], large)
    moved = jax.tree.map(lambda x: x + 0.1, small)
    pad = lambda x, like: jnp.zeros(like.shape).at[tuple(map(slice, x.shape))].set(x)
    beyond = jax.tree.map(pad, moved, large)

    def square(tuning):
        return lambda trainable: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(tuning.merge(trainable, frozen)))

    whole = jax.jit(lambda rank, trainable: jax.value_and_grad(square(tuning(rank)))(trainable))
    value, gradients = whole(2, beyond)
    expected, wanted = jax.value_and_grad(square(alone))(moved)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), first(gradients), wanted)
    size = lambda tree: sum(float(jnp.sum(jnp.abs(x))) for x in jax.tree.leaves(tree))
    np.testing.assert_allclose(size(gradients), size(first(gradients)), rtol=1e-6)
    assert all(np.isnan(whole(rank, beyond)[0]) for rank in (0, 5))


def test_ranks_that_cannot_be_padded():
    with pytest.raises(tj.SelectionError, match=r"lora\(\) got rank 5 above max_rank 4. Expected at most max_rank"):
        tj.lora("fc/kernel", 5, max_rank=4)
    with pytest.raises(tj.SelectionError, match="expects a whole number of at least 1 as max_rank, got 0"):
        tj.lora("fc/kernel", 1, max_rank=0)
    with pytest.raises(tj.SelectionError, match="expects a whole number of at least 1 as rank, got"):
        tj.lora("fc/kernel", jnp.ones(()), max_rank=4)
    with pytest.raises(tj.SelectionError, match="got rank 6 for 'fc/kernel'"):
        init(tj.lora("fc/kernel", 2, max_rank=6))
