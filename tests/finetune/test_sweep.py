"""The table of a sweep, its best run, and runs that do not stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune import evaluate_runs, start_runs, sweep_steps

METRICS = {"accuracy": tj.objectives.accuracy, "nll": tj.objectives.negative_log_likelihood}


@pytest.fixture
def recipe(model):
    objective = tj.objectives.cross_entropy(model.apply)
    return lambda hyper: (objective, tj.train("head/**"), optax.sgd(hyper["lr"]))


def run_of(runs, number):
    return jax.tree.map(lambda leaf: leaf[number], runs.states)


def alone(model, recipe, hyper, batches):
    """One run by hand: state, frozen, the metrics of the last step, its tuning."""
    objective, tuning, tx = recipe(hyper)
    state, frozen = tj.init(jax.random.key(hyper["seed"]), model, tuning, tx)
    for state, metrics in tj.fit(tj.make_step(objective, tuning, tx), state, frozen, batches):
        pass
    return state, frozen, metrics, tuning


def test_the_table_says_what_each_run_alone_says(model, recipe, make_batches):
    batches, grid = make_batches(4), {"lr": [0.01, 0.3], "seed": [0, 1]}
    held_out = [*make_batches(2), *make_batches(1, size=3)]
    found = tj.sweep(recipe, grid, model, batches, validation=held_out, metrics=METRICS)
    columns = ("run", "lr", "seed", "loss", "accuracy", "validation/accuracy", "validation/nll", "steps", "finite")
    assert found.report.columns == columns
    for run, cells in enumerate(found.report.to_dicts()):
        hyper = {name: values[run] for name, values in grid.items()}
        state, frozen, metrics, tuning = alone(model, recipe, hyper, batches)
        expected = tj.make_eval(model.apply, METRICS, tuning)(state, frozen, held_out)
        facts = {"run": run, **hyper, "steps": 4, "finite": True}
        assert {name: cells[name] for name in facts} == facts
        np.testing.assert_allclose(cells["loss"], metrics["loss"], rtol=1e-6)
        np.testing.assert_allclose(cells["validation/nll"], expected["nll"], rtol=1e-6)
        np.testing.assert_allclose(cells["validation/accuracy"], expected["accuracy"], rtol=1e-6)


@pytest.mark.parametrize(("rank_by", "highest"), [("loss", False), ("loss", True), ("validation/accuracy", True)])
def test_the_best_run_is_the_one_that_is_asked_for(model, recipe, make_batches, rank_by, highest, bits):
    grid = {"lr": [0.0, 0.3, 0.1], "seed": [0, 1, 2]}
    batches = make_batches(3)
    found = tj.sweep(
        recipe, grid, model, batches, validation=lambda: batches, metrics=METRICS, rank_by=rank_by, highest=highest
    )
    column = found.report.column(rank_by)
    best = column.index((max if highest else min)(column))
    assert found.hyper == {"lr": grid["lr"][best], "seed": best} and found.report.metadata["best run"] == best
    assert bits(found.state) == bits(jax.tree.map(lambda leaf: leaf[best], found.runs.states))
    _, tuning, _ = recipe(found.hyper)
    tuned = tuning.merge(found.state.trainable, found.frozen)
    assert tuned["stem"]["kernel"] is model.params["stem"]["kernel"]


def test_a_run_that_is_not_finite_keeps_its_last_state_and_the_others_go_on(model, make_batches, bits):
    """The loss of the middle run is NaN from its third step on."""
    inner = tj.objectives.cross_entropy(model.apply)

    def objective(bad, params, extra, batch, key, train):
        loss = inner(params, extra, batch, key, train)
        return loss._replace(value=jnp.where(bad * batch["number"] >= 2, jnp.nan, 1.0) * loss.value)

    recipe = lambda h: (jax.tree_util.Partial(objective, h["bad"]), tj.train("head/**"), optax.adam(0.1))
    batches = [{**batch, "number": np.float32(n)} for n, batch in enumerate(make_batches(5))]
    batches[4]["number"] = np.float32(0)  # finite again, but the run has stopped
    grid = {"bad": [0, 1, 0], "seed": [0, 1, 2]}
    found = tj.sweep(recipe, grid, model, batches, validation=batches, metrics=METRICS)
    assert found.report.column("finite") == [True, False, True]
    assert found.report.column("steps") == [5, 2, 5]
    assert [loss is None for loss in found.report.column("loss")] == [False, True, False]
    assert all(np.isfinite(found.report.column("validation/nll")))
    assert found.hyper["seed"] != 1
    for run, steps in enumerate([5, 2, 5]):
        state = alone(model, recipe, {"bad": 0, "seed": run}, batches[:steps])[0]
        mine = run_of(found.runs, run)
        for path, leaf in tj.paths({"t": state.trainable, "o": state.opt_state}).items():
            other = tj.paths({"t": mine.trainable, "o": mine.opt_state})[path]
            np.testing.assert_allclose(other, leaf, rtol=1e-5, atol=1e-7, err_msg=path)


def test_no_run_stays_finite(model, make_batches):
    inner = tj.objectives.cross_entropy(model.apply)
    objective = lambda *arguments: inner(*arguments)._replace(value=jnp.nan)
    recipe = lambda hyper: (objective, tj.train("head/**"), optax.sgd(hyper["lr"]))
    with pytest.raises(tj.NonFiniteError, match=r"none of 2 runs stayed finite. Expected at least one"):
        tj.sweep(recipe, {"lr": [0.1, 0.2], "seed": [0, 0]}, model, make_batches(1))


def test_one_key_for_all_runs(model, make_batches):
    objective = tj.objectives.cross_entropy(model.apply)
    recipe = lambda hyper: (objective, tj.lora("head/kernel", 1), optax.sgd(hyper["lr"]))
    found = tj.sweep(recipe, {"lr": [0.1, 0.2]}, model, make_batches(1), key=jax.random.key(3))
    expected = tj.init(jax.random.key(3), model, *recipe({"lr": 0.1})[1:])[0].trainable["head"]["kernel"]["lora_a"]
    assert found.runs.states.trainable["head"]["kernel"]["lora_a"].shape == (2, *expected.shape)


def test_what_cannot_be_ranked_or_measured(model, recipe, make_batches):
    grid, batches = {"lr": [0.1], "seed": [0]}, make_batches(1)
    with pytest.raises(tj.TransferError, match=r"no column 'validation/acuracy' to rank by. Nearest: accuracy"):
        tj.sweep(recipe, grid, model, batches, rank_by="validation/acuracy", highest=True)
    with pytest.raises(tj.TransferError, match=r"sweep\(\) expects both validation batches and metrics, or neither"):
        tj.sweep(recipe, grid, model, batches, validation=batches)
    for runs, _ in sweep_steps(start_runs(recipe, grid, model), batches):
        weightless = [{**batches[0], "weight": np.zeros(4, np.float32)}]
        with pytest.raises(tj.DataError, match=r"got no validation example that counts"):
            evaluate_runs(runs, model.apply, METRICS, weightless)
        with pytest.raises(tj.DataError, match=r"got no validation example that counts"):
            evaluate_runs(runs, model.apply, METRICS, [])
