"""The members over which the laws run: one small network as plain dicts, in NNX and in Linen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj

CLASSES = 3


def _normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[:-1]) or 1))


@pytest.fixture(scope="session")
def dict_model():
    """conv -> layer norm -> two blocks -> head, on images [B, 5, 5, 2]; `extra` counts the calls in training."""
    rng = np.random.default_rng(0)
    params = {
        "stem": {"kernel": _normal(rng, 3, 3, 2, 4)},
        "norm": {"scale": jnp.ones(4), "bias": _normal(rng, 4)},
        "blocks": {str(i): {"kernel": _normal(rng, 4, 4), "bias": _normal(rng, 4)} for i in range(2)},
        "head": {"kernel": _normal(rng, 4, CLASSES), "bias": jnp.zeros(CLASSES)},
    }

    def apply(params, extra, inputs, *, key=None, train=False):
        x = jax.lax.conv_general_dilated(
            inputs, params["stem"]["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3)
        x = x * params["norm"]["scale"] + params["norm"]["bias"]
        for name in ("0", "1"):
            x = x + jnp.tanh(x @ params["blocks"][name]["kernel"] + params["blocks"][name]["bias"])
        calls = extra["calls"] + (1 if train is not False else 0)
        return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], {"calls": calls}

    return tj.Model(apply, None, params, {"calls": jnp.zeros((), jnp.int32)})


@pytest.fixture(scope="session")
def nnx_model():
    """conv -> BatchNorm -> relu -> mean -> head in Flax NNX."""
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(2, 4, (3, 3), strides=(2, 2), use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
            self.head = nnx.Linear(4, CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.stem(x))).mean((1, 2)))

    return tj.interop.nnx(Network(nnx.Rngs(0)))


@pytest.fixture(scope="session")
def linen_model():
    """The same in Flax Linen."""
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.Conv(4, (3, 3), strides=(2, 2), use_bias=False, name="stem")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
            return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))

    module = Network()
    return tj.interop.linen(module, module.init(jax.random.key(0), jnp.ones((1, 5, 5, 2))))


@pytest.fixture(params=["dict", "nnx", "linen"])
def model(request):
    return request.getfixturevalue(f"{request.param}_model")


@pytest.fixture
def batch():
    """Eight images [8, 5, 5, 2] with labels in [0, 3) and ids."""
    rng = np.random.default_rng(1)
    return {
        "inputs": rng.normal(size=(8, 5, 5, 2)).astype(np.float32),
        "labels": rng.integers(0, CLASSES, 8),
        "id": np.arange(8),
    }
