"""Fine-tuning through a cache takes the same steps, computes the frozen part once, and only from its own base."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax._errors import CheckpointError, DataError, TransferError

KEY = jax.random.key(0)


def apply(params, extra, x, *, key=None, train=False):
    hidden = jnp.tanh(x @ params["stem"])
    if key is not None and train is True:
        hidden = hidden * jax.random.bernoulli(key, 0.5, hidden.shape)
    return hidden @ params["head"], extra


def setting(seed=0, train=None, tuning=None):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {"stem": jax.random.normal(keys[0], (8, 6)), "head": jax.random.normal(keys[1], (6, 3))}
    model = tj.Model(apply, None, params, {})
    tuning = tj.train("head") if tuning is None else tuning
    tx = optax.adam(0.01)
    step = tj.make_step(tj.objectives.cross_entropy(apply), tuning, tx, train=train)
    return step, *tj.init(KEY, model, tuning, tx)


def batches(epochs=3):
    x = np.asarray(jax.random.normal(KEY, (12, 8)))
    order = np.random.default_rng(0)
    for _ in range(epochs):
        for ids in np.split(order.permutation(12), 3):
            yield {"inputs": x[ids], "labels": ids % 3, "id": ids.astype(np.int64), "weight": 1.0 + ids % 2}


def test_the_steps_are_those_without_a_cache():
    step, state, frozen = setting()
    plain = [float(metrics["loss"]) for _, metrics in tj.fit(step, state, frozen, batches())]
    step, state, frozen = setting()
    cache = tj.io.residual_cache(tj.hoist(step, state, frozen, next(batches())), state, frozen)
    computed = []
    add, cache.add = cache.add, lambda ids, arrays: computed.append(len(ids)) or add(ids, arrays)
    for through, metrics in tj.fit(step, state, frozen, batches(), cache=cache):
        computed.append(float(metrics["loss"]))
    losses = [value for value in computed if isinstance(value, float)]
    np.testing.assert_allclose(losses, plain, rtol=1e-6)
    assert [value for value in computed if not isinstance(value, float)] == [4, 4, 4]
    assert len(cache) == 12
    assert cache.shapes["hoisted_0"].shape == (6,)
    assert int(through.step) == 9


def test_a_folder_serves_the_next_run_and_no_other_base(tmp_path):
    step, state, frozen = setting()
    make = lambda step, state, frozen: tj.io.residual_cache(
        tj.hoist(step, state, frozen, next(batches())), state, frozen, path=tmp_path / "cache"
    )
    list(tj.fit(step, state, frozen, batches(1), cache=make(step, state, frozen)))
    step, state, frozen = setting()
    again = make(step, state, frozen)
    assert len(again) == 12
    list(tj.fit(step, state, frozen, batches(1), cache=again))
    with pytest.raises(CheckpointError, match="weights"):
        make(*setting(seed=1))
    with pytest.raises(CheckpointError, match=r"were computed by another run: its weights differ"):
        list(tj.fit(*setting(seed=1), batches(), cache=again))
    foreign = tj.io.FeatureCache(fingerprint="mine")
    with pytest.raises(CheckpointError, match=r"its weights and program differ"):
        list(tj.fit(*setting(), batches(), cache=foreign))


def test_without_anything_to_keep_the_reason_is_given():
    cache = tj.io.FeatureCache(fingerprint="weights:1 program:2")
    with pytest.raises(TransferError, match="nothing of this step can be computed once"):
        list(tj.fit(*setting(tuning=tj.full()), batches(), cache=cache))
    with pytest.raises(DataError, match=r"fit\(\) got no batch"):
        list(tj.fit(*setting(), [], cache=cache))


def test_what_draws_is_not_kept():
    step, state, frozen = setting(train=True)
    hoisted = tj.hoist(step, state, frozen, next(batches()))
    cache = tj.io.residual_cache(hoisted, state, frozen)
    losses = [float(metrics["loss"]) for _, metrics in tj.fit(step, state, frozen, batches(), cache=cache)]
    plain = [float(metrics["loss"]) for _, metrics in tj.fit(*setting(train=True), batches())]
    np.testing.assert_allclose(losses, plain, rtol=1e-6)


def test_rounded_residuals_are_close_and_bad_types_are_named():
    step, state, frozen = setting()
    first = next(batches())
    exact = tj.hoist(step, state, frozen, first)
    for dtype, tolerance in (("bfloat16", 1e-2), ("int8", 3e-2)):
        rounded = tj.hoist(step, state, frozen, first, residual_dtype=dtype)
        assert rounded.bytes_per_example < exact.bytes_per_example
        losses = [
            float(one.step(tj.copy(state), frozen, one.prefix(frozen, state.extra, step.objective, first))[1]["loss"])
            for one in (exact, rounded)
        ]
        np.testing.assert_allclose(*losses, rtol=tolerance)
    with pytest.raises(TransferError, match=r"hoist\(\) expects residual_dtype to be one of .*, got 'int3'\."):
        tj.hoist(step, state, frozen, first, residual_dtype="int3")
