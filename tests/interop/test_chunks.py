import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transferjax import interop
from transferjax._errors import TransferError


@pytest.fixture
def model():
    return interop.in_chunks(interop.nnx(_network()), 4)


def _network():
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
    class Sum(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((3, 2)))

        def __call__(self, a, b):
            return (a + b) @ self.w[...]

    plain = interop.nnx(Sum())
    inputs = {"a": jax.random.normal(jax.random.key(0), (8, 3)), "b": jnp.ones((8, 3))}
    loss = lambda model: jax.jit(jax.grad(lambda p: (model.apply(p, {}, inputs)[0] ** 2).sum()))(plain.params)
    np.testing.assert_allclose(loss(interop.in_chunks(plain, 2))["w"], loss(plain)["w"], rtol=1e-5)


def test_fewer_than_one_example_raises():
    with pytest.raises(TransferError, match=r"in_chunks\(\) expects a whole number of at least 1 example.*, got 0"):
        interop.in_chunks(interop.pure(lambda params, x: x, {}), 0)
    with pytest.raises(TransferError, match=r"chunked\(\) expects a whole number of at least 1 example.*, got -1"):
        interop.chunked(lambda x: x, jnp.ones(2), -1)


class Halves(nnx.Module):
    """An early half that takes two examples at a time, a late one that takes the batch."""

    def __init__(self):
        self.early, self.norm = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(1))
        self.late = nnx.Linear(4, 2, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.late(interop.chunked(lambda part: self.norm(self.early(part)), x, 2))


X = jax.random.normal(jax.random.key(0), (8, 3))


@pytest.fixture
def halves():
    return interop.nnx(Halves())


def applied(model, **options):
    return lambda params, extra, x: model.apply(params, extra, x, **options)


def test_a_part_of_a_network_goes_through_in_chunks_with_the_same_outputs(halves):
    module = Halves()
    module.eval()
    outputs, extra = jax.jit(halves.apply)(halves.params, halves.extra, X)
    np.testing.assert_allclose(outputs, module(X), rtol=1e-6, atol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), extra, halves.extra))
    assert loops(applied(halves), halves.params, halves.extra, X) == 1


def test_a_part_is_taken_whole_by_whoever_needs_more_than_the_outputs(halves):
    arguments = halves.params, halves.extra, X
    capture = lambda params, extra, x: halves.capture(params, extra, x, "early")[2]
    inserted = interop.insert(halves, "early", lambda aux, y: y + 1)
    assert loops(applied(halves, train=True), *arguments) == 0
    assert loops(applied(halves, train="norm"), *arguments) == 0
    assert loops(capture, *arguments) == 0
    assert loops(applied(inserted), *arguments) == 0
    assert loops(applied(halves), *arguments, platform="cuda") == 0
    alone = nnx.view(Halves(), use_running_average=True)
    assert loops(lambda x: alone(x), X) == 0


def test_a_pass_inside_another_has_its_own_mode(halves):
    def outer(params, x):
        return halves.apply(params, halves.extra, x, train=True)[0] + interop.chunked(lambda part: part[:, :2], x, 2)

    model = interop.pure(outer, halves.params)
    assert loops(applied(model), model.params, {}, X) == 1


def test_linen_modules_are_never_chunked_not_even_inside_a_pass_that_is():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=False)
            return interop.chunked(norm, x, 2)

    model = interop.linen(Linen(), Linen().init(jax.random.key(0), X))
    outer = interop.pure(lambda params, x: model.apply(params, model.extra, x, train=True)[0], model.params)
    assert loops(applied(outer), outer.params, {}, X) == 0
    np.testing.assert_allclose(jax.jit(applied(outer))(outer.params, {}, X)[0].mean(0), 0, atol=1e-5)


def test_a_function_that_was_traced_whole_is_traced_anew_for_chunks():
    inner = jax.jit(lambda params, x: interop.chunked(lambda part: part * params, x, 2))
    model = interop.pure(lambda params, x: inner(params, x), jnp.float32(2.0))
    assert loops(applied(model, train=True), model.params, {}, X) == 0
    assert loops(applied(model), model.params, {}, X) == 1


def test_gradients_go_through_chunks(halves):
    loss = lambda model: jax.jit(jax.grad(lambda p: (model.apply(p, model.extra, X)[0] ** 2).sum()))(model.params)
    plain = interop.pure(lambda params, x: halves.capture(params, halves.extra, x, "early")[0], halves.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), loss(halves), loss(plain))
