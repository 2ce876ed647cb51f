"""What the adapters are compared with: peft's own forward pass, gradients and merged weights, from a small file."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "adapters" / "peft.npz"
PEFT = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def stored():
    with np.load(FIXTURE) as file:
        return dict(file)


def below(prefix):
    return {name.removeprefix(f"{prefix}/"): value for name, value in stored().items() if name.startswith(f"{prefix}/")}


def ours(weight):
    """A torch weight as a Flax kernel; vectors stay."""
    return {2: lambda w: w.T, 4: lambda w: w.transpose(2, 3, 1, 0)}.get(weight.ndim, lambda w: w)(weight)


def network(weights):
    """``fc1.weight`` as ``{"fc1": {"kernel": ...}}``."""
    out = {}
    for name, weight in weights.items():
        module, leaf = name.split(".")
        out.setdefault(module, {})["kernel" if leaf == "weight" else leaf] = jnp.asarray(ours(weight))
    return out


def dense(params, x):
    hidden = jnp.tanh(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    return hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"]


def conv(params, x):
    x = x.transpose(0, 2, 3, 1)
    out = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return (out + params["conv"]["bias"]).transpose(0, 3, 1, 2)


def adapters(tree, part, method, names):
    """A trainable tree with peft's values.

    ``names`` is ``{our name: (peft's name, function to our layout)}``, or one of these per module.
    """
    values = below(f"{part}/{method}/{tree}")
    out = {}
    for module in {name.split(".")[0] for name in values}:
        found = {
            name: jnp.asarray(np.ascontiguousarray(to(values[f"{module}.{theirs}"])))
            for name, (theirs, to) in names.get(module, names).items()
            if f"{module}.{theirs}" in values
        }
        assert len(found) == sum(name.startswith(f"{module}.") for name in values)
        out[module] = found
    return out


def check_against_peft(part, method, tuning, names):
    base = network(below(f"{part}/base"))
    fresh, frozen = tuning.init(jax.random.key(0), base)
    weights = adapters("weights", part, method, names)
    trainable = {m: {**fresh[m], "kernel": weights[m]} for m in fresh}
    assert jax.tree.map(jnp.shape, trainable) == jax.tree.map(jnp.shape, fresh)

    forward = {"dense": dense, "conv": conv}[part]
    x, cotangent = stored()[f"{part}/input"], stored()[f"{part}/cotangent"]

    def value(trainable):
        merged = tuning.merge(trainable, frozen)
        output = forward(merged, x)
        return jnp.sum(output * cotangent), (merged, output)

    as_precise = {"xla_backend_optimization_level": 3}
    differentiate = jax.jit(jax.grad(value, has_aux=True), compiler_options=as_precise)
    gradients, (merged, output) = differentiate(trainable)
    np.testing.assert_allclose(output, stored()[f"{part}/{method}/output"], **PEFT)
    expected = network(below(f"{part}/{method}/merged"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **PEFT), merged, expected)
    theirs = adapters("gradients", part, method, names)
    found = {m: gradients[m]["kernel"] for m in gradients}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, theirs)


@pytest.fixture
def against_peft():
    """``(part, method, tuning, names)``: forward pass, gradients and merged weights equal peft's."""
    return check_against_peft


@pytest.fixture
def peft():
    """``prefix -> {name: array}`` of the file."""
    return below
