"""A run of a sweep is the run that make_step makes of the same hyperparameters, for every tuning and framework."""

import jax
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune import _over_runs, start_runs, sweep_steps

from .eight_devices import check

TUNINGS = {
    "full": lambda: tj.full(),
    "train": lambda: tj.train("head/**"),
    "bias_only": lambda: tj.bias_only(),
    "lora": lambda: tj.lora("head/kernel", 2),
    "chain": lambda: tj.chain(head=tj.train("head/**"), lora=tj.lora("stem/kernel", 1), norm=tj.norm_only()),
}
GRID = {"lr": [1e-2, 3e-2], "decay": [0.0, 0.1], "seed": [4, 5]}


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch):
    """As the CPU runs larger networks."""
    monkeypatch.setattr(_over_runs, "SMALL", -1)


def recipe_of(model, tuning):
    objective = tj.objectives.cross_entropy(model.apply)
    tx = lambda hyper: optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(hyper["lr"], weight_decay=hyper["decay"])
    )
    return lambda hyper: (objective, tuning, tx(hyper))


def run_of(runs, number):
    return jax.tree.map(lambda leaf: leaf[number], runs.states)


def same_as_alone(recipe, model, batch, numbers=(1,), **options):
    """Three steps on one batch: every leaf of these runs, the keys to the bit."""
    for runs, metrics in sweep_steps(start_runs(recipe, GRID, model, **options), [batch] * 3):
        pass
    assert runs.jitted._cache_size() == 1
    for number in numbers:
        hyper = {name: values[number] for name, values in GRID.items()}
        objective, tuning, tx = recipe(hyper)
        state, frozen = tj.init(jax.random.key(hyper["seed"]), model, tuning, tx)
        step = tj.make_step(objective, tuning, tx, **options)
        for state, expected in tj.fit(step, state, frozen, [batch] * 3):
            pass
        mine = tj.paths(run_of(runs, number))
        assert list(mine) == list(tj.paths(state))
        for path, leaf in tj.paths(state).items():
            if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                assert mine[path] == leaf
            else:
                assert mine[path].dtype == leaf.dtype
                np.testing.assert_allclose(mine[path], leaf, rtol=1e-4, atol=2e-6, err_msg=path)
        np.testing.assert_allclose(metrics["loss"][number], expected["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", TUNINGS)
def test_every_tuning(name, dict_model, batch):
    same_as_alone(recipe_of(dict_model, TUNINGS[name]()), dict_model, batch)


def test_a_padded_rank(dict_model, batch):
    """Each run against one of `make_step` whose shapes are those of its own rank."""
    objective = tj.objectives.cross_entropy(dict_model.apply)
    grid = {"lr": [3e-2, 1e-2, 3e-2], "decay": [0.1, 0.0, 0.1], "rank": [2, 4, 1], "seed": [4, 5, 6]}
    tx = lambda hyper: optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(hyper["lr"], weight_decay=hyper["decay"])
    )
    lora = lambda rank, **options: tj.lora("blocks/1/kernel", rank, alpha=3.0, **options)
    recipe = lambda hyper: (objective, lora(hyper["rank"], max_rank=4), tx(hyper))
    for runs, metrics in sweep_steps(start_runs(recipe, grid, dict_model), [batch] * 3):
        pass
    assert runs.jitted._cache_size() == 1
    for number in (0, 2):
        hyper = {name: values[number] for name, values in grid.items()}
        state, frozen = tj.init(jax.random.key(hyper["seed"]), dict_model, lora(hyper["rank"]), tx(hyper))
        for state, expected in tj.fit(
            tj.make_step(objective, lora(hyper["rank"]), tx(hyper)), state, frozen, [batch] * 3
        ):
            pass
        np.testing.assert_allclose(metrics["loss"][number], expected["loss"], rtol=1e-5)
        mine = tj.paths(run_of(runs, number).trainable)
        for path, leaf in tj.paths(state.trainable).items():
            own = mine[path][tuple(map(slice, leaf.shape))]
            np.testing.assert_allclose(own, leaf, rtol=1e-4, atol=2e-6, err_msg=path)
            assert np.count_nonzero(mine[path]) == np.count_nonzero(own), "nothing grows beyond the rank"


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_every_framework(framework, batch, request):
    model = request.getfixturevalue(f"{framework}_model")
    same_as_alone(recipe_of(model, TUNINGS["chain"]()), model, batch, numbers=(0, 1))


def test_runs_side_by_side_as_on_an_accelerator(nnx_model, batch, monkeypatch):
    monkeypatch.setattr(_over_runs, "SMALL", 1 << 25)
    same_as_alone(recipe_of(nnx_model, TUNINGS["chain"]()), nnx_model, batch)


def test_accumulation(dict_model, batch):
    batch["weight"] = np.linspace(0.0, 2.0, 8, dtype=np.float32)
    same_as_alone(recipe_of(dict_model, tj.train("head/**")), dict_model, batch, accumulate=4)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_every_sweep_lowers_for_accelerators(platform, model, batch):
    recipe = recipe_of(model, TUNINGS["chain"]())
    for runs, _ in sweep_steps(start_runs(recipe, GRID, model), [batch]):
        pass
    traced = runs.jitted.trace(runs.hyper, runs.held, runs.states, runs.frozen, batch, runs.finite, runs.steady)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.convolution" in text and "stablehlo.while" not in text


PROGRAM = """
params = {"stem": normal(6, 8), "head": normal(8, 3)}
batch = {"inputs": normal(32, 6), "labels": rng.integers(0, 3, 32)}

def apply(params, extra, inputs, *, key=None, train=False):
    hidden = jnp.tanh(inputs @ params["stem"])
    mean = hidden.mean(0)
    return (hidden - mean) @ params["head"], {"mean": 0.9 * extra["mean"] + 0.1 * mean}

def run(place, batches):
    tuning = tj.chain(head=tj.train("head"), lora=tj.lora("stem", 2))
    objective = tj.objectives.cross_entropy(apply)
    recipe = lambda hyper: (objective, tuning, optax.adamw(hyper["lr"]))
    model = tj.Model(apply, None, place(params), place({"mean": np.zeros(8, "f")}))
    found = tj.sweep(recipe, {"lr": [0.1, 0.01, 0.03], "seed": [0, 1, 2]}, model, batches,
                     validation=batches, metrics={"accuracy": tj.objectives.accuracy})
    assert found.runs.jitted._cache_size() == 1
    return found

one, eight = run(on_one, [batch] * 2), run(on_eight, [jax.device_put(batch, data)] * 2)
assert one.hyper == eight.hyper
trees = lambda found: (found.runs.states.trainable, found.runs.states.extra)
spread(*trees(eight))
agree(tj.paths(trees(one)), tj.paths(trees(eight)))
"""


def test_a_sweep_on_eight_devices_equals_one():
    check(PROGRAM)
