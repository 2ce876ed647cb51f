"""The fast forms equal the native convolution, in value and in derivatives of any order."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from transferjax.numerics import _convolution, conv_general_dilated

NUMBERS = ("NHWC", "HWIO", "NHWC")

# name, input, kernel, strides, padding, groups
CASES = [
    ("depthwise 3x3", (2, 6, 7, 4), (3, 3, 1, 4), (1, 1), "SAME", 4),
    ("depthwise 3x3 stride 2, even", (2, 8, 8, 4), (3, 3, 1, 4), (2, 2), "SAME", 4),
    ("depthwise 5x5 stride 2, odd", (3, 9, 7, 4), (5, 5, 1, 4), (2, 2), "SAME", 4),
    ("depthwise 5x5 larger than the image", (2, 3, 3, 4), (5, 5, 1, 4), (1, 1), "SAME", 4),
    ("depthwise 5x5 valid", (1, 9, 8, 4), (5, 5, 1, 4), (1, 1), "VALID", 4),
    ("depthwise 3x3 stride 2 valid, rows unused", (2, 8, 6, 4), (3, 3, 1, 4), (2, 2), "VALID", 4),
    ("depthwise, unequal everything", (20, 7, 9, 3), (2, 3, 1, 3), (3, 2), ((1, 0), (2, 3)), 3),
    ("depthwise stride larger than kernel", (2, 7, 7, 3), (2, 2, 1, 3), (3, 3), "VALID", 3),
    ("pointwise", (2, 5, 4, 6), (1, 1, 6, 3), (1, 1), "SAME", 1),
    ("pointwise stride 2", (2, 5, 4, 6), (1, 1, 6, 3), (2, 2), "SAME", 1),
    ("thin stride 2", (2, 8, 9, 3), (3, 3, 3, 8), (2, 2), "SAME", 1),
    ("thin, unequal everything", (3, 7, 6, 2), (2, 4, 2, 9), (1, 2), ((1, 0), (2, 1)), 1),
    ("pointwise padded", (2, 6, 5, 2), (1, 1, 2, 5), (2, 1), ((2, 1), (0, 3)), 1),
]


def draw(*shapes, dtype=np.float32):
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]


def convolve(function, strides, padding, groups, **options):
    return lambda x, kernel: function(
        x, kernel, strides, padding, dimension_numbers=NUMBERS, feature_group_count=groups, **options
    )


def value_and_gradients(f, x, kernel, g):
    value, pull = jax.vjp(f, x, kernel)
    return value, *pull(g)


@pytest.mark.parametrize(("shape", "size", "strides", "padding", "groups"), [c[1:] for c in CASES], ids=lambda _: "")
def test_value_and_gradient_equal_the_native_convolution(shape, size, strides, padding, groups):
    native = convolve(lax.conv_general_dilated, strides, padding, groups)
    fast = convolve(conv_general_dilated, strides, padding, groups)
    out = jax.eval_shape(native, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, size)))
    x, kernel, g = draw(shape, size, out.shape)
    both = jax.jit(lambda *args: (value_and_gradients(fast, *args), value_and_gradients(native, *args)))
    for ours, theirs in zip(*both(x, kernel, g), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("case", [CASES[1], CASES[8], CASES[10]], ids=lambda case: case[0])
def test_half_precision_is_summed_in_float32(case):
    _, shape, size, strides, padding, groups = case
    x, kernel = draw(shape, size, dtype=jnp.bfloat16)
    fast = convolve(conv_general_dilated, strides, padding, groups)
    native = convolve(lax.conv_general_dilated, strides, padding, groups)
    out, *gradients = jax.jit(lambda x, k: value_and_gradients(fast, x, k, jnp.ones_like(fast(x, k))))(x, kernel)
    assert {leaf.dtype for leaf in (out, *gradients)} == {jnp.bfloat16.dtype}
    exact = native(x.astype(jnp.float32), kernel.astype(jnp.float32))
    np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("case", [CASES[2], CASES[9], CASES[10]], ids=lambda case: case[0])
def test_second_order(case):
    _, shape, size, strides, padding, groups = case

    def bend(function):
        f = convolve(function, strides, padding, groups)
        first = jax.grad(lambda x, k: jnp.sum(jnp.tanh(f(x, k))), argnums=(0, 1))
        return jax.grad(lambda x, k: sum(jnp.sum(g**2) for g in first(x, k)), argnums=(0, 1))

    x, kernel = draw(shape, size)
    ours, theirs = jax.jit(lambda x, k: (bend(conv_general_dilated)(x, k), bend(lax.conv_general_dilated)(x, k)))(
        x, kernel
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_vmap_over_inputs_kernels_and_gradients():
    xs, kernels = draw((3, 2, 6, 6, 4), (3, 3, 3, 1, 4))
    gradient = lambda function: jax.vmap(
        jax.grad(lambda x, k: jnp.sum(convolve(function, (1, 1), "SAME", 4)(x, k) ** 2), argnums=(0, 1))
    )
    ours, theirs = jax.jit(lambda *a: (gradient(conv_general_dilated)(*a), gradient(lax.conv_general_dilated)(*a)))(
        xs, kernels
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))},
        {"feature_group_count": 2},
        {"feature_group_count": 1},
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
        {"dimension_numbers": None},
        {"padding": ((-1, 0), (0, 0))},
        {"preferred_element_type": jnp.float32},
    ],
    ids=str,
)
def test_what_has_no_fast_form_is_native(options):
    given = {"padding": "SAME", "dimension_numbers": NUMBERS, "feature_group_count": 4} | options
    groups, numbers = given["feature_group_count"], given["dimension_numbers"]
    last = numbers is NUMBERS
    x = jnp.ones((1, 6, 6, 4) if last else (1, 4, 6, 6), jnp.bfloat16)
    kernel = jnp.ones((3, 3, 4 // groups, 4) if last else (4, 4 // groups, 3, 3), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda x, k: conv_general_dilated(x, k, (1, 1), **given))(x, kernel)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["conv_general_dilated"]


def test_a_window_larger_than_the_image_gives_an_empty_output_as_the_native_one():
    f = convolve(conv_general_dilated, (1, 1), "VALID", 4)
    assert f(jnp.ones((1, 2, 2, 4)), jnp.ones((3, 3, 1, 4))).shape == (1, 0, 0, 4)


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_the_platform_chooses_the_form(platform):
    f = convolve(conv_general_dilated, (1, 1), "SAME", 4)
    gradient = jax.grad(lambda x, k: jnp.sum(f(x, k) ** 2), argnums=(0, 1))
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 6, 6, 4), (3, 3, 1, 4))]
    text = jax.jit(gradient).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    # Forward, input gradient and kernel gradient are one native convolution each; no loop over taps.
    assert text.count("stablehlo.convolution") == (0 if platform == "cpu" else 3)
    assert ("stablehlo.while" in text) == (platform == "cpu")


def test_layers_of_flax_take_it():
    options = {"padding": "SAME", "feature_group_count": 4, "conv_general_dilated": conv_general_dilated}
    x = draw((2, 5, 5, 4))[0]
    layer = nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0), **options)
    plain = nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0), padding="SAME", feature_group_count=4)
    np.testing.assert_allclose(layer(x), plain(x), atol=1e-6)
    linen = nn.Conv(4, (3, 3), **options)
    variables = linen.init(jax.random.key(0), x)
    plain = nn.Conv(4, (3, 3), padding="SAME", feature_group_count=4)
    np.testing.assert_allclose(linen.apply(variables, x), plain.apply(variables, x), atol=1e-6)


def test_equal_windows_are_equal_so_that_traces_are_shared():
    window = lambda: _convolution._window((1, 4, 4, 2), (3, 3, 1, 2), [1, 1], "SAME", 2, None)
    assert window() == window()
    assert hash(window()) == hash(window())


def test_what_feeds_a_depthwise_convolution_is_computed_once():
    x, kernel = jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 1, 16))

    def function(x, kernel):
        return convolve(conv_general_dilated, (1, 1), "SAME", 16)(jnp.sin(x), kernel)

    text = jax.jit(function).lower(x, kernel).compile().as_text()
    assert len(re.findall(r"= f32\[[\d,]+\]\S* sine\(", text)) == 1
