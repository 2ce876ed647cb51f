"""A sweep over residuals finds what the sweep over batches finds, at the cost of what learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj


def apply(params, extra, inputs, *, key=None, train=False):
    return jnp.tanh(inputs @ params["stem"]) @ params["head"], extra


@pytest.fixture
def parts():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"head": jax.random.normal(keys[0], (5, 2)), "stem": jax.random.normal(keys[1], (7, 5))}
    model = tj.Model(apply, None, params, {})
    inputs, labels = jax.random.normal(keys[2], (8, 7)), jax.random.randint(keys[3], 8, 0, 2)

    def recipe(hyper):
        return tj.objectives.cross_entropy(apply), tj.train("head"), optax.adam(hyper.get("lr", 0.1))

    objective, tuning, tx = recipe({})
    state, frozen = tj.init(keys[0], model, tuning, tx)
    batch = {"inputs": inputs, "labels": labels, "id": jnp.arange(8)}
    hoisted = tj.hoist(tj.make_step(objective, tuning, tx), state, frozen, batch)
    return recipe, model, hoisted, batch, hoisted.prefix(frozen, state.extra, objective, batch)


def test_runs_on_residuals_are_the_runs_on_batches(parts):
    recipe, model, hoisted, batch, residual = parts
    grid = {"lr": [0.01, 0.1, 1.0], "seed": [0, 0, 0]}
    options = {"validation": [batch], "metrics": {"accuracy": tj.objectives.accuracy}}
    plain = tj.sweep(recipe, grid, model, [batch] * 3, **options)
    apart, for_validation = tj.finetune.hoisted_recipe(recipe, hoisted, model)
    found = tj.sweep(apart, grid, for_validation, [residual] * 3, **options)
    assert found.hyper == plain.hyper and found.report.columns == plain.report.columns
    for ours, theirs in zip(found.report.rows, plain.report.rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(found.runs.states), jax.tree.leaves(plain.runs.states), strict=True):
        if jnp.issubdtype(ours.dtype, jnp.floating):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_step_does_not_read_the_inputs(parts):
    recipe, model, hoisted, _, residual = parts
    assert "inputs" not in residual
    apart, for_validation = tj.finetune.hoisted_recipe(recipe, hoisted, model)
    runs = tj.finetune.start_runs(apart, {"lr": [0.1, 0.2], "seed": [0, 0]}, for_validation)
    [(runs, metrics)] = tj.finetune.sweep_steps(runs, [residual])
    assert np.isfinite(np.asarray(metrics["loss"])).all()


def test_what_is_not_hoisted_says_what_to_write(parts):
    recipe, model, *_ = parts
    with pytest.raises(tj.TransferError, match=r"hoisted_recipe\(\) expects a Hoisted second, got .*: write tj.hoist"):
        tj.finetune.hoisted_recipe(recipe, "hoisted", model)
