"""The laws of objectives catch what breaks them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import transferjax as tj
from transferjax.testing import check_objective


def apply(params, extra, inputs, *, key=None, train=False):
    return inputs * params["head"], extra


MODEL = tj.Model(apply, None, {"head": jnp.full((), 2.0)}, {"mean": jnp.zeros(3)})
BATCH = {"inputs": jnp.arange(4.0), "labels": jnp.ones(4)}
GOOD = tj.objectives.mean_squared_error(apply)
counter = itertools.count()


def _changed(change):
    return Partial(lambda *arguments: change(GOOD(*arguments)))


def _unweighted(params, extra, batch, key, train):
    return GOOD(params, extra, {name: batch[name] for name in ("inputs", "labels")}, key, train)


def _summed(params, extra, batch, key, train):
    weight = batch.get("weight", jnp.ones(len(batch["labels"])))
    loss = GOOD(params, extra, batch, key, train)
    return loss._replace(value=loss.value * weight.sum() / (1.0 if "weight" in batch else 2.0))


def _concrete(params, extra, batch, key, train):
    return GOOD(params, extra, batch, key, train) if float(batch["inputs"].sum()) else None


def _integer(params, extra, batch, key, train):
    loss = GOOD(params, extra, batch, key, train)
    return loss._replace(value=jnp.sum(jax.pure_callback(np.sin, loss.value, loss.value)))


BROKEN = {
    "a plain function": (lambda *arguments: GOOD(*arguments), "leaves are arrays and numbers' is broken: got function"),
    "a function inside": (Partial(GOOD.func, abs), "leaves are arrays and numbers' is broken at '0/0': got builtin"),
    "a bare value": (_changed(lambda loss: loss.value), r"returns Loss.* is broken: got \(\) float32"),
    "a vector": (
        _changed(lambda loss: loss._replace(value=loss.value[None])),
        r"the value is \(1,\) float32; expected a f",
    ),
    "an integer": (
        _changed(lambda loss: loss._replace(value=loss.value.astype(int))),
        r"the value is \(\) int32; expected",
    ),
    "a list of metrics": (_changed(lambda loss: loss._replace(metrics=[])), "the metrics are list; expected a dict"),
    "a vector metric": (
        _changed(lambda loss: loss._replace(metrics={"each": jnp.ones(4)})),
        r"at 'each': the metric is \(4,\) float32; expected a scalar",
    ),
    "another extra": (
        _changed(lambda loss: loss._replace(extra={"mean": jnp.zeros(2)})),
        r"'an objective keeps the outline of extra' is broken at 'mean': expected \(3,\) float32, got \(2,\) float32",
    ),
    "a hidden counter": (
        _changed(lambda loss: loss._replace(value=loss.value + next(counter))),
        "'equal calls give equal values' is broken at 'value'",
    ),
    "concrete values": (
        Partial(_concrete),
        "'an objective enters jit as an argument' is broken: it raised Concretization",
    ),
    "no derivative": (Partial(_integer), "'an objective can be differentiated' is broken: it raised ValueError"),
    "no weights": (Partial(_unweighted), "'an example of weight 2 counts like the example twice' is broken"),
    "a sum": (Partial(_summed), "'weights of 1 count like no weights' is broken at 'value'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_objective_is_caught(name):
    objective, message = BROKEN[name]
    with pytest.raises(tj.LawError, match=message):
        check_objective(objective, MODEL, BATCH)


def test_good_objectives_pass():
    check_objective(GOOD, MODEL, BATCH)
    check_objective(Partial(_unweighted), MODEL, BATCH, weights=False)


def test_a_loss_without_weights_is_told_what_to_write():
    message = r"Weight the mean, .*batch\['weight'\].* objectives\.supervised, which does; pass weights=False where"
    with pytest.raises(tj.LawError, match=message):
        check_objective(Partial(_unweighted), MODEL, BATCH)
