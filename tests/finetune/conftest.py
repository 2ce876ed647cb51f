"""A small regression network, its batches, and how to compare states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj


@pytest.fixture(scope="session")
def model():
    """x -> tanh(x @ stem) @ head on inputs [B, 3]; `extra` keeps the mean of the inputs seen in training."""
    rng = np.random.default_rng(0)
    params = {
        "stem": {"kernel": jnp.asarray(rng.normal(size=(3, 4)).astype(np.float32))},
        "head": {"kernel": jnp.asarray(rng.normal(size=(4, 2)).astype(np.float32)), "bias": jnp.zeros(2)},
    }

    def apply(params, extra, inputs, *, key=None, train=False):
        hidden = jnp.tanh(inputs @ params["stem"]["kernel"])
        seen = extra["seen"] if train is False else 0.5 * extra["seen"] + 0.5 * inputs.mean()
        return hidden @ params["head"]["kernel"] + params["head"]["bias"], {"seen": seen}

    return tj.Model(apply, None, params, {"seen": jnp.zeros(())})


@pytest.fixture(scope="session")
def make_batches():
    """`make_batches(n)`: n batches of 4 examples with ids 100, 101, ..."""

    def make(count, size=4):
        rng = np.random.default_rng(1)
        return [
            {
                "inputs": rng.normal(size=(size, 3)).astype(np.float32),
                "labels": rng.integers(0, 2, size),
                "id": 100 + size * number + np.arange(size),
            }
            for number in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def bits():
    """A tree as bytes, leaf by leaf, by path."""

    def one(leaf):
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        return np.asarray(leaf).tobytes()

    return lambda tree: {path: one(leaf) for path, leaf in tj.paths(tree).items()}
