"""BatchNorm momentum that follows the number of training steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transferjax import interop
from transferjax._context import tracing_step
from transferjax._errors import TransferError


def after(model, x, step, train="bn"):
    @jax.jit
    def traced(step, extra):
        with tracing_step(step):
            return model.apply(model.params, extra, x, train=train)[1]["bn"]

    return traced(jnp.int32(step), model.extra)


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.1), (35, 0.8), (80, 0.9), (100_000, 0.9)])
def test_the_momentum_grows_with_the_step_up_to_the_modules_own(model, x, step, momentum):
    fixed = interop.batch_norm_momentum(model, momentum)
    expected = fixed.apply(fixed.params, fixed.extra, x, train="bn")[1]["bn"]
    found = after(model, x, step)
    for name in ("mean", "var"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_momentum_that_was_set_does_not_follow(model, x):
    fixed = interop.batch_norm_momentum(model, 0.5)
    expected = fixed.apply(fixed.params, fixed.extra, x, train="bn")[1]["bn"]
    np.testing.assert_allclose(after(fixed, x, 0)["mean"], expected["mean"], rtol=1e-5, atol=1e-6)


def test_a_frozen_batch_norm_keeps_its_bits_in_a_step(model, x):
    assert np.array_equal(after(model, x, 3, train="head")["mean"], model.extra["bn"]["mean"])


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_one_function_wrapped_once_serves_several_steps(model, x, wrap):
    inner = wrap(lambda params, extra: model.apply(params, extra, x, train="bn"))
    for offset in (0, 1):

        @jax.jit
        def traced(step, params, by=offset):
            with tracing_step(step + by):
                return jax.value_and_grad(lambda p: inner(p, model.extra)[0].sum())(params)[0]

        assert np.isfinite(traced(jnp.int32(2), model.params))


class OwnNorm(nnx.Module):
    """Statistics with torch's momentum, which is one minus flax's."""

    def __init__(self):
        self.mean, self.var = nnx.BatchStat(jnp.zeros(2)), nnx.BatchStat(jnp.ones(2))
        self.momentum, self.use_running_average = 0.1, False

    def __call__(self, x):
        if not self.use_running_average:
            self.mean[...] = (1 - self.momentum) * self.mean[...] + self.momentum * x.mean(0)
        return x


class Net(nnx.Module):
    def __init__(self):
        self.bn = OwnNorm()

    def __call__(self, x):
        return self.bn(x)


def test_norms_of_ones_own_keep_their_momentum_and_cannot_be_estimated():
    model = interop.batch_norm_momentum(interop.nnx(Net()), 0.0)
    x = jnp.ones((4, 2))
    assert model.apply({}, model.extra, x, train=True)[1]["bn"]["mean"].tolist() == pytest.approx([0.1, 0.1])
    assert after(model, x, 0)["mean"].tolist() == pytest.approx([0.1, 0.1])
    with pytest.raises(TransferError, match="cannot set the momentum of bn: no BatchNorm of flax"):
        interop.reestimate_statistics(model, {}, [{"inputs": x}])


def test_a_batch_norm_called_twice_in_linen_is_known_by_its_own_momentum(x):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(momentum=0.3, use_running_average=True, name="bn")
            return norm(norm(x))

    model = interop.linen(Twice(), Twice().init(jax.random.key(0), x))
    expected = 0.3 * model.extra["bn"]["mean"] + 0.7 * after(interop.batch_norm_momentum(model, 0.0), x, 50)["mean"]
    np.testing.assert_allclose(after(model, x, 50)["mean"], expected, rtol=1e-5, atol=1e-6)
