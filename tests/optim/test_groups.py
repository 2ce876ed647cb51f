"""One transform per group."""

import jax
import jax.numpy as jnp
import optax
import pytest

import transferjax as tj

TREE = {"head": {"kernel": jnp.ones(2), "bias": tj.Hole()}, "lora": {"kernel": tj.Hole(), "bias": jnp.ones(3)}}


def test_each_group_has_its_own_transform_and_state():
    tx = tj.per_group(head=optax.sgd(1.0, momentum=0.5), lora=optax.adam(0.1))
    state = tx.init(TREE)
    gradients = jax.tree.map(lambda x: 3 * x, TREE)
    updates, state = tx.update(gradients, state, TREE)
    assert updates["head"]["kernel"].tolist() == [-3.0, -3.0]
    assert updates["lora"]["bias"].tolist() == pytest.approx([-0.1] * 3, rel=1e-4)
    assert list(tj.paths(state)) == [
        "head/0/trace/kernel", "lora/0/count", "lora/0/mu/bias", "lora/0/nu/bias",
    ]  # fmt: skip


def test_a_clip_in_front_sees_all_groups_and_one_inside_sees_its_own():
    gradients = {"a": jnp.full((), 3.0), "b": jnp.full((), 4.0)}
    clip = optax.clip_by_global_norm(1.0)
    common = optax.chain(clip, tj.per_group(a=optax.sgd(1.0), b=optax.sgd(1.0)))
    updates, _ = common.update(gradients, common.init(gradients), gradients)
    assert (float(updates["a"]), float(updates["b"])) == pytest.approx((-0.6, -0.8))
    own = tj.per_group(a=optax.chain(clip, optax.sgd(1.0)), b=optax.sgd(1.0))
    updates, _ = own.update(gradients, own.init(gradients), gradients)
    assert (float(updates["a"]), float(updates["b"])) == (-1.0, -4.0)


def test_further_arguments_reach_the_transforms():
    seen = []

    def update(updates, state, params=None, *, value=None, **_):
        seen.append((value, params))
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = tj.per_group(a=spy, b=optax.sgd(1.0))
    tx.update({"a": 1.0, "b": 1.0}, tx.init({"a": 0.0, "b": 0.0}), None, value=7)
    assert seen == [(7, None)]


def test_names_that_differ_from_the_tuning_raise():
    tx = tj.per_group(head=optax.sgd(1.0), norm=optax.sgd(1.0))
    with pytest.raises(tj.SelectionError) as error:
        tx.init({"head": 1.0, "lora": 2.0})
    assert str(error.value) == (
        "per_group() and the tuning name different groups. Only in the tuning: ['lora']. Only in per_group: ['norm']. "
        "Write per_group(head=..., lora=...), or name the groups of the tuning so: tj.chain(head=..., norm=...)."
    )
    with pytest.raises(tj.SelectionError, match=r"Only in the tuning: none\. Only in per_group: \['norm'\]\."):
        tx.init({"head": 1.0})
    with pytest.raises(
        tj.SelectionError, match=r"has the groups \['head', 'norm'\], but the tuning has none \(list came"
    ):
        tx.init([1.0])
    with pytest.raises(
        tj.SelectionError, match=r"per_group\(\) expects at least one group, for example per_group\(head="
    ):
        tj.per_group()


def test_a_tuning_without_groups_is_to_be_wrapped():
    params = {"stem": {"conv": {"kernel": jnp.ones(2)}}, "head": {"fc": {"kernel": jnp.ones(2)}, "bn": jnp.ones(2)}}
    trainable, _ = tj.train("head/**").init(jax.random.key(0), params)
    with pytest.raises(tj.SelectionError) as error:
        tj.per_group(head=optax.sgd(1.0)).init(trainable)
    assert str(error.value) == (
        "per_group() has the groups ['head'], but the tuning has none (its parameters head, stem came). "
        "Wrap the tuning: tj.chain(head=...), or use a plain optax transform."
    )


def test_a_number_is_no_transform():
    with pytest.raises(tj.SelectionError, match=r"optax transform for 'head', got float: write head=optax"):
        tj.per_group(head=0.1)
