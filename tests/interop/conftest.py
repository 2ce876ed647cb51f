"""One small network in three forms: convolution, BatchNorm, dropout, linear head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from transferjax import interop

SHAPE = (4, 6, 6, 2)


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(3, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x)))
        return self.head(self.dropout(x.mean((1, 2))))


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(3, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(momentum=0.9, use_running_average=not train, name="bn")(x))
        x = nn.Dropout(0.5, name="dropout")(x.mean((1, 2)), deterministic=not train)
        return nn.Dense(5, name="head")(x)


def dict_cnn(params, extra, x, *, key):
    x = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x, statistics = batch_norm(params["bn"], extra["bn"], interop.mark("conv", x + params["conv"]["bias"]))
    x = jax.nn.relu(x).mean((1, 2))
    if interop.training("dropout"):
        x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)
    x = interop.mark("dropout", x)
    return interop.mark("head", x @ params["head"]["kernel"] + params["head"]["bias"]), {"bn": statistics}


def batch_norm(params, statistics, x):
    mean, var = statistics["mean"], statistics["var"]
    if interop.training("bn"):
        m = interop.momentum_in_use(0.9)
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        statistics = {"mean": m * statistics["mean"] + (1 - m) * mean, "var": m * statistics["var"] + (1 - m) * var}
    x = (x - mean) * jax.lax.rsqrt(var + 1e-5) * params["scale"] + params["bias"]
    return interop.mark("bn", x), statistics


def make(kind):
    if kind == "nnx":
        return interop.nnx(NnxCNN(nnx.Rngs(0)))
    if kind == "linen":
        module = LinenCNN()
        return interop.linen(module, module.init(jax.random.key(0), jnp.ones(SHAPE), False))
    source = make("nnx")
    return interop.pure(dict_cnn, source.params, source.extra)


@pytest.fixture(scope="session")
def models():
    return {kind: make(kind) for kind in ("nnx", "linen", "dict")}


@pytest.fixture(params=["nnx", "linen", "dict"])
def model(request, models):
    return models[request.param]


@pytest.fixture(scope="session")
def x():
    return jax.random.normal(jax.random.key(1), SHAPE) * 2 + 1


@pytest.fixture(scope="session")
def key():
    return jax.random.key(2)
