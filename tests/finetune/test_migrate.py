"""What a state keeps, begins and ends when it goes to another tuning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune import each_group, lp_ft, migrate

ADAM = optax.adam(0.1)


@pytest.fixture
def after(model, make_batches):
    """`after(tuning, tx, steps)`: the state and the frozen weights after some steps."""

    def run(tuning, tx, steps=2):
        state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
        step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
        for batch in make_batches(steps):
            state, _ = step(state, frozen, batch)
        return state, frozen

    return run


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(jnp.asarray(x), jnp.asarray(y))


def test_what_goes_on_keeps_its_state_and_what_begins_is_fresh(after):
    probe, both = lp_ft("head/**")
    tx = each_group(ADAM)
    old, frozen = after(probe, tx)
    new, rest = migrate(old, frozen, probe, both, tx)
    _same(old.opt_state["head"], new.opt_state["head"])
    _same(old.trainable["head"], new.trainable["head"])
    assert int(new.opt_state["head"][0].count) == 2 and int(new.opt_state["body"][0].count) == 0
    assert not np.any(new.opt_state["body"][0].mu["stem"]["kernel"])
    assert int(new.step) == 2 and float(new.extra["seen"]) == float(old.extra["seen"])
    _same(jax.random.key_data(new.key), jax.random.key_data(old.key))
    assert jax.tree.leaves(rest) == []


def test_a_leaf_that_ends_is_folded_into_the_frozen_weights(after, model):
    probe, both = lp_ft("head/**")
    tx = each_group(ADAM)
    old, frozen = after(both, tx)
    new, rest = migrate(old, frozen, both, probe, tx)
    _same(rest["stem"]["kernel"], old.trainable["body"]["stem"]["kernel"])
    assert np.any(rest["stem"]["kernel"] != model.params["stem"]["kernel"])
    assert sorted(new.opt_state) == ["head"] and int(new.opt_state["head"][0].count) == 2


def test_an_adapter_that_ends_is_merged_and_one_that_goes_on_keeps_its_base(after):
    lora = tj.lora("*/kernel", 2)
    before = tj.chain(adapters=lora)
    old, frozen = after(before, each_group(ADAM))
    merged = before.merge(old.trainable, frozen)
    same, rest = migrate(old, frozen, before, tj.chain(adapters=lora, bias=tj.train("head/bias")), each_group(ADAM))
    _same(same.trainable["adapters"], old.trainable["adapters"])
    _same(rest["stem"], frozen["stem"])
    again, rest = migrate(old, frozen, before, tj.chain(restart=lora), each_group(ADAM))
    _same(rest["stem"], merged["stem"])
    assert np.any(rest["stem"]["kernel"] != frozen["stem"]["kernel"])
    assert not np.any(again.trainable["restart"]["stem"]["kernel"]["lora_b"])
    assert int(again.opt_state["restart"][0].count) == 0


@pytest.mark.parametrize("tuning", [tj.full(), tj.chain(stem=tj.train("stem/**")), tj.lora("stem/kernel", 3)])
def test_the_merged_parameters_stay(after, tuning):
    before = tj.chain(adapters=tj.lora("*/kernel", 2), bias=tj.train("head/bias"))
    tx = optax.sgd(0.1)
    old, frozen = after(before, tx)
    if tuning.merge is tj.full().merge:
        with pytest.raises(tj.SelectionError, match="learns in group 'bias' of one tuning and in no group of the next"):
            migrate(old, frozen, before, tuning, tx)
        tuning = tj.chain(bias=tj.train("head/bias"), rest=tj.train(~tj.glob("head/bias")))
    new, rest = migrate(old, frozen, before, tuning, tx)
    _same(before.merge(old.trainable, frozen), tuning.merge(new.trainable, rest))


def test_an_adapter_of_another_rank_begins_anew(after):
    before, wider = tj.chain(lora=tj.lora("stem/kernel", 1)), tj.chain(lora=tj.lora("stem/kernel", 2))
    old, frozen = after(before, each_group(ADAM))
    new, rest = migrate(old, frozen, before, wider, each_group(ADAM))
    _same(before.merge(old.trainable, frozen), wider.merge(new.trainable, rest))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(new.opt_state))


def test_a_bfloat16_base_stays_so_under_an_adapter_that_goes_on(model):
    half = model._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))
    before, tx = tj.chain(lora=tj.lora("stem/kernel", 1)), each_group(ADAM)
    state, frozen = tj.init(jax.random.key(0), half, before, tx)
    _, rest = migrate(state, frozen, before, tj.chain(lora=tj.lora("stem/kernel", 1), head=tj.train("head/**")), tx)
    assert rest["stem"]["kernel"] is frozen["stem"]["kernel"]


def test_nothing_is_shared_with_the_state_before(after, model, make_batches):
    probe, both = lp_ft("head/**")
    tx = each_group(ADAM)
    old, frozen = after(both, tx)
    new, rest = migrate(old, frozen, both, probe, tx)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), both, tx)
    step(old, frozen, make_batches(1)[0])  # donates the state before
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, rest)))
    third, _ = migrate(new, rest, probe, both, tx)
    assert int(third.opt_state["body"][0].count) == 0


def test_it_traces(after):
    probe, both = lp_ft("head/**")
    tx = each_group(ADAM)
    old, frozen = after(probe, tx)
    shapes = jax.eval_shape(lambda *args: migrate(*args, probe, both, tx), old, frozen)
    form = lambda leaf: (jnp.shape(leaf), leaf.dtype)
    found = migrate(old, frozen, probe, both, tx)
    assert jax.tree.map(form, shapes) == jax.tree.map(form, found)


def test_hyperparameters_are_those_of_the_next_optimizer(after):
    rate = lambda value: each_group(optax.inject_hyperparams(optax.adam)(learning_rate=value))
    probe, both = lp_ft("head/**")
    old, frozen = after(probe, rate(0.5))
    new, _ = migrate(old, frozen, probe, both, rate(0.25))
    assert float(new.opt_state["head"].hyperparams["learning_rate"]) == 0.25
    assert int(new.opt_state["head"].inner_state[0].count) == 2


def test_another_optimizer_begins_anew(after):
    probe, both = lp_ft("head/**")
    old, frozen = after(probe, each_group(optax.sgd(0.1, momentum=0.9)))
    new, _ = migrate(old, frozen, probe, both, each_group(ADAM))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(new.opt_state))


def test_a_schedule_in_front_of_the_groups_goes_on(after):
    tx = optax.chain(each_group(ADAM), optax.scale_by_schedule(lambda step: 1.0 / (1 + step)))
    probe, both = lp_ft("head/**")
    old, frozen = after(probe, tx)
    new, _ = migrate(old, frozen, probe, both, tx)
    assert int(new.opt_state[1].count) == 2


def test_the_state_stays_on_its_device(after, model):
    there = jax.devices()[0]
    bound = model._replace(params=jax.device_put(model.params, there))
    probe, both = lp_ft("head/**")
    state, frozen = tj.init(jax.random.key(0), bound, probe, each_group(ADAM))
    new, rest = migrate(state, frozen, probe, both, each_group(ADAM))
    assert all(leaf.committed for leaf in jax.tree.leaves((new, rest)))


def test_a_shared_count_raises(after):
    old, frozen = after(tj.train("head/**"), ADAM)
    with pytest.raises(tj.SelectionError, match="one number for leaves that go on learning and for leaves that begin"):
        migrate(old, frozen, tj.train("head/**"), tj.full(), ADAM)


def test_nothing_that_goes_on_is_a_new_optimizer(after):
    old, frozen = after(tj.train("head/**"), ADAM)
    new, _ = migrate(old, frozen, tj.train("head/**"), tj.train("stem/**"), ADAM)
    assert int(new.opt_state[0].count) == 0


def test_another_scale_of_an_adapter_raises(after):
    before, louder = (tj.chain(lora=tj.lora("stem/kernel", 2, alpha=alpha)) for alpha in (2, 8))
    old, frozen = after(before, each_group(ADAM))
    with pytest.raises(tj.SelectionError, match="the adapter of 'stem/kernel' goes on, but gives another leaf"):
        migrate(old, frozen, before, louder, each_group(ADAM))


def test_wrong_arguments_are_named(after):
    probe, both = lp_ft("head/**")
    state, frozen = after(probe, each_group(ADAM))
    with pytest.raises(tj.TransferError, match="expects a FinetuneState first, got dict"):
        migrate(frozen, state, probe, both, ADAM)
    with pytest.raises(tj.TransferError, match="expects two Tunings, got str"):
        migrate(state, frozen, probe, "head", ADAM)
    with pytest.raises(tj.TransferError, match=r"migrate.* expects an optax transform, got Tuning"):
        migrate(state, frozen, probe, both, both)
    with pytest.raises(tj.SelectionError, match="the state was made by another tuning: chain"):
        migrate(state, frozen, both, probe, each_group(ADAM))
    with pytest.raises(tj.SelectionError, match="the state was made by another tuning: "):
        migrate(state, frozen, tj.full(), both, each_group(ADAM))


def test_each_group_wants_groups(model):
    with pytest.raises(
        tj.SelectionError, match=r"each_group.* expects a tuning with groups, got its parameters head, stem"
    ):
        tj.init(jax.random.key(0), model, tj.full(), each_group(ADAM))
    with pytest.raises(tj.SelectionError, match="expects a tuning with groups, got "):
        each_group(ADAM).init(jnp.ones(2))
    with pytest.raises(tj.TransferError, match=r"each_group.* expects an optax transform, got float"):
        each_group(0.1)
