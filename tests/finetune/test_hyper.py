"""What the hyperparameters of a sweep may be."""

import jax
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune._hyper import built, columns, keys_of, row


def test_a_grid_is_a_table_of_numbers():
    table = columns({"lr": [1e-3, 1e-4], "seed": np.array([3, 4])})
    assert row(table, 1) == {"lr": 1e-4, "seed": 4}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (None, r"expects a dict of hyperparameters second, one value per run; got NoneType"),
        ({}, r"expects a dict of hyperparameters second, one value per run; got an empty one"),
        (
            {"lr": [1.0, 2.0], "wd": [0.1]},
            r"as many values of each hyperparameter as there are runs.*'wd': 1.*grid",
        ),
        ({"lr": 0.1}, r"expects the values of 'lr' as a list of numbers, one per run; got \(\) float64"),
        ({"lr": []}, r"expects the values of 'lr' as a list of numbers"),
        ({"lr": ["a"]}, r"expects the values of 'lr' as a list of numbers"),
        ({"lr": [[1.0], [1.0, 2.0]]}, r"expects the values of 'lr' as a list of numbers"),
        ({"n": [2**31]}, r"expects whole numbers of 32 bits; 'n' holds larger ones"),
        ({"seed": [-1]}, r"expects each 'seed' as a whole number of at least 0; got \[-1\]"),
        ({"seed": [0.5]}, r"expects each 'seed' as a whole number of at least 0"),
    ],
)
def test_what_is_no_table_of_numbers(grid, message):
    with pytest.raises(tj.TransferError, match=message):
        columns(grid)


@pytest.mark.parametrize(
    ("grid", "key", "came"), [({"lr": [1.0]}, None, "neither"), ({"seed": [1]}, jax.random.key(0), "both")]
)
def test_a_run_has_a_seed_or_a_key(grid, key, came):
    with pytest.raises(tj.TransferError, match=f"either a 'seed' in the grid or one key for all runs, got {came}"):
        keys_of(columns(grid), key)


def test_keys_are_those_of_the_seeds():
    keys = keys_of(columns({"seed": [7, 9]}), None)
    assert keys[1] == jax.random.key(9)
    assert all(keys_of(columns({"lr": [1.0, 2.0]}), jax.random.key(5)) == jax.random.key(5))


objective = lambda params, extra, batch, key, train: None


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (objective, r"a recipe returns \(objective, tuning, tx\), got function"),
        (
            (objective, "head/**", optax.sgd(0.1)),
            r"a recipe returns \(objective, tuning, tx\), but its tuning is a",
        ),
        ((objective, tj.full(), 0.1), r"recipe\(\) expects an optax transform, got float"),
        ((None, tj.full(), optax.sgd(0.1)), r"expects an Objective first"),
    ],
)
def test_what_is_no_recipe(made, message):
    with pytest.raises(tj.TransferError, match=message):
        built(lambda hyper: made, {"lr": 0.1})


def test_a_hyperparameter_that_the_grid_lacks_is_named():
    recipe = lambda hyper: (lambda *a: None, tj.full(), optax.sgd(hyper["lr"]))
    with pytest.raises(tj.TransferError, match=r"asks for the hyperparameter 'lr', and the grid has decay, seed\. Add"):
        built(recipe, {"seed": 0, "decay": 0.1})
    with pytest.raises(KeyError, match="seed"):
        built(lambda hyper: {}["seed"], {"seed": 0})
