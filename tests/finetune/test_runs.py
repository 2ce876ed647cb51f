"""K fine-tunings as one program: what is traced, held, shared and refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune import _over_runs, start_runs, sweep_steps
from transferjax.program import cost, measure


@pytest.fixture
def recipe(model):
    objective = tj.objectives.cross_entropy(model.apply)
    return lambda hyper: (objective, tj.train("head/**"), optax.adamw(hyper["lr"]))


def grid(count):
    return {"lr": list(np.geomspace(1e-3, 1e-1, count)), "seed": list(range(count))}


def arguments(runs, batch):
    return runs.hyper, runs.held, runs.states, runs.frozen, batch, runs.finite, runs.steady


def run_of(runs, number):
    return jax.tree.map(lambda leaf: leaf[number], runs.states)


def last(pairs):
    for pair in pairs:
        pass
    return pair


def test_the_recipe_is_traced_as_often_whatever_the_number_of_runs(model, recipe, make_batches):
    def traces(count):
        calls = []
        counted = lambda hyper: calls.append(hyper) or recipe(hyper)
        runs, _ = last(sweep_steps(start_runs(counted, grid(count), model), make_batches(4)))
        assert runs.jitted._cache_size() == 1 and runs.states.step.tolist() == [4] * count
        return len(calls)

    assert traces(2) == traces(5) <= 4


def test_batches_are_read_once_and_as_they_are_needed(model, recipe, make_batches):
    read = []
    batches = (read.append(number) or batch for number, batch in enumerate(make_batches(3)))
    for taken, _ in enumerate(sweep_steps(start_runs(recipe, grid(3), model), batches)):
        assert read == list(range(taken + 1))


def test_a_run_begins_as_init_begins(model, bits):
    tuning, tx = tj.lora("*/kernel", 2), optax.adam(0.1)
    objective = tj.objectives.cross_entropy(model.apply)
    runs = start_runs(lambda hyper: (objective, tuning, tx), {"seed": [3, 8]}, model)
    for number, seed in enumerate([3, 8]):
        state, frozen = tj.init(jax.random.key(seed), model, tuning, tx)
        assert bits(run_of(runs, number)) == bits(state)
    assert runs.frozen["stem"]["kernel"] is frozen["stem"]["kernel"] is model.params["stem"]["kernel"]


def test_the_base_is_there_once_and_each_state_is_reused(monkeypatch):
    """Arguments: the base, the batch and K states; no second copy of the states, no temporary memory per run."""
    monkeypatch.setattr(_over_runs, "SMALL", -1)  # as larger networks run
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(64, 64)).astype(np.float32)) / 8 for name in ("a", "b", "head")}

    def apply(params, extra, inputs, *, key=None, train=False):
        return jnp.tanh(jnp.tanh(inputs @ params["a"]) @ params["b"]) @ params["head"], extra

    model = tj.Model(apply, None, params, {})
    batch = {"inputs": np.ones((16, 64), np.float32), "labels": np.zeros(16, int)}
    objective = tj.objectives.cross_entropy(apply)
    recipe = lambda hyper: (objective, tj.lora("{a,b}", 4), optax.adam(hyper["lr"]))
    bytes_of = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    found = {}
    for count in (1, 8):
        runs = dataclasses.replace(start_runs(recipe, grid(count), model), steady=())
        found[count] = measure(runs.jitted.lower(*arguments(runs, batch)).compile())
        states = bytes_of((runs.states.trainable, runs.states.opt_state))
    base = bytes_of(params)
    assert states <= found[8].alias_bytes <= 1.02 * states
    assert base + states <= found[8].argument_bytes <= 1.02 * (base + states) + 16 * 65 * 4
    assert found[8].temporary_bytes <= found[1].temporary_bytes + states / 4


def test_a_frozen_backbone_runs_once_for_all(model, recipe, make_batches):
    """`extra` comes back unchanged (train=False), so the stem depends on no run."""
    batch = make_batches(1)[0]
    flops = {}
    for count in (1, 5):
        runs, _ = last(sweep_steps(start_runs(recipe, grid(count), model, train=False), [batch]))
        assert runs.steady == (True,) and runs.states.extra["seen"].shape == (count,)
        flops[count] = cost(runs.jitted.trace(*arguments(runs, batch)).jaxpr, platform="cpu").contractions
    assert flops[5] == 5 * flops[1] - 4 * (2 * 4 * 3 * 4)


def test_extra_that_learns_is_each_runs_own(model, make_batches):
    objective = tj.objectives.cross_entropy(model.apply)
    recipe = lambda hyper: (objective, tj.train("head/**"), optax.sgd(hyper["lr"]))
    batches = make_batches(3)
    runs, _ = last(sweep_steps(start_runs(recipe, grid(2), model, train=True), batches))
    expected = 0.0
    for batch in batches:
        expected = 0.5 * expected + 0.5 * batch["inputs"].mean()
    np.testing.assert_allclose(runs.states.extra["seen"], [expected] * 2, rtol=1e-6)
    assert runs.steady == (False,)


def test_a_batch_may_not_change_what_earlier_ones_left(model, recipe, make_batches):
    def apply(params, extra, inputs, *, key=None, train=False):
        outputs, _ = model.apply(params, extra, inputs["x"], train=False)
        return outputs, {"seen": extra["seen"] + 1 if "more" in inputs else extra["seen"]}

    objective = tj.objectives.cross_entropy(apply)
    other = lambda hyper: (objective, *recipe(hyper)[1:])
    one, two = ({"inputs": {"x": b["inputs"]}, "labels": b["labels"]} for b in make_batches(2))
    two["inputs"]["more"] = np.ones(4, np.float32)
    with pytest.raises(tj.DataError, match=r"this batch changes 'seen' of the model's extra, which earlier batches"):
        last(sweep_steps(start_runs(other, grid(2), model), [one, two]))


def test_a_last_batch_of_another_size(model, recipe, make_batches):
    batches = [*make_batches(1), *make_batches(1, size=2)]
    runs, _ = last(sweep_steps(start_runs(recipe, grid(2), model), batches))
    assert runs.states.step.tolist() == [2, 2]


def test_a_teachers_weights_are_an_argument_not_a_constant(model, make_batches):
    teacher = jnp.ones((300, 2))

    def distil(teacher, params, extra, batch, key, train):
        outputs, extra = model.apply(params, extra, batch["inputs"], train=train)
        return tj.Loss(jnp.mean((outputs - teacher[: len(outputs)]) ** 2), {}, extra)

    recipe = lambda hyper: (jax.tree_util.Partial(distil, teacher), tj.full(), optax.sgd(hyper["lr"]))
    runs, metrics = last(sweep_steps(start_runs(recipe, grid(2), model), make_batches(1)))
    text = runs.jitted.lower(*arguments(runs, make_batches(1)[0])).as_text()
    assert runs.held[0] is teacher and bool(metrics["finite"].all())
    assert "tensor<300x2xf32>" in text.splitlines()[1] + text.splitlines()[2]
    assert not [line for line in text.splitlines() if "stablehlo.constant" in line and "300x2" in line]


def test_an_objective_weight_is_a_hyperparameter(model, make_batches):
    inner = tj.objectives.cross_entropy(model.apply)

    def weighted(weight, params, extra, batch, key, train):
        loss = inner(params, extra, batch, key, train)
        return loss._replace(value=weight * loss.value)

    recipe = lambda h: (jax.tree_util.Partial(weighted, h["weight"]), tj.train("head/**"), optax.sgd(0.1))
    runs = start_runs(recipe, {"weight": [1.0, 3.0]}, model, key=jax.random.key(0))
    _, metrics = next(sweep_steps(runs, make_batches(1)))
    np.testing.assert_allclose(metrics["loss"][1], 3 * metrics["loss"][0], rtol=1e-6)


def test_runs_can_be_taken_out(model, recipe, make_batches):
    runs = start_runs(recipe, grid(4), model).take([3, 1])
    assert runs.table["seed"].tolist() == [3, 1] == runs.hyper["seed"].tolist()
    runs, metrics = last(sweep_steps(runs, make_batches(2)))
    assert metrics["loss"].shape == (2,) and runs.states.step.tolist() == [2, 2]


REFUSED = {
    "rank": (
        lambda h, objective, model: (objective, tj.lora("stem/kernel", h["rank"]), optax.sgd(0.1)),
        {"rank": [1, 2]},
        tj.SelectionError,
        r"'rank' changes shapes: with rank = 1 'trainable/stem/kernel/lora_a' is \(3, 1\) float32, with rank = 2 it is "
        r"\(3, 2\) float32. Expected runs of equal shapes",
    ),
    "a branch": (
        lambda h, objective, model: (objective, tj.full(), optax.sgd(0.1 if h["lr"] > 0.1 else 0.2)),
        {"rank": [1, 2], "lr": [0.1, 0.2]},
        tj.TransferError,
        r"in which 'lr' is a traced scalar; the recipe needs its value \(TracerBoolConversionError\)",
    ),
    "a branch in the objective": (
        lambda h, objective, model: (
            lambda p, e, b, k, t: objective(p, e, b, k, t) if h["lr"] > 0 else None,
            tj.full(),
            optax.sgd(0.1),
        ),
        {"rank": [1, 2], "lr": [0.1, 0.2]},
        tj.TransferError,
        r"in which 'lr' is a traced scalar; the recipe needs its value",
    ),
    "batch size": (
        lambda h, objective, model: (
            lambda p, e, b, k, t: objective(p, e, {n: b[n][: h["size"]] for n in ("inputs", "labels")}, k, t),
            tj.full(),
            optax.sgd(0.1),
        ),
        {"size": [2, 4]},
        tj.TransferError,
        r"in which 'size' is a traced scalar",
    ),
    "classes": (
        lambda h, objective, model: (
            objective,
            tj.Tuning(lambda key, params: ({"new": jnp.zeros((4, h["classes"]))}, params), lambda t, f: f),
            optax.sgd(0.1),
        ),
        {"classes": [2, 3]},
        tj.SelectionError,
        r"'classes' changes shapes: with classes = 2 'trainable/new' is \(4, 2\) float32, with classes = 3",
    ),
    "another base": (
        lambda h, objective, model: (
            objective,
            tj.Tuning(lambda key, p: ({"new": jnp.zeros(2)}, jax.tree.map(lambda x: x * h["s"], p)), lambda t, f: f),
            optax.sgd(0.1),
        ),
        {"s": [1.0, 2.0]},
        tj.SelectionError,
        r"the frozen weight 'head/bias' is made of a hyperparameter or of the run's key",
    ),
    "an error of the recipe's own": (
        lambda h, objective, model: (objective, tj.train("haed/**"), optax.sgd(h["lr"])),
        {"lr": [0.1, 0.2]},
        tj.SelectionError,
        r"'haed/\*\*' matched none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_program_cannot_do_is_named(name, model, make_batches):
    recipe, table, error, message = REFUSED[name]
    objective = tj.objectives.cross_entropy(model.apply)
    with pytest.raises(error, match=message):
        runs = start_runs(lambda h: recipe(h, objective, model), table, model, key=jax.random.key(0))
        last(sweep_steps(runs, make_batches(1)))


def test_a_frozen_base_of_the_seed_is_refused(model):
    tuning = tj.Tuning(lambda key, p: ({"new": jnp.zeros(2)}, {"r": jax.random.normal(key, (3,))}), lambda t, f: f)
    recipe = lambda hyper: (tj.objectives.cross_entropy(model.apply), tuning, optax.sgd(0.1))
    with pytest.raises(tj.SelectionError, match=r"frozen weight 'r' is made of a hyperparameter or of the run's key"):
        start_runs(recipe, {"seed": [0, 1]}, model)


def test_batches_are_many(model, recipe, make_batches):
    with pytest.raises(tj.DataError, match=r"sweep\(\) got no batch. Expected at least one"):
        last(sweep_steps(start_runs(recipe, grid(2), model), []))
    with pytest.raises(tj.DataError, match=r"sweep\(\) expects an iterable of batches, got one batch"):
        last(sweep_steps(start_runs(recipe, grid(2), model), make_batches(1)[0]))
