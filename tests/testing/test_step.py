"""The laws of the step catch what breaks them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.testing import _step as laws
from transferjax.testing import check_step


def apply(params, extra, inputs, *, key=None, train=False):
    return inputs @ params["stem"] * params["head"], extra


MODEL = tj.Model(apply, None, {"head": jnp.ones(2), "stem": jnp.eye(2)}, {})
BATCH = {"inputs": np.array([[1, 2], [3, 4], [5, 7]], "f"), "labels": np.zeros((3, 2), "f")}
OBJECTIVE = tj.objectives.mean_squared_error(apply)
counter = itertools.count()


def check(tx=None, objective=OBJECTIVE, batch=BATCH, **options):
    check_step(objective, MODEL, tj.train("head"), optax.sgd(0.01) if tx is None else tx, batch, steps=2, **options)


def _step(change):
    """`make_step` whose program is changed: `change(old state, frozen, new state, metrics)`."""

    def make(*arguments, **options):
        step = tj.make_step(*arguments, **options)

        def run(objective, state, frozen, batch, proceed):
            old = tj.copy(state)
            return change(old, frozen, *step.jitted(objective, state, frozen, batch, proceed))

        fake = dataclasses.replace(step)
        object.__setattr__(fake, "jitted", run)
        return fake

    return make


def _clip_everything(*arguments, **options):
    """A step that clips before it throws the frozen gradients away."""
    step = tj.make_step(*arguments, **options)

    def run(objective, state, frozen, batch, proceed):
        loss = lambda params: objective(params, state.extra, batch, state.key, False).value
        params = step.tuning.merge(state.trainable, frozen)
        gradients = jax.grad(loss)(params)
        factor = 1 / optax.tree.norm(gradients)
        head = state.trainable["head"] - 0.01 * factor * gradients["head"]
        state, metrics = step.jitted(objective, state, frozen, batch, proceed)
        return dataclasses.replace(state, trainable={**state.trainable, "head": head}), metrics

    fake = dataclasses.replace(step)
    object.__setattr__(fake, "jitted", run)
    return fake


def _nudge(old, frozen, new, metrics):
    return dataclasses.replace(new, trainable={**new.trainable, "head": new.trainable["head"] + 0.1}), metrics


def _retype(old, frozen, new, metrics):
    return dataclasses.replace(new, step=new.step.astype(jnp.float32)), metrics


def _spoil(old, frozen, new, metrics):
    frozen["stem"] = frozen["stem"] + 1
    return new, metrics


def _always_finite(old, frozen, new, metrics):
    return new, {**metrics, "finite": jnp.bool_(True)}


def _count_anyway(old, frozen, new, metrics):
    return dataclasses.replace(new, step=old.step + 1), metrics


def _drift(old, frozen, new, metrics):
    nudge = 1e-7 * next(counter)
    return dataclasses.replace(new, trainable={**new.trainable, "head": new.trainable["head"] + nudge}), metrics


BROKEN = {
    "a clip that sees frozen gradients": (
        _clip_everything,
        "the reference that deletes frozen gradients before the optimizer' is broken at 'trainable/head'",
    ),
    "another update": (_step(_nudge), "'step 0 equals the reference that deletes frozen gradients"),
    "another dtype of the state": (_step(_retype), "is broken at 'step': expected .. int32, got .. float32"),
    "a frozen leaf that moves": (_step(_spoil), "'frozen leaves keep their bits' is broken at 'stem'"),
    "a flag that is always true": (_step(_always_finite), "held back changes nothing' is broken: its metric 'finite'"),
    "a count that goes on": (_step(_count_anyway), "'a step that is held back changes nothing' is broken at 'step'"),
    "chance": (_step(_drift), "is broken at 'trainable/head'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_step_is_caught(name, monkeypatch):
    make, message = BROKEN[name]
    monkeypatch.setattr(laws, "make_step", make)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.01)) if make is _clip_everything else None
    with pytest.raises(tj.LawError, match=message):
        check(tx)


def test_a_state_that_is_not_donated_is_caught(monkeypatch):
    def kept(*arguments, **options):
        step = tj.make_step(*arguments, **options)
        object.__setattr__(step, "jitted", jax.jit(step._run))
        return step

    monkeypatch.setattr(laws, "make_step", kept)
    with pytest.raises(tj.LawError, match=r"'the state is donated' is broken at '.*': its buffer is still there"):
        check()


def test_an_init_that_shares_buffers_is_caught(monkeypatch):
    def shared(key, model, tuning, tx):
        state, frozen = tj.init(key, model, tuning, tx)
        return dataclasses.replace(state, trainable=tuning.init(key, model.params)[0]), frozen

    monkeypatch.setattr(laws, "init", shared)
    model = MODEL._replace(params=tj.copy(MODEL.params))
    with pytest.raises(
        tj.LawError, match="'the model is left alone by training' is broken at '0/head': its buffer was del"
    ):
        check_step(OBJECTIVE, model, tj.train("head"), optax.sgd(0.01), BATCH, steps=1)


def test_a_step_that_compiles_at_each_call_is_caught(monkeypatch):
    def fresh(*arguments, **options):
        step = tj.make_step(*arguments, **options)
        object.__setattr__(step, "jitted", lambda *a: jax.jit(lambda *b: step._run(*b), donate_argnums=1)(*a))
        return step

    monkeypatch.setattr(laws, "make_step", fresh)
    with pytest.raises(tj.LawError, match="'a step compiles once' is broken: the objective was traced anew 1 times"):
        check()


def test_a_batch_whose_loss_is_not_finite_is_no_test():
    with pytest.raises(tj.LawError, match="checked on a batch whose loss is finite' is broken: it is not at step 0"):
        check(batch={**BATCH, "labels": BATCH["labels"] * np.nan})


def test_a_good_step_passes_also_with_integer_inputs():
    check()
    table = lambda params, extra, inputs, *, key=None, train=False: (params["head"][inputs], extra)
    batch = {"inputs": np.array([0, 1, 1]), "labels": np.zeros(3, "f")}
    check(objective=tj.objectives.mean_squared_error(table), batch=batch)
