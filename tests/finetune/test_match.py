"""A state belongs to its step, and wrong arguments say what to write."""

import jax
import jax.numpy as jnp
import optax
import pytest

import transferjax as tj


def start(model, tuning, tx):
    return tj.init(jax.random.key(0), model, tuning, tx)


def call(model, batch, made, used, tx=None, other=None):
    tx = tx or optax.sgd(0.1)
    state, frozen = start(model, made, tx)
    return tj.make_step(tj.objectives.cross_entropy(model.apply), used, other or tx)(state, frozen, batch)


HEAD, STEM = tj.train("head/**"), tj.train("stem/**")


@pytest.mark.parametrize(
    "made, used, message",
    [
        (
            STEM, HEAD,
            r"made by another tuning\. Only in the state: stem/kernel\. Only in the step's tuning: head/bias, "
            r"head/kernel\. Pass the same tuning to init and make_step\.",
        ),
        (tj.full(), HEAD, r"Only in the state: stem/kernel\. Only in the step's tuning: none\."),
        (
            tj.lora("stem/kernel", 1), tj.lora("stem/kernel", 2),
            r"Of other shapes: stem/kernel/lora_a \(3, 1\) in the state, \(3, 2\) in the step, stem/kernel/lora_b",
        ),
        (tj.chain(a=HEAD), tj.chain(b=HEAD), r"tuning: chain\(\) expects trainable groups \['b'\], got \['a'\]\."),
        (STEM, tj.lora("stem/kernel", 1), r"another tuning: merging failed with "),
        (tj.lora("stem/kernel", 1), STEM, r"another tuning: fill\(\) expects two trees of one outline"),
        (HEAD, tj.train("tail"), r"another tuning: selector 'tail' matched none of 3 parameters"),
    ],
)  # fmt: skip
def test_a_state_of_another_tuning_raises(made, used, message, model, make_batches):
    with pytest.raises(tj.SelectionError, match=message):
        call(model, make_batches(1)[0], made, used)


def test_a_merge_that_fails_is_named(model, make_batches):
    def merge(trainable, frozen):
        raise KeyError("scale")

    with pytest.raises(
        tj.SelectionError, match=r"another tuning: merging failed with KeyError: 'scale'\. Pass the same"
    ):
        call(model, make_batches(1)[0], HEAD, HEAD._replace(merge=merge))


@pytest.mark.parametrize(
    "tx, other, message",
    [
        (optax.sgd(0.1), optax.adam(0.1), r"Only in the state: none\. Only in the step's optimizer: 0/count, 0/mu/"),
        (optax.adam(0.1), optax.adamw(0.1), r"another optimizer.*Pass the same optimizer to init and make_step\."),
    ],
)  # fmt: skip
def test_a_state_of_another_optimizer_raises(tx, other, message, model, make_batches):
    with pytest.raises(tj.SelectionError, match=message):
        call(model, make_batches(1)[0], HEAD, HEAD, tx, other)


def by_value(key, params):
    return (HEAD if float(params["head"]["bias"].sum()) == 0 else STEM).init(key, params)


def narrow(path, leaf):
    return leaf.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "tuning",
    [
        tj.Tuning(by_value, HEAD.merge),
        tj.lora(tj.where(narrow), 1),
        tj.chain(a=tj.lora(tj.where(narrow), 1), b=tj.train("head/bias")),
    ],
    ids=["by value", "lora", "chain"],
)
def test_a_tuning_that_looks_at_values_or_types_is_left_alone(tuning, model, make_batches):
    params = {**model.params, "stem": {"kernel": model.params["stem"]["kernel"].astype(jnp.bfloat16)}}
    tx, batch = optax.sgd(0.1), make_batches(1)[0]
    state, frozen = start(model._replace(params=params), tuning, tx)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    shapes = jax.eval_shape(step, state, frozen, batch)
    state, _ = step(state, frozen, batch)
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(state)


def test_an_optimizer_that_looks_at_values_is_left_alone(model, make_batches):
    tx = optax.GradientTransformation(
        lambda params: float(params["head"]["bias"].sum()) and None, lambda u, s, params=None: (u, s)
    )
    state, frozen = start(model, HEAD, tx)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), HEAD, tx)
    assert step(state, frozen, make_batches(1)[0])[1]["finite"]


def test_a_donated_state_raises(model, make_batches):
    tx, batch = optax.adam(0.1), make_batches(1)[0]
    state, frozen = start(model, HEAD, tx)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), HEAD, tx)
    step(state, frozen, batch)
    message = r"^this state was donated to an earlier step: use the state .* keep one with tj\.copy\(state\)\.$"
    with pytest.raises(tj.TransferError, match=message):
        step(state, frozen, batch)
    with pytest.raises(tj.TransferError, match=message):
        next(tj.fit(step, state, frozen, [batch]))


def test_arguments_of_a_step_in_another_order_or_form_raise(model, make_batches):
    tx, batch = optax.sgd(0.1), make_batches(1)[0]
    state, frozen = start(model, HEAD, tx)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), HEAD, tx)
    with pytest.raises(tj.TransferError, match=r"got dict\. They are swapped\. Write step\(state, frozen, batch\)"):
        step(frozen, state, batch)
    with pytest.raises(tj.TransferError, match=r"expects a FinetuneState first, got Model\. Write step\(state"):
        step(model, frozen, batch)
    with pytest.raises(
        tj.DataError, match=r"the batch is a tuple; expected a dict with inputs and labels: write \{'in"
    ):
        step(state, frozen, (batch["inputs"], batch["labels"]))
    with pytest.raises(
        tj.DataError, match=r"fit\(\) expects an iterable of batches, got one batch \(a dict\): wrap it"
    ):
        next(tj.fit(step, state, frozen, batch))
    evaluate = tj.make_eval(model.apply, {"accuracy": tj.objectives.accuracy}, HEAD)
    with pytest.raises(tj.DataError, match=r"evaluate\(\) expects an iterable of batches, got one batch"):
        evaluate(state, frozen, batch)


@pytest.mark.parametrize("which", ["apply", "metric"])
def test_an_objective_of_another_form_raises(which, model):
    function = model.apply if which == "apply" else tj.objectives.accuracy
    message = r"expects an Objective first, \(params, extra, batch, key, train\) -> Loss, got a function of \((pa|out)"
    with pytest.raises(tj.TransferError, match=message):
        tj.make_step(function, HEAD, optax.sgd(0.1))
    tj.make_step(max, HEAD, optax.sgd(0.1))  # a function without a signature is taken on trust


@pytest.mark.parametrize(
    "value, metrics, message",
    [
        (jnp.ones(4), {}, r"the objective's loss is \(4,\) float32; expected a scalar: take the mean"),
        (jnp.ones(()), 3.0, r"the objective's metrics are a float; expected a dict of scalars\."),
        (
            jnp.ones(()),
            {"hits": jnp.ones(4)},
            r"the objective's metric 'hits' is \(4,\) float32; expected a scalar: take",
        ),
    ],
)
def test_a_loss_of_another_form_raises(value, metrics, message, model, make_batches):
    objective = lambda params, extra, batch, key, train: tj.Loss(value * params["head"]["bias"].sum(), metrics, extra)
    state, frozen = start(model, HEAD, optax.sgd(0.1))
    with pytest.raises(tj.TransferError, match=message):
        tj.make_step(objective, HEAD, optax.sgd(0.1))(state, frozen, make_batches(1)[0])
