"""Fine-tuning beside what the source knows: DELTA, LwF, BSS, Co-Tuning, Bi-Tuning as objectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax import DataError, SelectionError

ob, losses = tj.objectives, tj.objectives.losses
RNG = np.random.default_rng(3)
BATCH = {
    "inputs": RNG.normal(size=(6, 4, 3)).astype(np.float32),
    "labels": np.array([0, 1, 2, 0, 1, 2]),
    "id": np.arange(6),
}


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def network(params, x):
    body = tj.interop.mark("body", jnp.tanh(x @ params["body"]["kernel"]))
    return body.mean(1) @ params["head"]["kernel"]


def make(classes):
    return tj.interop.pure(network, {"body": {"kernel": draw(3, 5)}, "head": {"kernel": draw(5, classes)}})


@pytest.fixture
def source():
    return make(7)


@pytest.fixture
def model(source):
    own = source._replace(params={**source.params, "head": {"kernel": draw(5, 3)}})
    kept = {"kernel": source.params["head"]["kernel"], "bias": jnp.zeros(7)}
    return tj.extend(own, "source_head", kept)


def value(objective, model, batch=BATCH):
    return objective(model.params, model.extra, batch, None, True)


def moved(model):
    return model._replace(params=jax.tree.map(lambda leaf: leaf + 0.1, model.params))


def features(model):
    return model.capture(model.params, {}, BATCH["inputs"], "body")[2]["body"]


RELATION = jax.nn.softmax(draw(3, 7))
OBJECTIVES = {
    "delta": lambda model, source: ob.delta(ob.cross_entropy, model, source, "body"),
    "delta, attention": lambda model, source: ob.delta(
        ob.cross_entropy, model, source, "body", channel_weights=losses.channel_attention(jnp.arange(5.0))
    ),
    "lwf": lambda model, source: ob.lwf(ob.cross_entropy, model, source, at="body"),
    "co_tuning": lambda model, source: ob.co_tuning(ob.cross_entropy, model, RELATION, at="body"),
}
COMPARING = {
    "bss": lambda model, source: ob.bss(ob.cross_entropy, model, "body"),
    "bi_tuning": lambda model, source: ob.bi_tuning(ob.cross_entropy, model, "body", classifier="head"),
}


@pytest.mark.parametrize("name", ["delta", "delta, attention", "lwf"])
def test_at_the_start_nothing_is_lost_and_gradients_are_finite(name, model, source):
    objective = OBJECTIVES[name](model, source)
    metrics = value(objective, model).metrics
    np.testing.assert_allclose(metrics.get("distillation", metrics.get("source_loss")), 0, atol=1e-6)
    gradient = jax.grad(lambda params: objective(params, {}, BATCH, None, True).value)(model.params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_each_is_its_loss_beside_the_supervised_one(model, source):
    other = moved(model)
    task = value(ob.cross_entropy(other.apply), other).value
    own, theirs = features(other), features(source)
    kept = other.params["aux"]["source_head"]
    logits = own.mean(1) @ kept["kernel"] + kept["bias"]
    said = source.apply(source.params, {}, BATCH["inputs"])[0]
    kernel = other.params["model"]["head"]["kernel"]
    wanted = {
        "delta": 0.01 * losses.delta(own, theirs),
        "delta, attention": 0.01 * losses.delta(own, theirs, losses.channel_attention(jnp.arange(5.0))),
        "lwf": losses.kd(logits, said, 2.0),
        "co_tuning": 2.3 * losses.co_tuning(logits, BATCH["labels"], RELATION),
        "bss": 1e-3 * losses.bss(own.mean(1)),
        "bi_tuning": losses.contrastive_cross_entropy(own.mean(1), BATCH["labels"], kernel)
        + losses.categorical_contrastive(own.mean(1), own.mean(1), BATCH["labels"]),
    }
    for name, make_objective in {**OBJECTIVES, **COMPARING}.items():
        found = value(make_objective(model, source), other).value
        np.testing.assert_allclose(found, task + wanted[name], rtol=1e-5, err_msg=name)


def test_what_is_missing_is_named(model, source):
    with pytest.raises(SelectionError, match="the model has no auxiliary weights 'source_head'"):
        ob.lwf(ob.cross_entropy, source, source, at="body")
    with pytest.raises(SelectionError, match="the model has no auxiliary weights 'source_head'"):
        ob.co_tuning(ob.cross_entropy, source, RELATION, at="body")
    with pytest.raises(
        SelectionError, match=r"bi_tuning\(\): the model has no 'haed/kernel'.*head/kernel.*Give classifier"
    ):
        ob.bi_tuning(ob.cross_entropy, model, "body", classifier="haed")
    narrow = tj.extend(source, "source_head", {"kernel": jnp.zeros((4, 7)), "bias": jnp.zeros(7)})
    with pytest.raises(
        DataError, match=r"the auxiliary weights 'source_head' are .*Expected \{'kernel': \[5, classes\]"
    ):
        value(ob.lwf(ob.cross_entropy, narrow, source, at="body"), narrow)
    with pytest.raises(SelectionError, match=r"at='b.*' selects body. Expected the path of one module"):
        value(ob.bss(ob.cross_entropy, model, "b*"), model)
