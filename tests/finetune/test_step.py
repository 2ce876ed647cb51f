"""What a step is made of, when it raises, and what accumulation and modes mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune import training_mode


def run(objective, model, tuning, tx, batch, **options):
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    return tj.make_step(objective, tuning, tx, **options)(state, frozen, batch)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda o, t, x: tj.make_step(3, t, x), r"expects an Objective first, \(params, .*\) -> Loss, got int: write"),
        (lambda o, t, x: tj.make_step(o, "head/**", x), r"expects a Tuning second, got str: write tj\.train\('head/"),
        (
            lambda o, t, x: tj.make_step(o, t, None),
            r"make_step\(\) expects an optax transform, got NoneType: write opt",
        ),
        (lambda o, t, x: tj.make_step(o, t, x, accumulate=0), r"expects accumulate of at least 1, got 0\."),
    ],
)
def test_what_is_no_step_raises(make, message, model):
    with pytest.raises(tj.TransferError, match=message):
        make(tj.objectives.cross_entropy(model.apply), tj.full(), optax.sgd(0.1))


def test_an_objective_that_returns_no_loss_raises(model, make_batches):
    objective = lambda params, extra, batch, key, train: params["head"]["bias"].sum()
    with pytest.raises(tj.TransferError, match=r"an Objective returns Loss\(value, metrics, extra\), got \(\) float32"):
        run(objective, model, tj.full(), optax.sgd(1.0), make_batches(1)[0])


def test_a_batch_that_does_not_divide_raises(model, make_batches):
    batch = make_batches(1)[0]
    objective = tj.objectives.cross_entropy(model.apply)
    with pytest.raises(tj.DataError) as error:
        run(objective, model, tj.full(), optax.sgd(1.0), batch, accumulate=3)
    assert str(error.value) == (
        "batch entry 'id' is (4,) int32; expected a leading axis that 3 equal parts divide. "
        "Choose a batch size that is a multiple of accumulate."
    )
    with pytest.raises(tj.DataError, match=r"batch entry 'temperature' is \(\) float32; expected a leading axis"):
        run(objective, model, tj.full(), optax.sgd(1.0), {**batch, "temperature": jnp.ones(())}, accumulate=2)


def _objectives(model):
    tokens = lambda params, extra, inputs, *, key=None, train=False: (params["table"][inputs], extra)
    weights = jnp.array([1.0, 5.0])
    return {
        "cross_entropy": (tj.objectives.cross_entropy(model.apply, label_smoothing=0.1), model),
        "class weights": (tj.objectives.cross_entropy(model.apply, class_weights=weights), model),
        "next_token": (
            tj.objectives.next_token(tokens),
            model._replace(params={"table": jnp.arange(25.0).reshape(5, 5) % 7 / 7}),
        ),
    }


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["cross_entropy", "class weights", "next_token"])
def test_accumulation_equals_the_whole_batch(name, weighted, model, make_batches):
    objective, model = _objectives(model)[name]
    batch = make_batches(1, 8)[0]
    if name == "next_token":
        rng = np.random.default_rng(2)
        batch["inputs"] = rng.integers(0, 5, (8, 6))
        batch["mask"] = np.arange(6) < rng.integers(1, 7, (8, 1))
    if weighted:
        batch["weight"] = np.array([0, 1, 2, 3, 0, 1, 0.5, 4], np.float32)
    whole, expected = run(objective, model, tj.full(), optax.sgd(1.0), batch)
    parts, metrics = run(objective, model, tj.full(), optax.sgd(1.0), batch, accumulate=4)
    for path, leaf in tj.paths(whole.trainable).items():
        np.testing.assert_allclose(tj.paths(parts.trainable)[path], leaf, rtol=1e-5, atol=1e-6)
    assert metrics.keys() == expected.keys()
    for metric, value in expected.items():
        np.testing.assert_allclose(metrics[metric], value, rtol=1e-5, err_msg=metric)


def test_each_part_of_a_batch_moves_the_statistics_in_turn(model, make_batches):
    batch = make_batches(1)[0]
    state, _ = run(tj.objectives.cross_entropy(model.apply), model, tj.full(), optax.sgd(0.1), batch, accumulate=2)
    first, second = batch["inputs"][0::2].mean(), batch["inputs"][1::2].mean()
    np.testing.assert_allclose(state.extra["seen"], 0.25 * first + 0.5 * second, rtol=1e-5)


def test_a_state_that_changes_its_types_raises(model, make_batches):
    batch, objective = make_batches(1)[0], tj.objectives.cross_entropy(model.apply)
    growing = optax.GradientTransformation(lambda params: jnp.zeros(2), lambda u, s, params=None: (u, jnp.zeros(3)))
    with pytest.raises(tj.TransferError) as error:
        run(objective, model, tj.full(), growing, batch)
    assert str(error.value) == (
        "a step changes 'opt_state' of the state from (2,) float32 to (3,) float32. Expected equal shapes and dtypes: "
        "the model's extra and the optimizer's state must come back as they went in."
    )
    extra = {"seen": jnp.zeros((), jnp.bfloat16)}
    with pytest.raises(
        tj.TransferError, match=r"a step changes 'extra/seen' of the state from \(\) bfloat16 to \(\) float32"
    ):
        run(objective, model._replace(extra=extra), tj.full(), optax.sgd(0.1), batch)
    forgetful = lambda params, extra, batch, key, train: tj.Loss(params["head"]["bias"].sum(), {}, {})
    with pytest.raises(
        tj.TransferError, match=r"a step changes 'extra/seen' of the state from \(\) float32 to no leaf\."
    ):
        run(forgetful, model, tj.full(), optax.sgd(0.1), batch)


def test_keys_differ_per_step_and_per_part(model, make_batches):
    keys = []

    def objective(params, extra, batch, key, train):
        jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
        return tj.Loss(params["head"]["bias"].sum(), {}, extra)

    tuning, tx, batch = tj.full(), optax.sgd(0.0), make_batches(1)[0]
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    step = tj.make_step(objective, tuning, tx, accumulate=2)
    for _ in range(2):
        state, _ = step(state, frozen, batch)
    jax.effects_barrier()
    assert len(keys) == 4 and len(set(keys)) == 4


def test_the_mode_reaches_the_objective(model, make_batches):
    seen = []

    def objective(params, extra, batch, key, train):
        seen.append(train)
        return tj.Loss(params["head"]["bias"].sum(), {}, extra)

    for train in (None, True, False, "head", tj.regex("h.*")):
        run(objective, model, tj.train("head/**"), optax.sgd(0.1), make_batches(1)[0], train=train)
    default, on, off, glob, regex = seen
    assert default("head") and not default("stem") and default("")
    assert (on, off, glob, regex) == (True, False, tj.glob("head"), tj.regex("h.*"))


@pytest.mark.parametrize(
    "tuning, on",
    [
        (tj.full(), {"stem": True, "head": True}),
        (tj.train("head/bias"), {"stem": False, "head": True}),
        (tj.lora("stem/kernel", 2), {"stem": False, "head": False}),
        (tj.chain(a=tj.lora("stem/kernel", 2), b=tj.train("head/**")), {"stem": False, "head": True}),
    ],
    ids=["full", "train", "lora", "chain"],
)
def test_an_adapter_on_a_frozen_kernel_does_not_put_its_module_into_training_mode(tuning, on, model):
    mode = training_mode(tuning, *tuning.init(jax.random.key(0), model.params))
    assert {name: mode(name) for name in on} == on


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pull:
    """A callable pytree of one's own."""

    towards: jax.Array

    def __call__(self, params, extra, batch, key, train):
        return tj.Loss(jnp.sum((params["head"]["bias"] - self.towards) ** 2), {}, extra)


def test_a_callable_pytree_is_an_objective_whose_arrays_are_arguments(model, make_batches):
    step = tj.make_step(Pull(jnp.full(2, 3.0)), tj.train("head/bias"), optax.sgd(0.5))
    state, frozen = tj.init(jax.random.key(0), model, step.tuning, step.tx)
    state, _ = step(state, frozen, make_batches(1)[0])
    assert state.trainable["head"]["bias"].tolist() == [3.0, 3.0]
    text = str(jax.make_jaxpr(step.jitted)(step.objective, state, frozen, make_batches(1)[0], True))
    assert jax.tree.leaves(step.objective) and "3.0 3.0" not in text


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_keeps_every_bit(where, model, make_batches, bits):
    def objective(params, extra, batch, key, train):
        bias = params["head"]["bias"].sum()
        value = bias * jnp.nan if where == "loss" else jnp.sqrt(bias)  # the root of 0 has an infinite slope
        return tj.Loss(value, {}, {"seen": extra["seen"] + 1})

    tx = optax.adam(0.1)
    expected = bits(tj.init(jax.random.key(0), model, tj.full(), tx)[0])
    state, metrics = run(objective, model, tj.full(), tx, make_batches(1)[0])
    assert not metrics["finite"] and bool(jnp.isfinite(metrics["loss"])) == (where == "gradient")
    assert bits(state) == expected


def test_the_tree_of_gradients_is_clipped_without_the_frozen_ones(model, make_batches):
    """Clipping sees the norm of the trainable gradients only."""
    batch = make_batches(1)[0]
    tx = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    before = model.params["head"]["bias"]
    state, _ = run(tj.objectives.cross_entropy(model.apply), model, tj.train("head/bias"), tx, batch)
    np.testing.assert_allclose(jnp.linalg.norm(state.trainable["head"]["bias"] - before), 1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["loss", "finite"])
def test_a_metric_with_a_name_of_the_steps_own_raises(name, model):
    def objective(params, extra, batch, key, train):
        return tj.Loss(jnp.sum(params["head"]["bias"]), {name: jnp.zeros(())}, extra)

    tuning, tx = tj.train("head/**"), optax.sgd(0.1)
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    with pytest.raises(tj.TransferError, match=f"the objective has a metric '{name}', which is the step's own"):
        tj.make_step(objective, tuning, tx)(state, frozen, {"inputs": jnp.ones((2, 3))})
