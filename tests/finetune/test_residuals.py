"""Fine-tuning through a cache takes the same steps, computes the frozen part once, and only from its own base."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax._errors import CheckpointError, DataError, TransferError
from transferjax.finetune import residuals

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


def test_residuals_are_what_fit_trains_on_and_say_what_they_need():
    step, state, frozen = setting()
    hoisted = tj.hoist(step, state, frozen, next(batches()))
    through = residuals(hoisted, state, frozen, batches(), tj.io.residual_cache(hoisted, state, frozen))
    found = [float(m["loss"]) for _, m in tj.fit(hoisted.step, state, hoisted.keep(frozen), through)]
    step, state, frozen = setting()
    cache = tj.io.residual_cache(hoisted, state, frozen)
    twice = residuals(hoisted, state, frozen, list(batches(1)), cache)
    assert len(list(twice)) == len(list(twice)) == 3, "each iter is a pass"
    assert found == [float(m["loss"]) for _, m in tj.fit(step, state, frozen, batches(), cache=cache)]
    with pytest.raises(TransferError, match=r"residuals\(\) expects a Hoisted first, got .*: write tj\.hoist"):
        residuals(step, state, frozen, batches(), cache)
    with pytest.raises(TransferError, match=r"residuals\(\) expects cache to be a FeatureCache, got dict: write"):
        residuals(hoisted, state, frozen, batches(), {})
    with pytest.raises(TransferError, match=r"fit\(\) expects cache to be a FeatureCache, got .*: write tj\.io"):
        next(tj.fit(step, state, frozen, batches(), cache=[]))
    step, state, frozen = setting(seed=1)
    with pytest.raises(CheckpointError, match=r"were computed by another run: its weights differ"):
        residuals(hoisted, state, frozen, batches(), cache)
    without = ({k: v for k, v in batch.items() if k != "id"} for batch in batches())
    with pytest.raises(DataError, match="expected a dict with 'id'"):
        next(iter(residuals(hoisted, state, frozen, without, tj.io.residual_cache(hoisted, state, frozen))))


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


def augmenting(extra_draw=lambda key, x: x, inner=True):
    """A frozen first layer on inputs that are shifted at random, example by example."""

    def run(params, extra, x, *, key=None, train=False):
        shift, later = jax.random.split(key)
        x = x + jax.random.normal(shift, x.shape) if inner else x
        return extra_draw(later, jnp.tanh(x @ params["stem"])) @ params["head"], extra

    keys = jax.random.split(jax.random.key(3), 2)
    params = {"stem": jax.random.normal(keys[0], (8, 6)), "head": jax.random.normal(keys[1], (6, 3))}
    tuning, tx = tj.train("head"), optax.sgd(0.1)
    model = tj.Model(run, None, params, {})
    return run, tj.make_step(tj.objectives.cross_entropy(run), tuning, tx), *tj.init(KEY, model, tuning, tx)


def by_hand(run, step, state, frozen, batch, copy):
    """The frozen features of each example by itself, with the key of its id and copy."""
    params = {"stem": frozen["stem"], "head": jnp.eye(6)}
    key = lambda one: jax.random.fold_in(jax.random.fold_in(state.key, one), copy)
    rows = [run(params, {}, x[None], key=key(int(one)))[0][0] for x, one in zip(batch["inputs"], batch["id"])]
    return np.stack(rows)


def test_each_copy_of_an_example_is_a_draw_of_its_own():
    run, step, state, frozen = augmenting()
    batch = next(batches())
    hoisted = tj.hoist(step, state, frozen, batch, copies=3)
    assert hoisted.copies == 3 and hoisted.bytes_per_example == 4 * 6 + 4 + 4
    assert hoisted.reasons[-1] == "what is early draws: 3 copies of each example are kept."
    found = [hoisted.prefix(frozen, {}, step.objective, batch, state.key, epoch)["hoisted_0"] for epoch in range(4)]
    for copy in range(3):
        expected = by_hand(run, step, state, frozen, batch, copy)
        np.testing.assert_allclose(found[copy], expected, rtol=1e-5, atol=1e-6)
        assert np.abs(expected - found[(copy + 1) % 3]).max() > 0.1
    np.testing.assert_array_equal(found[3], found[0])
    other = {name: value[::-1][:3] for name, value in batch.items()}
    again = hoisted.prefix(frozen, {}, step.objective, other, state.key, np.array([1, 0, 1]))["hoisted_0"]
    np.testing.assert_allclose(again, np.stack([found[1][3], found[0][2], found[1][1]]), rtol=1e-5, atol=1e-6)


def test_copies_with_examples_that_meet_after_the_cut():
    """For one example nothing shows where examples meet; the cut is that of the batch."""
    centred = lambda key, x: x - x.mean(0, keepdims=True)
    _, step, state, frozen = augmenting(centred)
    batch = next(batches())
    hoisted = tj.hoist(step, state, frozen, batch, copies=2)
    residual = hoisted.prefix(frozen, {}, step.objective, batch, state.key, 1)
    plain, *_ = augmenting()
    np.testing.assert_allclose(
        residual["hoisted_0"], by_hand(plain, step, state, frozen, batch, 1), rtol=1e-5, atol=1e-6
    )


def test_without_copies_randomness_is_refused_as_before():
    _, step, state, frozen = augmenting()
    hoisted = tj.hoist(step, state, frozen, next(batches()))
    assert "inputs" in hoisted.cut and hoisted.copies == 1
    assert any("draws randomness that enters at add" in reason for reason in hoisted.reasons)


def test_fit_uses_one_copy_after_the_other():
    run, step, state, frozen = augmenting()
    hoisted = tj.hoist(step, state, frozen, next(batches()), copies=2)
    cache = tj.io.residual_cache(hoisted, state, frozen)
    expected, head, first = [], np.asarray(state.trainable["head"]), tj.copy(state)
    for number, batch in enumerate(batches(5)):
        rows = by_hand(run, step, first, frozen, batch, number // 3 % 2)
        loss = lambda head, rows=rows, batch=batch: (
            jnp.sum(batch["weight"] * optax.softmax_cross_entropy_with_integer_labels(rows @ head, batch["labels"]))
            / jnp.sum(batch["weight"])
        )
        value, slope = jax.value_and_grad(loss)(head)
        expected, head = [*expected, float(value)], head - 0.1 * slope
    seen = list(batches(5))
    found = [float(metrics["loss"]) for _, metrics in tj.fit(step, state, frozen, seen, cache=cache)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert len(cache) == 24 and sorted(cache.missing(np.arange(25)).tolist()) == [24]
    late = [{**batch, "epoch": np.int32(number // 3)} for number, batch in enumerate(seen)][6:]
    _, _, state, frozen = augmenting()
    resumed = tj.io.residual_cache(hoisted, state, frozen)
    resumed.add, rows = (
        (lambda ids, arrays, add=resumed.add: rows.update(zip(ids.tolist(), arrays["hoisted_0"])) or add(ids, arrays)),
        {},
    )
    list(tj.fit(step, state, frozen, late, cache=resumed))
    np.testing.assert_array_equal(np.stack(list(rows.values())), cache.read(list(rows))["hoisted_0"])
    assert len(rows) == 24


def test_a_cache_knows_its_key_its_copies_and_its_type(tmp_path):
    _, step, state, frozen = augmenting()
    first = next(batches())
    make = lambda state, **options: tj.io.residual_cache(
        tj.hoist(step, state, frozen, first, **options), state, frozen, path=tmp_path / "cache"
    )
    list(tj.fit(step, tj.copy(state), frozen, batches(2), cache=make(state, copies=2)))
    assert len(make(state, copies=2)) == 24
    with pytest.raises(CheckpointError, match="program"):
        make(state, copies=3)
    other = tj.FinetuneState(state.step, jax.random.key(9), state.trainable, state.extra, state.opt_state)
    with pytest.raises(CheckpointError, match="weights"):
        make(other, copies=2)
    step, state, frozen = setting()
    rounded = tj.hoist(step, state, frozen, first, residual_dtype="bfloat16")
    cache = tj.io.residual_cache(rounded, state, frozen)
    list(tj.fit(step, state, frozen, batches(1), cache=cache))
    assert cache.shapes["hoisted_0"].dtype == jnp.bfloat16


@pytest.mark.parametrize("again", ["one draw", "one key"])
def test_a_draw_on_both_sides_of_the_cut_is_not_early(again):
    """The inputs and the outputs are shifted alike, as an image and its mask are flipped alike."""

    def run(params, extra, x, *, key=None, train=False):
        shift = jax.random.normal(jax.random.split(key)[0], x.shape[:1])
        other = shift if again == "one draw" else jax.random.normal(jax.random.split(key)[0], x.shape[:1])
        return jnp.tanh((x + shift[:, None]) @ params["stem"]) @ params["head"] * other[:, None], extra

    _, step, state, frozen = augmenting()
    step = tj.make_step(tj.objectives.cross_entropy(run), step.tuning, step.tx)
    batch = next(batches())
    hoisted = tj.hoist(step, state, frozen, batch, copies=2)
    assert hoisted.copies == 1 and "inputs" in hoisted.cut
    assert "draws from a key that is needed before the cut too, so nothing random is early." in hoisted.reasons[0]
    residual = hoisted.prefix(frozen, {}, step.objective, batch)
    late = hoisted.step(tj.copy(state), frozen, residual)[1]
    np.testing.assert_allclose(late["loss"], step(state, frozen, batch)[1]["loss"], rtol=1e-6)


def test_draws_after_the_cut_stay_those_of_the_step():
    thin = lambda key, x: x * jax.random.bernoulli(key, 0.5, x.shape)
    run, step, state, frozen = augmenting(lambda key, x: x, inner=False)
    hoisted = tj.hoist(step, state, frozen, next(batches()), copies=2)
    assert hoisted.copies == 1 and hoisted.reasons[-1] == "what is early draws nothing: one copy serves every epoch."

    def later(params, extra, x, *, key=None, train=False):
        outputs, extra = run(params, extra, x, key=key)
        return thin(key, outputs), extra

    step = tj.make_step(tj.objectives.cross_entropy(later), step.tuning, step.tx)
    batch = next(batches())
    hoisted = tj.hoist(step, state, frozen, batch, copies=2)
    late = hoisted.step(tj.copy(state), frozen, hoisted.prefix(frozen, {}, step.objective, batch))[1]
    np.testing.assert_allclose(late["loss"], step(state, frozen, batch)[1]["loss"], rtol=1e-6)


def test_what_copies_need():
    _, step, state, frozen = augmenting()
    batch = next(batches())
    with pytest.raises(TransferError, match=r"expects copies to be a whole number of at least 1, got 0"):
        tj.hoist(step, state, frozen, batch, copies=0)
    with pytest.raises(
        DataError, match=r"hoist\(\) with copies expects batches with 'id', by which each example draws"
    ):
        tj.hoist(step, state, frozen, {k: v for k, v in batch.items() if k != "id"}, copies=2)
    hoisted = tj.hoist(step, state, frozen, batch, copies=2)
    with pytest.raises(TransferError, match=r"what is early draws randomness\. Expected a key and batches with 'id'"):
        hoisted.prefix(frozen, {}, step.objective, batch)
    far = [{**batch, "id": batch["id"] + 2**61}]
    with pytest.raises(DataError, match=r"ids and 2 copies do not fit into 64 bits. Expected ids below"):
        list(tj.fit(step, tj.copy(state), frozen, far, cache=tj.io.residual_cache(hoisted, state, frozen)))
    vague = [batch, {**batch, "id": batch["id"] + 0.5}]
    with pytest.raises(DataError, match=r"ids are \(4,\) float64; expected integers of shape \[B\], one per example"):
        list(tj.fit(step, tj.copy(state), frozen, vague, cache=tj.io.residual_cache(hoisted, state, frozen)))


def counted_batches(epochs):
    """Batches of twelve examples, and the list of the rows that were read."""
    x = np.asarray(jax.random.normal(KEY, (12, 8)))
    source, read = tj.data.arrays(x, np.arange(12) % 3, ids=np.arange(12) + 100), []

    class Watched:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            read.append(index)
            return source.records[index]

        def __getattr__(self, name):
            return getattr(source.records, name)

    watched = dataclasses.replace(source, records=Watched())
    return tj.data.batches(watched, 4, seed=0, epochs=epochs, cache_bytes=0, threads=0), read


@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize("through", [lambda batches: batches, tj.data.to_device])
def test_what_the_cache_has_is_not_read_again(place, through, tmp_path):
    step, state, frozen = setting()
    plain = [float(m["loss"]) for _, m in tj.fit(step, state, frozen, counted_batches(3)[0])]
    step, state, frozen = setting()
    given, read = counted_batches(3)
    hoisted = tj.hoist(step, state, frozen, next(iter(given)))
    path = None if place == "memory" else tmp_path / "cache"
    cache = tj.io.residual_cache(hoisted, state, frozen, path=path)
    read.clear()
    found = [float(m["loss"]) for _, m in tj.fit(step, tj.copy(state), frozen, through(given), cache=cache)]
    np.testing.assert_allclose(found, plain, rtol=1e-6)
    ahead = 2 if through is tj.data.to_device else 0
    assert len(read) == 1 + 12 + 4 * ahead, "one for its features, the first epoch, what was prepared ahead of it"
    read.clear()
    again = residuals(hoisted, state, frozen, through(given), cache)
    kept = hoisted.keep(frozen)
    assert [float(m["loss"]) for _, m in tj.fit(hoisted.step, state, kept, again)] == found
    assert len(read) == 1


def test_examples_with_weights_are_read_for_them():
    x = np.ones((8, 8), np.float32)
    source = tj.data.arrays({"inputs": x}, np.zeros(8, int))
    weighted = dataclasses.replace(source.records, features={**source.records.features, "weight": np.ones(8)})
    given = tj.data.batches(dataclasses.replace(source, records=weighted), 4, seed=0)
    assert all("weight" in batch for batch in given.unread(lambda ids: True))


def test_a_resumed_pass_starts_where_it_was():
    given, _ = counted_batches(2)
    passing = tj.data.to_device(given).unread(lambda ids: True)
    seen = [next(passing)["id"].tolist() for _ in range(2)]
    given.set_state({**given.get_state(), "position": 2})
    assert seen + [b["id"].tolist() for b in given.unread(lambda ids: True)] == [
        batch["id"].tolist() for batch in counted_batches(2)[0]
    ]


def test_a_cache_of_something_else_is_refused():
    step, state, frozen = setting()
    hoisted = tj.hoist(step, state, frozen, next(batches()))
    with pytest.raises(TransferError, match=r"residual_cache\(\) expects a Hoisted first, got Step: write tj\.hoist"):
        tj.io.residual_cache(step, state, frozen)
    with pytest.raises(TransferError, match=r"residual_cache\(\) expects a FinetuneState second, got dict: write res"):
        tj.io.residual_cache(hoisted, frozen, state)
