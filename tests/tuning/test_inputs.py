"""What enters each kernel: the rows of its product, in every framework and form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax import interop, numerics
from transferjax._errors import DataError, SelectionError
from transferjax.models import _bert, _initialise
from transferjax.tuning import input_moments

LAYOUT: dict = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
KEY = jax.random.key(0)


def normal(key, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, key), shape)


def check(found, rows):
    rows = np.asarray(rows, np.float64).reshape(-1, rows.shape[-1])
    assert found.count == len(rows)
    np.testing.assert_allclose(found.total, rows.sum(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.products, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_rows_of_dense_layers_over_all_batches_and_uses():
    params = {"a": normal(0, 5, 6), "b": normal(1, 6, 6), "c": normal(2, 6, 2)}

    def apply(params, x):
        x = jax.nn.relu(x @ params["a"])
        for _ in range(2):
            x = jnp.tanh(jnp.einsum("...i,io->...o", x, params["b"].T.T))
        return jax.checkpoint(lambda x: x @ params["c"].astype(jnp.bfloat16).astype(jnp.float32))(x)

    model, x = interop.pure(apply, params), np.asarray(normal(3, 8, 3, 5))
    found = input_moments(model, "*", [{"inputs": x[:2]}, {"inputs": x[2:]}])
    first = jax.nn.relu(x @ params["a"])
    second = jnp.tanh(first @ params["b"])
    check(found["a"], x)
    check(found["b"], jnp.concatenate([first, second]))
    check(found["c"], jnp.tanh(second @ params["b"]))
    assert {sums.products.dtype for sums in found.values()} == {np.dtype(np.float64)}


def test_rows_of_attention_and_text_encoders_are_what_the_modules_are_given():
    variant = _bert.Variant(layers=2, width=8, heads=2, hidden=12, vocabulary=20, positions=16)
    model = interop.nnx(_initialise.materialise(lambda: _bert.build(variant, 3), KEY, _bert.std, "head/"))
    text = {"input_ids": np.arange(8).reshape(2, 4), "attention_mask": np.array([[1, 1, 1, 0], [1, 1, 1, 1]])}
    found = input_moments(model, "layers/*/{attention/query,mlp/up}/kernel", [{"inputs": text}])
    seen = model.capture(model.params, model.extra, text, ["embeddings", "layers/0"])[2]
    check(found["layers/0/attention/query/kernel"], seen["embeddings"])
    check(found["layers/1/attention/query/kernel"], seen["layers/0"])
    assert found["layers/1/mlp/up/kernel"].count == 8


def test_rows_of_heads_in_linen_attention():
    from flax import linen

    module = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    x = np.asarray(normal(0, 3, 4, 5))
    model = interop.linen(module, module.init(KEY, x))
    found = input_moments(model, "{query,out}/kernel", [{"inputs": x}])
    check(found["query/kernel"], x)
    assert found["out/kernel"].products.shape == (6, 6)
    kernel, bias = (model.params["out"][name] for name in ("kernel", "bias"))
    mean = found["out/kernel"].total / found["out/kernel"].count
    made = model.apply(model.params, model.extra, x)[0].mean((0, 1))
    np.testing.assert_allclose(mean @ kernel.reshape(6, -1) + bias, made, rtol=1e-4, atol=1e-5)


def patches(x, size, stride):
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = range(0, x.shape[1] - size + 1, stride)
    return np.stack([x[:, i : i + size, j : j + size].reshape(len(x), -1) for i in places for j in places], 1)


def test_rows_of_a_convolution_are_its_patches():
    apply = lambda params, x: jax.lax.conv_general_dilated(
        x, params["kernel"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x, kernel = np.asarray(normal(0, 2, 6, 6, 3)), normal(1, 3, 3, 3, 4)
    model = interop.pure(apply, {"kernel": kernel})
    check(input_moments(model, "kernel", [{"inputs": x}])["kernel"], patches(x, 3, 2))


def test_convolutions_with_a_derivative_and_a_form_for_cpu_of_their_own_are_looked_into():
    apply = lambda params, x: numerics.conv_general_dilated(
        jax.nn.relu6(numerics.conv_general_dilated(x, params["stem"], (2, 2), ((1, 1), (1, 1)), **LAYOUT)),
        *(params["point"], (1, 1), "SAME"),
        **LAYOUT,
    )
    x, params = np.asarray(normal(0, 2, 6, 6, 3)), {"stem": normal(1, 3, 3, 3, 8), "point": normal(2, 1, 1, 8, 4)}
    found = input_moments(interop.pure(apply, params), "*", [{"inputs": x}])
    rows = patches(x, 3, 2)
    check(found["stem"], rows)
    check(found["point"], np.clip(rows @ params["stem"].reshape(-1, 8), 0, 6))


def test_what_has_no_rows_is_named():
    x = jnp.ones((2, 3))
    square = {"kernel": jnp.ones((3, 3)), "unused": jnp.ones((3, 3))}
    gather = lambda function: lambda: input_moments(interop.pure(function, square), "kernel", [{"inputs": x}])
    with pytest.raises(SelectionError, match=r"at 'kernel': it reaches 'tanh', which is no product over its inputs"):
        gather(lambda params, x: x @ jnp.tanh(params["kernel"]))()
    with pytest.raises(SelectionError, match=r"at 'kernel': it reaches 'dot_general', which is no product"):
        gather(lambda params, x: x @ params["kernel"].T)()
    with pytest.raises(SelectionError, match=r"at 'kernel': 'reshape' makes \(9,\) of \(3, 3\), which mixes its axes"):
        gather(lambda params, x: x @ params["kernel"].reshape(-1)[:3])()
    with pytest.raises(SelectionError, match=r"at 'unused': it meets no data"):
        input_moments(interop.pure(lambda p, x: x @ p["kernel"], square), "unused", [{"inputs": x}])
    model = interop.pure(lambda params, x: x @ params["kernel"], square)
    with pytest.raises(DataError, match=r"input_moments\(\) got no batch"):
        input_moments(model, "kernel", [])
    with pytest.raises(DataError, match="expects batches as dicts with 'inputs', got"):
        input_moments(model, "kernel", [x])  # pyright: ignore[reportArgumentType]
    assert tj.tuning.Moments._fields == ("count", "total", "products")
