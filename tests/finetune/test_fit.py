"""The loop, and what can be wrapped around it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj


@pytest.fixture(scope="module")
def parts(model):
    tuning, tx = tj.train("head/**"), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    return step, lambda: tj.init(jax.random.key(0), model, tuning, tx)


def test_fit_yields_what_the_step_returns(parts, make_batches, bits):
    step, start = parts
    batches = make_batches(3)
    state, frozen = start()
    expected = []
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        expected.append((bits(state), float(metrics["loss"])))
    found = [(bits(state), float(metrics["loss"])) for state, metrics in tj.fit(step, *start(), batches)]
    assert found == expected
    assert [int(tj.copy(state).step) for state, _ in tj.fit(step, *start(), iter(batches))] == [1, 2, 3]


@pytest.mark.parametrize("bound", [False, True])
def test_a_step_is_compiled_once_whether_the_weights_are_bound_to_a_device_or_not(model, make_batches, bound):
    weights = jax.device_put(model.params, jax.devices()[0]) if bound else model.params
    tuning, tx = tj.train("head/**"), optax.adam(0.1)
    state, frozen = tj.init(jax.random.key(0), model._replace(params=weights), tuning, tx)
    assert {leaf.committed for leaf in jax.tree.leaves((state, frozen))} == {bound}
    looped, called = (tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx) for _ in range(2))
    assert len(list(tj.fit(looped, tj.copy(state), frozen, make_batches(3)))) == 3
    for batch in make_batches(3):
        state, _ = called(state, frozen, batch)
    assert (looped.jitted._cache_size(), called.jitted._cache_size()) == (1, 1)


def test_what_fit_yields_is_donated_at_the_next_turn(parts, make_batches):
    step, start = parts
    states = [(state, tj.copy(state)) for state, _ in tj.fit(step, *start(), make_batches(2))]
    (first, kept), (last, _) = states
    assert first.trainable["head"]["bias"].is_deleted() and not last.trainable["head"]["bias"].is_deleted()
    assert int(kept.step) == 1


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_loss_that_is_not_finite_raises_with_the_state_before_it(bad, parts, make_batches, bits):
    step, start = parts
    batches = make_batches(4)
    state, frozen = start()
    for batch in batches[:bad]:
        state, _ = step(state, frozen, batch)
    expected = bits(state)
    batches[bad]["labels"][2] = 7
    seen = []
    with pytest.raises(tj.NonFiniteError) as error:
        for state, metrics in tj.fit(step, *start(), batches):
            seen.append((bits(state), bool(metrics["finite"])))
    assert bits(error.value.state) == expected
    assert error.value.step == bad and error.value.ids.tolist() == [100 + 4 * bad + i for i in range(4)]
    assert [finite for _, finite in seen] == [True] * bad + [False]
    assert seen[-1][0] == expected
    first = 100 + 4 * bad
    assert str(error.value) == (
        f"step {bad}: the loss is not finite (loss nan); ids {first}, {first + 1}, {first + 2}, {first + 3}. The state "
        "from before this batch is in the error's .state. Expected finite values: look for labels outside the classes, "
        "inputs that are not finite, or a learning rate that is too high."
    )
    again = [float(metrics["loss"]) for _, metrics in tj.fit(step, error.value.state, frozen, make_batches(1))]
    assert math.isfinite(again[0])


def test_the_batch_after_a_bad_one_changes_nothing(parts, make_batches, bits):
    step, start = parts
    batches = make_batches(2)
    expected = bits(start()[0])
    state, frozen = start()
    batches[0]["inputs"][0] = np.inf
    state, metrics = step(state, frozen, batches[0])
    state, _ = step.jitted(step.objective, state, frozen, batches[1], metrics["finite"])
    assert bits(state) == expected


def test_a_gradient_that_is_not_finite_and_a_batch_without_ids_are_named(model):
    objective = lambda params, extra, batch, key, train: tj.Loss(jnp.sqrt(params["head"]["bias"].sum()), {}, extra)
    step = tj.make_step(objective, tj.full(), optax.sgd(0.1))
    state, frozen = tj.init(jax.random.key(0), model, step.tuning, step.tx)
    message = r"step 0: a gradient is not finite \(loss 0\.0\); the batch has no ids\. The state from before"
    with pytest.raises(tj.NonFiniteError, match=message) as error:
        list(tj.fit(step, state, frozen, [{"inputs": jnp.ones((2, 3))}]))
    assert error.value.ids is None and error.value.step == 0


def test_no_batch_raises(parts):
    step, start = parts
    with pytest.raises(tj.DataError, match=r"fit\(\) got no batch\. Expected at least one: check the data set and the"):
        list(tj.fit(step, *start(), []))


def _pairs(*values, name="score"):
    return [(number, {} if value is None else {name: value}) for number, value in enumerate(values)]


def test_validate_adds_its_metrics_every_so_many_steps():
    calls = []

    def evaluate(state, frozen, batches):
        calls.append((state, frozen, list(batches)))
        return {"accuracy": state / 10}

    found = list(tj.validate(_pairs(1.0, 2.0, 3.0, 4.0), evaluate, "frozen", lambda: iter([1, 2]), every=2))
    assert [metrics.get("validation/accuracy") for _, metrics in found] == [None, 0.1, None, 0.3]
    assert [metrics["score"] for _, metrics in found] == [1.0, 2.0, 3.0, 4.0]
    assert calls == [(1, "frozen", [1, 2]), (3, "frozen", [1, 2])]
    with pytest.raises(tj.TransferError, match=r"validate\(\) expects every of at least 1 step, got 0\."):
        list(tj.validate(_pairs(1.0), evaluate, None, [], every=0))


def test_best_keeps_a_copy_of_the_best_state(parts, make_batches):
    step, start = parts
    best = tj.Best("loss", highest=False)
    losses = [float(metrics["loss"]) for _, metrics in best(tj.fit(step, *start(), make_batches(3)))]
    assert best.value == min(losses) and int(best.state.step) == 1 + losses.index(min(losses))
    for values, highest, expected in [
        ((1.0, None, 3.0, 3.0, 2.0), True, (2, 3.0)),
        ((1.0, math.nan, -1.0), False, (2, -1.0)),
        ((math.nan, 5.0), True, (1, 5.0)),
    ]:
        best = tj.Best("score", highest)
        assert len(list(best(_pairs(*values)))) == len(values)
        assert (best.state, best.value) == expected
    with pytest.raises(tj.TransferError, match=r"no step had the metric 'scroe'\. Nearest: score\."):
        list(tj.Best("scroe", highest=True)(_pairs(1.0)))


def test_early_stopping_counts_readings_without_improvement():
    stop = lambda values, **options: [
        state for state, _ in tj.early_stopping(_pairs(*values), "score", **{"highest": True} | options)
    ]
    assert stop([1.0, 2.0, 1.5, None, 1.6, 9.0], patience=2) == [0, 1, 2, 3, 4]
    assert stop([1.0, 2.0, 1.5, 2.5, 1.0], patience=2) == [0, 1, 2, 3, 4]
    assert stop([3.0, math.nan, 1.0], patience=1, highest=False) == [0, 1]
    with pytest.raises(tj.TransferError, match=r"early_stopping\(\) expects a patience of at least 1 reading, got 0\."):
        stop([1.0], patience=0)
    with pytest.raises(tj.TransferError, match=r"no step had the metric 'loss'\. Nearest: score\."):
        list(tj.early_stopping(_pairs(1.0), "loss", patience=1))


def test_the_wrappers_compose(parts, make_batches, model):
    step, start = parts
    evaluate = tj.make_eval(model.apply, {"accuracy": tj.objectives.accuracy}, step.tuning)
    state, frozen = start()
    best = tj.Best("validation/accuracy")
    pairs = tj.validate(tj.fit(step, state, frozen, make_batches(6)), evaluate, frozen, make_batches(2), every=2)
    steps = len(list(tj.early_stopping(best(pairs), "validation/accuracy", patience=1)))
    assert steps in (2, 4, 6) and int(best.state.step) in (2, 4, 6)
    assert evaluate(best.state, frozen, make_batches(2))["accuracy"] == best.value


def test_nothing_is_no_batches(parts):
    step, start = parts
    with pytest.raises(
        tj.DataError, match=r"fit\(\) expects an iterable of batches, got NoneType: write tj.data.batches"
    ):
        next(tj.fit(step, *start(), None))


def test_the_direction_of_a_metric_is_told_by_its_name_or_asked_for():
    assert tj.Best("loss").highest is False and tj.Best("validation/top_k_accuracy").highest is True
    assert tj.Best("error", highest=True).highest is True
    message = r"Best\(\) cannot tell from its name whether more of 'f1' is better\. Write highest=True or highest=False"
    with pytest.raises(tj.TransferError, match=message):
        tj.Best("f1")
    pairs = [(step, {"loss": value}) for step, value in enumerate([3.0, 2.0, 2.5, 2.6, 1.0])]
    assert [state for state, _ in tj.early_stopping(pairs, "loss", patience=2)] == [0, 1, 2, 3]
