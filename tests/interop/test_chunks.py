import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax import interop
from transferjax._errors import TransferError


@pytest.fixture
def model():
    return interop.in_chunks(interop.nnx(_network()), 4)


def _network():
    from flax import nnx

    return nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(1)))


def loops(function, *args, platform="cpu"):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")


@pytest.mark.parametrize(("count", "chunked"), [(4, 0), (7, 0), (8, 1), (9, 1), (10, 1)])
def test_a_batch_that_divides_goes_through_in_chunks_with_the_same_outputs(count, chunked, model):
    x = jax.random.normal(jax.random.key(0), (count, 3))
    plain = interop.nnx(_network())
    expected, _ = jax.jit(plain.apply)(model.params, model.extra, x)
    outputs, extra = jax.jit(model.apply)(model.params, model.extra, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-6, atol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), extra, model.extra))
    assert loops(model.apply, model.params, model.extra, x) == chunked


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_an_accelerator_gets_the_whole_batch(platform, model):
    assert loops(model.apply, model.params, model.extra, jnp.ones((8, 3)), platform=platform) == 0


def test_training_and_capturing_take_the_whole_batch(model):
    x = jnp.ones((8, 3))
    train = lambda params, extra, x: model.apply(params, extra, x, train=True)
    capture = lambda params, extra, x: model.capture(params, extra, x, "layers/0")[2]
    assert loops(train, model.params, model.extra, x) == 0
    assert loops(capture, model.params, model.extra, x) == 0


def test_inputs_of_several_arrays_and_gradients():
    plain = interop.pure(lambda params, x: (x["a"] + x["b"]) @ params["w"], {"w": jnp.ones((3, 2))})
    inputs = {"a": jax.random.normal(jax.random.key(0), (8, 3)), "b": jnp.ones((8, 3))}
    loss = lambda model: jax.jit(jax.grad(lambda p: (model.apply(p, {}, inputs)[0] ** 2).sum()))(plain.params)
    np.testing.assert_allclose(loss(interop.in_chunks(plain, 2))["w"], loss(plain)["w"], rtol=1e-5)


def test_fewer_than_one_example_raises():
    with pytest.raises(TransferError, match=r"in_chunks\(\) expects at least 1 example in a chunk, got 0"):
        interop.in_chunks(interop.pure(lambda params, x: x, {}), 0)
