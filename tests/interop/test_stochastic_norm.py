"""StochNorm: BatchNorm that normalises some channels by its running statistics while it trains."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import transferjax as tj
from transferjax import interop
from transferjax._errors import TransferError
from transferjax.models._efficientnet_lite import BatchNorm

FEATURES = 64
X = jax.random.normal(jax.random.key(1), (8, 5, FEATURES)) * 2 + 1


class LinenSubclass(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, use_running_average=None):
        return super().__call__(x, use_running_average=use_running_average)


class LinenNet(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        return self.norm(momentum=0.9, name="bn")(x, use_running_average=not train)


class LinenRemat(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        return nn.remat(LinenNet, static_argnums=2)(self.norm, name="block")(x, train)


class NnxNet(nnx.Module):
    def __init__(self, norm, remat=False):
        self.bn, self.remat = norm(FEATURES, momentum=0.9, rngs=nnx.Rngs(0)), remat

    def __call__(self, x):
        return nnx.remat(lambda bn, x: bn(x))(self.bn, x) if self.remat else self.bn(x)


def linen_net(norm, net=LinenNet):
    module = net(norm)
    return interop.linen(module, module.init(jax.random.key(0), X, False))


NETS = {
    "nnx": lambda: interop.nnx(NnxNet(nnx.BatchNorm)),
    "nnx subclass": lambda: interop.nnx(NnxNet(BatchNorm)),
    "nnx in remat": lambda: interop.nnx(NnxNet(nnx.BatchNorm, remat=True)),
    "linen": lambda: linen_net(nn.BatchNorm),
    "linen subclass": lambda: linen_net(LinenSubclass),
    "linen in remat": lambda: linen_net(nn.BatchNorm, LinenRemat),
}


OLD = {"mean": jnp.linspace(-1, 1, FEATURES), "var": jnp.linspace(0.5, 2, FEATURES)}


@pytest.fixture(params=NETS)
def net(request):
    model = NETS[request.param]()
    return model._replace(extra=tj.tree.nest({path: OLD[path.rpartition("/")[2]] for path in tj.paths(model.extra)}))


def by_hand(old=OLD):
    """The outputs by running and by batch statistics, in float64."""
    x = np.asarray(X, np.float64)
    norm = lambda mean, var: (x - mean) / np.sqrt(var + 1e-5)
    return norm(*(np.asarray(old[name], np.float64) for name in ("mean", "var"))), norm(x.mean((0, 1)), x.var((0, 1)))


def test_each_channel_is_normalised_by_one_of_two_statistics_and_the_running_ones_move_as_ever(net):
    stochastic, key = interop.stochastic_norm(net, 0.25), jax.random.key(0)
    found, extra = stochastic.apply(net.params, net.extra, X, key=key, train=True)
    running, batch = by_hand()
    of_running = np.isclose(found, running, atol=1e-4).all((0, 1))
    np.testing.assert_allclose(found, np.where(of_running, running, batch), atol=1e-4)
    assert 5 <= of_running.sum() <= 30
    plain = net.apply(net.params, net.extra, X, train=True)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), extra, plain)
    again, other = (stochastic.apply(net.params, net.extra, X, key=k, train=True)[0] for k in (key, jax.random.key(1)))
    np.testing.assert_array_equal(again, found)
    assert np.any(other != found)


def test_the_share_of_channels_is_the_probability():
    model = NETS["nnx"]()
    stochastic = interop.stochastic_norm(model, 0.3)
    outputs = lambda key: stochastic.apply(model.params, model.extra, X, key=key, train=True)[0]
    every = jax.vmap(outputs)(jax.random.split(jax.random.key(0), 200))
    running, _ = by_hand(model.extra["bn"])
    assert np.isclose(every, running, atol=1e-4).all((1, 2)).mean() == pytest.approx(0.3, abs=0.02)


def test_the_ends_are_plain_training_and_plain_inference(net):
    at = lambda probability, train, model=net: interop.stochastic_norm(model, probability).apply(
        net.params, net.extra, X, key=jax.random.key(0), train=train
    )
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    plain = net.apply(net.params, net.extra, X, train=True)
    same(at(0.0, True), plain)
    same(at(0.0, True, interop.stochastic_norm(net, 1.0)), plain)  # the outermost counts
    still = net.apply(net.params, net.extra, X)
    np.testing.assert_allclose(at(1.0, True)[0], still[0], atol=1e-5)
    same(at(1.0, True)[1], plain[1])
    same(at(0.5, False), still)


def test_norms_outside_of_training_mode_draw_nothing(models, x):
    model = models["nnx"]
    stochastic = interop.stochastic_norm(model, 0.5)
    for train in (False, "head"):
        found = stochastic.apply(model.params, model.extra, x, train=train)
        jax.tree.map(np.testing.assert_array_equal, found, model.apply(model.params, model.extra, x, train=train))


def test_channels_may_be_another_axis():
    model = interop.nnx(nnx.BatchNorm(5, axis=1, rngs=nnx.Rngs(0)))
    stochastic = interop.stochastic_norm(model, 0.5)
    found = stochastic.apply(model.params, model.extra, X, key=jax.random.key(3), train=True)[0]
    still = np.isclose(found, model.apply(model.params, model.extra, X)[0]).all((0, 2))
    moving = np.isclose(found, model.apply(model.params, model.extra, X, train=True)[0]).all((0, 2))
    assert np.all(still | moving) and 0 < still.sum() < 5


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_it_trains_in_a_step_and_is_captured_and_extended(models, x, kind):
    model = interop.stochastic_norm(interop.extend(models[kind], "shift", jnp.zeros(3)), 0.5)
    model = interop.insert(model, "bn", lambda aux, output: output + aux["shift"])
    key = jax.random.key(0)
    outputs, _, captured = model.capture(model.params, model.extra, x, "bn", key=key, train=True)
    np.testing.assert_array_equal(outputs, model.apply(model.params, model.extra, x, key=key, train=True)[0])
    assert captured["bn"].shape == (4, 6, 6, 3)
    tuning, tx = tj.full(), optax.sgd(0.1)
    batch = {"inputs": x, "labels": jnp.arange(4) % 5}
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    state, metrics = step(state, frozen, batch)
    assert bool(metrics["finite"]) and np.any(state.extra["bn"]["mean"] != model.extra["bn"]["mean"])


def test_statistics_are_estimated_as_without_it(net):
    batches = [{"inputs": X[:4]}, {"inputs": X[4:] + 1}]
    found, expected = (
        interop.reestimate_statistics(model, net.params, batches) for model in (interop.stochastic_norm(net, 0.9), net)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_without_a_key_or_a_batch_norm_it_raises(net, models, x):
    with pytest.raises(TransferError, match="draws from its random stream 'stochastic_norm' in training mode, but key"):
        interop.stochastic_norm(net).apply(net.params, net.extra, X, train=True)
    model = interop.stochastic_norm(models["dict"])
    model.apply(model.params, model.extra, x, key=jax.random.key(0))
    with pytest.raises(TransferError, match=r"stochastic_norm\(\) found no BatchNorm of Flax in the model\. Expected"):
        model.apply(model.params, model.extra, x, key=jax.random.key(0), train=True)


@pytest.mark.parametrize(("probability", "shown"), [(1.5, "1.5"), (-0.1, "-0.1"), (True, "True"), ("half", "str")])
def test_a_bad_probability_raises(models, probability, shown):
    with pytest.raises(TransferError, match=rf"stochastic_norm\(\) expects a static number in \[0, 1\], got {shown}\."):
        interop.stochastic_norm(models["nnx"], probability)


def test_it_wants_a_model_of_the_library_and_compares_by_its_probability(models):
    with pytest.raises(TransferError, match=r"stochastic_norm\(\) expects a Model made by transferjax\.interop"):
        interop.stochastic_norm(tj.Model(abs, None, {}, {}))
    one, two, other = (interop.stochastic_norm(models["linen"], p).apply for p in (0.5, 0.5, 0.4))
    assert one == two and one != other
