"""Grids, random draws and successive halving."""

import jax
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune import (
    grid_search,
    log_uniform,
    random_search,
    start_runs,
    successive_halving,
    sweep_steps,
    uniform,
)


def test_every_combination():
    assert grid_search(a=[1, 2], b=np.array([3.0]), c=[4, 5]) == {
        "a": [1, 1, 2, 2],
        "b": [3.0, 3.0, 3.0, 3.0],
        "c": [4, 5, 4, 5],
    }


def test_draws_follow_their_distribution():
    draws = log_uniform(1e-4, 1e-2)(jax.random.key(0), 4000)
    assert draws.min() >= 1e-4 and draws.max() < 1e-2
    assert abs(np.mean(draws < 1e-3) - 0.5) < 0.03
    draws = uniform(-1.0, 3.0)(jax.random.key(0), 4000)
    assert draws.min() >= -1.0 and draws.max() < 3.0 and abs(np.mean(draws) - 1.0) < 0.1


def test_the_draws_of_a_name_do_not_depend_on_other_names():
    key = jax.random.key(1)
    one = random_search(key, 5, lr=log_uniform(1e-4, 1e-2))
    two = random_search(key, 5, decay=uniform(0, 1), lr=log_uniform(1e-4, 1e-2), seed=7)
    assert one["lr"] == two["lr"] and len(set(one["lr"])) == 5
    assert one["seed"] == [0, 1, 2, 3, 4] and two["seed"] == [7] * 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid_search(lr=0.1), r"grid_search\(\) expects a list of numbers for 'lr', got float"),
        (lambda: grid_search(lr=[]), r"grid_search\(\) expects a list of numbers for 'lr', got list"),
        (lambda: uniform(1.0, 1.0), r"uniform\(\) expects low below high, got 1.0 and 1.0"),
        (lambda: log_uniform(0.0, 1.0), r"log_uniform\(\) expects 0 < low < high, got 0.0 and 1.0"),
        (
            lambda: random_search(jax.random.key(0), 0),
            r"random_search\(\) expects a whole number of at least 1 as",
        ),
        (
            lambda: random_search(jax.random.key(0), 3, lr=lambda key, count: np.zeros(2)),
            r"random_search\(\) expects \(3,\) values of 'lr', its distribution gave \(2,\)",
        ),
    ],
)
def test_what_is_no_grid(call, message):
    with pytest.raises(tj.TransferError, match=message):
        call()


@pytest.fixture
def recipe(model):
    objective = tj.objectives.cross_entropy(model.apply)
    return lambda hyper: (objective, tj.train("head/**"), optax.adam(hyper["lr"]))


GRID = {"lr": [0.1, 0.0, 0.03, 1e-4, 0.05], "seed": [0, 1, 2, 3, 4]}


def test_halving_is_a_sweep_whose_worse_runs_stop(model, recipe, make_batches):
    batches = make_batches(6)
    found = successive_halving(recipe, GRID, model, iter(batches), rungs=[2, 1, 3])
    rows = found.report.to_dicts()
    counts = {rung: sum(row["rung"] >= rung for row in rows) for rung in range(3)}
    assert counts == {0: 5, 1: 3, 2: 2}
    assert [row["steps"] for row in rows] == [[2, 3, 6][row["rung"]] for row in rows]
    survivors = [row["run"] for row in rows if row["rung"] == 2]
    losses = {}
    for step, (runs, metrics) in enumerate(sweep_steps(start_runs(recipe, GRID, model), batches), 1):
        losses[step] = np.asarray(metrics["loss"])
    assert set(np.argsort(losses[2])[:3]) == {row["run"] for row in rows if row["rung"] >= 1}
    for row in rows:
        np.testing.assert_allclose(row["loss"], losses[row["steps"]][row["run"]], rtol=1e-5)
    best = min(survivors, key=lambda run: losses[6][run])
    assert found.hyper == {name: values[best] for name, values in GRID.items()}
    for path, leaf in tj.paths(found.state.trainable).items():
        np.testing.assert_allclose(leaf, tj.paths(runs.states.trainable)[path][best], rtol=1e-5, atol=1e-7)


def test_halving_by_validation(model, recipe, make_batches):
    batches, metrics = make_batches(3), {"nll": tj.objectives.negative_log_likelihood}
    found = successive_halving(
        recipe, GRID, model, batches, rungs=[1, 2], keep=0.2, validation=batches, metrics=metrics,
        rank_by="validation/nll",
        highest=False,
    )  # fmt: skip
    rows = found.report.to_dicts()
    assert [row["run"] for row in rows if row["rung"] == 1] == [GRID["lr"].index(found.hyper["lr"])]
    first = [row["validation/nll"] for row in rows if row["rung"] == 0]
    assert len(first) == 4 and all(value is not None for value in first)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rungs": []}, tj.TransferError, r"expects rungs as a list of whole numbers of steps, got \[\]: write"),
        ({"rungs": [0]}, tj.TransferError, r"expects rungs as a list of whole numbers of steps, got \[0\]"),
        ({"rungs": [1], "keep": 1.0}, tj.TransferError, r"expects keep as a fraction between 0 and 1, got 1.0"),
        ({"rungs": [2, 1]}, tj.DataError, r"got 2 batches; expected 3, one per step of the rungs \[2, 1\]"),
        (
            {"rungs": [1], "metrics": {}},
            tj.TransferError,
            r"successive_halving\(\) expects both validation batches",
        ),
    ],
)
def test_what_cannot_be_halved(arguments, error, message, model, recipe, make_batches):
    with pytest.raises(error, match=message):
        successive_halving(recipe, GRID, model, make_batches(2), **arguments)
