"""Every tuning on every network: the lifted form and the hoisted parts are the objective on merged weights."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax._context import tracing_step
from transferjax.finetune import training_mode
from transferjax.program import lift

from .networks import NETWORKS, QUICK, TUNINGS, made, network, quantised

close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


def moved(tree):
    """Weights away from their beginnings, most of which are zeros or ones."""
    rng = np.random.default_rng(0)
    shift = lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype)
    return jax.tree.map(shift, tree)


def check(name, tuning, *, train=None, lowers=False):
    """Loss, metrics, extra and gradients: merged, lifted, and in two parts."""
    model, batch = network(name)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, optax.sgd(0.1), train=train)
    key = jax.random.key(1)
    state, frozen = jax.eval_shape(
        lambda params: tj.init(key, model._replace(params=params), tuning, step.tx), model.params
    )
    hoisted = tj.hoist(step, state, frozen, batch)
    begin = jax.jit(tuning.init).lower(key, model.params).compile(QUICK)
    trainable, frozen = begin(key, model.params)
    trainable = moved(trainable)
    train = training_mode(tuning, trainable, frozen) if train is None else train

    def whole(params, extra):
        return step.objective(params, extra, batch, key, train)

    def run(trainable, frozen, extra):
        residual = hoisted.prefix.run(frozen, extra, step.objective, batch)
        forms = {
            "merged": lambda trainable: whole(tuning.merge(trainable, frozen), extra),
            "hoisted": lambda trainable: hoisted.suffix(
                trainable, hoisted.keep(frozen), extra, step.objective, residual, key
            ),
        }
        if tuning.lifted is not None:
            forms["lifted"] = lambda trainable: lift(whole)(tuning.lifted(trainable, frozen), extra)
        with tracing_step(3):
            slopes = {form: jax.value_and_grad(aux(one), has_aux=True) for form, one in forms.items()}
            return {form: slope(trainable) for form, slope in slopes.items()}

    traced = jax.jit(run).trace(trainable, frozen, model.extra)
    if lowers:
        assert traced.lower(lowering_platforms=("cuda", "tpu"))
    found = traced.lower().compile(QUICK)(trainable, frozen, model.extra)
    expected = tj.paths(found.pop("merged"))
    for form, values in found.items():
        own = tj.paths(values)
        assert own.keys() == expected.keys()
        for path, value in own.items():
            scale = float(jnp.max(jnp.abs(expected[path]), initial=0.0))
            close(value, expected[path], atol=1e-5 * scale + 1e-7, err_msg=f"{form}: {path}")
    return hoisted, found


def aux(function):
    def loss(trainable):
        result = function(trainable)
        return result.value, (result.metrics, result.extra)

    return loss


def cases(kinds, chosen):
    """Every combination, of which those are not slow whose tuning and network have chosen numbers."""
    found = []
    for (i, tuning), (j, name), (n, kind) in itertools.product(*map(enumerate, (TUNINGS, NETWORKS, kinds))):
        marks = () if chosen(i, j) and n == i // 2 % len(kinds) else pytest.mark.slow
        found.append(pytest.param(name, tuning, kind, marks=marks, id="-".join(filter(None, (name, tuning, kind)))))
    return found


EARLY = ("full", "bias_only", "norm_only", "lora", "chain")
"""These train something in front of the first product of some network."""


def covering(i, j):
    """Two networks for each tuning and at least four tunings for each network, mostly those that compile fast."""
    cheap = (0, 3, 5)
    return j == cheap[i % 3] or j == (cheap[(i + 1) % 3], 1, 2, 4)[i % 4 if i < 16 else 0]


@pytest.mark.parametrize("name, tuning, kind", cases([None], covering))
def test_every_tuning_on_every_network(name, tuning, kind):
    hoisted, _ = check(name, made(tuning, name), train=False if name == "NNX BERT" else None)
    assert tuning in EARLY or any(part.startswith("hoisted_") for part in hoisted.cut)


@pytest.mark.parametrize(
    "name, tuning, kind", cases(["int8", "nf4"], lambda i, j: j == (0, 3, 5)[i // 3 % 3] and i % 3 == 2)
)
def test_every_tuning_on_every_quantised_network(name, tuning, kind):
    few = quantised(kind, made(tuning, name), network(name)[0].params)
    assert (few is None) == (tuning == "full")
    if few is not None:
        assert "lifted" in check(name, few, train=False, lowers=True)[1]
