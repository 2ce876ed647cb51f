"""Scans whose turns are computed again: equal values and gradients, fewer stacked residuals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune import remat_scans
from transferjax.finetune._remat import has_scan

BATCH = {"inputs": np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4), "labels": np.zeros((6, 4), np.float32)}


def turn(x, w):
    return jnp.tanh(x @ w + x), jnp.mean(x)


def apply_with(body):
    def apply(params, extra, x, *, key=None, train=False):
        x, means = jax.jit(lambda x: jax.lax.scan(body, x, params["layers"], reverse=True))(x)
        return x + jnp.sum(means), extra

    return apply


PARAMS = {"layers": jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4)).astype(np.float32))}


def test_values_and_gradients_are_equal():
    objective = tj.objectives.mean_squared_error(apply_with(turn))
    value = lambda objective: jax.value_and_grad(lambda p: objective(p, {}, BATCH, None, True).value)(PARAMS)
    (plain, gradient), (again, same) = value(objective), value(remat_scans(objective))
    np.testing.assert_allclose(again, plain, rtol=1e-6)
    np.testing.assert_allclose(same["layers"], gradient["layers"], rtol=1e-5, atol=1e-7)


def residuals(body, wrap):
    """The stacked arrays that the scans of a gradient hand over."""
    objective = wrap(tj.objectives.mean_squared_error(apply_with(body)))
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: objective(p, {}, BATCH, None, True).value))(PARAMS)
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan":
                found.append(sum(v.aval.shape[:2] == (5, 6) for v in eqn.outvars))
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                walk(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") else None

    walk(jaxpr.jaxpr)
    return max(found)


def test_only_what_enters_a_turn_is_stacked():
    wide = lambda x, w: (jnp.tanh(jnp.sin(x @ w) * jnp.cos(x)), jnp.mean(x))
    assert residuals(wide, lambda objective: objective) > 2
    assert residuals(wide, remat_scans) == 1


def test_a_step_takes_the_objective():
    apply = apply_with(turn)
    model, tuning, tx = tj.Model(apply, None, PARAMS, {}), tj.full(), optax.sgd(0.1)
    objective = tj.objectives.mean_squared_error(apply)
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    plain, _ = tj.make_step(objective, tuning, tx)(tj.copy(state), frozen, BATCH)
    again, _ = tj.make_step(remat_scans(objective), tuning, tx)(state, frozen, BATCH)
    np.testing.assert_allclose(again.trainable["layers"], plain.trainable["layers"], rtol=1e-5)


def test_a_plain_function_is_an_objective_too():
    def objective(params, extra, batch, key, train):
        return tj.Loss(jnp.sum(params["layers"]), {}, extra)

    assert remat_scans(objective)(PARAMS, {}, BATCH, None, False).value == jnp.sum(PARAMS["layers"])


def test_whether_there_is_a_scan_to_change():
    program = lambda body: jax.make_jaxpr(lambda x, w: jax.lax.scan(body, x, w))(jnp.ones((6, 4)), PARAMS["layers"])
    assert has_scan(program(turn))
    assert not has_scan(program(jax.checkpoint(turn)))
    assert not has_scan(jax.make_jaxpr(jnp.sin)(1.0))


def test_what_cannot_be_called_is_no_objective():
    with pytest.raises(tj.TransferError, match="objective"):
        remat_scans(3)
