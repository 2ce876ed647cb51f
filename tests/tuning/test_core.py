"""What each tuning over whole leaves selects, and how chains fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.program import LowRank, is_lifted, quantise_int8

PARAMS = {
    "stem": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)},
    "norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
    "blocks": {str(i): {"kernel": jnp.ones((4, 4))} for i in range(3)},
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)},
}
ORDER = ["stem/**", "norm/**", "blocks/0/**", "blocks/1/**", "blocks/2/**", "head/**"]

TABLE = [
    ("full", tj.full(), list(tj.paths(PARAMS))),
    ("train", tj.train("{stem,head}/kernel"), ["head/kernel", "stem/kernel"]),
    ("last 1", tj.last(1, ORDER), ["head/bias", "head/kernel"]),
    ("last 3", tj.last(3, ORDER), ["blocks/1/kernel", "blocks/2/kernel", "head/bias", "head/kernel"]),
    ("last all", tj.last(6, ORDER), list(tj.paths(PARAMS))),
    ("bias_only", tj.bias_only(), ["head/bias", "norm/bias", "stem/bias"]),
    ("norm_only", tj.norm_only(), ["norm/bias", "norm/scale"]),
]


def init(tuning, params=PARAMS):
    return tuning.init(jax.random.key(0), params)


@pytest.mark.parametrize("tuning, learns", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_learns_and_what_stays(tuning, learns):
    trainable, frozen = init(tuning)
    assert list(tj.paths(trainable)) == learns
    assert list(tj.paths(frozen)) == [path for path in tj.paths(PARAMS) if path not in learns]


def test_the_last_stages_follow_the_order_given_and_not_that_of_the_names():
    assert list(tj.paths(init(tj.last(1, ["head/**", "blocks/**"]))[0])) == [f"blocks/{i}/kernel" for i in range(3)]


@pytest.mark.parametrize("n", [0, 7, -1])
def test_more_stages_than_there_are_raise(n):
    with pytest.raises(tj.SelectionError) as error:
        tj.last(n, ORDER)
    assert str(error.value) == f"last() expects n between 1 and 6, the number of stages in order; got {n}."


@pytest.mark.parametrize(
    "tuning, name",
    [
        (tj.train("heads/**"), "'heads/**'"),
        (tj.bias_only(), "bias_only"),
        (tj.norm_only(), "norm_only"),
        (tj.lora("a", 1), "'a'"),
    ],
)
def test_a_tuning_that_selects_nothing_raises_at_init(tuning, name):
    with pytest.raises(tj.SelectionError, match=r"selector .* matched none of 1 parameter\. Nearest: head/kernel\."):
        init(tuning, {"head": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(tj.SelectionError) as error:
        init(tuning, {"head": {"kernel": jnp.ones((2, 2))}})
    assert str(error.value).startswith(f"selector {name} matched")


def test_a_chain_has_one_tree_per_group_and_one_frozen_tree():
    tuning = tj.chain(head=tj.train("head/**"), lora=tj.lora("blocks/{0..1}/kernel", 2), norm=tj.norm_only())
    trainable, frozen = init(tuning)
    assert list(tj.paths(trainable)) == [
        "head/head/bias", "head/head/kernel", "lora/blocks/0/kernel/lora_a", "lora/blocks/0/kernel/lora_b",
        "lora/blocks/1/kernel/lora_a", "lora/blocks/1/kernel/lora_b", "norm/norm/bias", "norm/norm/scale",
    ]  # fmt: skip
    assert list(tj.paths(frozen)) == [
        "blocks/0/kernel", "blocks/1/kernel", "blocks/2/kernel", "stem/bias", "stem/kernel",
    ]  # fmt: skip


def test_groups_have_keys_of_their_own_that_do_not_depend_on_their_order():
    a = init(tj.chain(one=tj.lora("stem/kernel", 2), two=tj.lora("head/kernel", 2)))[0]
    b = init(tj.chain(two=tj.lora("head/kernel", 2), one=tj.lora("stem/kernel", 2)))[0]
    for path, leaf in tj.paths(a).items():
        assert (leaf == tj.paths(b)[path]).all()
    c = init(tj.chain(three=tj.lora("stem/kernel", 2)))[0]["three"]["stem"]["kernel"]["lora_a"]
    assert (a["one"]["stem"]["kernel"]["lora_a"] != c).any()


@pytest.mark.parametrize(
    "groups, path",
    [
        ({"a": tj.train("head/**"), "b": tj.train("**/kernel")}, "head/kernel"),
        ({"a": tj.train("head/kernel"), "b": tj.lora("head/kernel", 1)}, "head/kernel"),
        ({"a": tj.lora("stem/kernel", 1), "b": tj.lora("{stem,head}/kernel", 1)}, "stem/kernel"),
        ({"a": tj.full(), "b": tj.bias_only()}, "head/bias"),
    ],
)
def test_a_leaf_claimed_by_two_groups_raises_and_names_both(groups, path):
    with pytest.raises(tj.SelectionError) as error:
        init(tj.chain(**groups))
    assert str(error.value) == (
        f"'{path}' is claimed by the groups 'a' and 'b'. "
        "Expected each leaf in one group: narrow one of their selectors."
    )


def test_a_chain_of_nothing_or_of_strangers_raises():
    with pytest.raises(tj.SelectionError, match=r"chain\(\) expects at least one group, for example chain\(head=train"):
        tj.chain()
    with pytest.raises(tj.SelectionError, match=r"chain\(\) expects a Tuning for group 'head', got str\."):
        tj.chain(head="head/**")  # type: ignore[arg-type]
    with pytest.raises(tj.SelectionError, match=r"group 'inner' returns a tree of another outline than the parameters"):
        init(tj.chain(inner=tj.chain(head=tj.train("head/**"))))


def test_merge_names_the_groups_it_expects():
    tuning = tj.chain(head=tj.train("head/**"), norm=tj.norm_only())
    trainable, frozen = init(tuning)
    with pytest.raises(
        tj.SelectionError, match=r"chain\(\) expects trainable groups \['head', 'norm'\], got \['head'\]"
    ):
        tuning.merge({"head": trainable["head"]}, frozen)
    with pytest.raises(tj.SelectionError, match=r"expects trainable groups \['head', 'norm'\], got list\."):
        tuning.merge([trainable], frozen)


@pytest.mark.parametrize("order", [tj.Model(abs, None, {}, {}), {"stem": 1.0}, "stem", 3])
def test_an_order_that_is_no_list_of_stages_raises(order):
    message = (
        rf"last\(\) expects order as a list of selectors, .*; got {type(order).__name__}\. Write tj\.models\.stages"
    )
    with pytest.raises(tj.SelectionError, match=message):
        tj.last(1, order)


def test_a_group_without_a_name_raises():
    with pytest.raises(
        tj.SelectionError, match=r"chain\(\) got Tuning without a name\. Name each group: chain\(head=tj\."
    ):
        tj.chain(tj.train("head"), tail=tj.train("tail"))


def test_a_chain_is_lifted_where_a_group_is():
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2)), "c": jnp.ones(2), "d": jnp.ones(2)}
    double = tj.tuning.adapter("d", lambda *_: {"by": jnp.full((), 2.0)}, lambda w, leaf: leaf * w["by"])
    groups = {"one": tj.lora("a", 1), "two": tj.lora("b", 2), "head": tj.train("c"), "scale": double}
    for names in (["one", "head", "two", "scale"], ["scale", "two", "head", "one"]):
        tuning = tj.chain(**{name: groups[name] for name in names})
        trainable, frozen = tuning.init(jax.random.key(0), params)
        found = tuning.lifted(jax.tree.map(lambda x: x + 1, trainable), frozen)
        assert isinstance(found["a"], LowRank) and isinstance(found["b"], LowRank)
        assert not is_lifted(found["c"]) and float(found["c"][0]) == 2.0 and float(found["d"][0]) == 3.0
    assert tj.chain(head=tj.train("c"), scale=double).lifted is None


def test_groups_pass_by_leaves_that_were_lifted_before():
    """A frozen tree may hold lifted leaves: an adapter with a lifted form builds on them, another gets the array."""
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2)), "c": jnp.ones((3, 2)), "d": jnp.ones(2)}
    double = tj.tuning.adapter("b", lambda *_: {"by": jnp.full((), 2.0)}, lambda w, leaf: leaf * w["by"])
    tuning = tj.chain(lora=tj.lora("a", 1), scale=double, head=tj.train("d"))
    trainable, frozen = tuning.init(jax.random.key(0), params)
    frozen = {**frozen, **{name: quantise_int8(frozen[name]) for name in "abc"}}
    found = tuning.lifted(trainable, frozen)
    assert isinstance(found["a"], LowRank) and found["a"].base is frozen["a"] and found["c"] is frozen["c"]
    np.testing.assert_allclose(found["b"], 2.0, rtol=1e-6)
