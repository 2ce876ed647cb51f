"""What ``--tuning`` and ``--learning-rate`` mean, and what they say about mistakes."""

import argparse

import jax
import jax.numpy as jnp
import pytest

import transferjax as tj
from transferjax.cli._tuning import learning_rates, make_optimizer, make_tuning, parse_tuning, rates_text

PARAMS = {
    "stem": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
    "blocks": {"0": {"expand": {"kernel": jnp.ones((6, 8))}, "bn": {"scale": jnp.ones(8), "bias": jnp.ones(8)}}},
    "head": {"fc": {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)}},
}
ORDER = ["stem/**", "blocks/0/**", "head/**"]

CASES = {
    "head": {"head/head/fc/bias", "head/head/fc/kernel"},
    "last:1": {"last/head/fc/bias", "last/head/fc/kernel"},
    "bias": {"bias/stem/bias", "bias/head/fc/bias", "bias/blocks/0/bn/bias"},
    "norm": {"norm/blocks/0/bn/bias", "norm/blocks/0/bn/scale"},
    "train:stem/**": {"train/stem/bias", "train/stem/kernel"},
    "lora:2": {"lora/blocks/0/expand/kernel/lora_a", "lora/blocks/0/expand/kernel/lora_b"},
    "head+lora:2:stem/kernel": {
        "head/head/fc/bias",
        "head/head/fc/kernel",
        "lora/stem/kernel/lora_a",
        "lora/stem/kernel/lora_b",
    },
    "full": {f"full/{path}" for path in tj.paths(PARAMS)},
}


@pytest.mark.parametrize("text", CASES)
def test_each_text_trains_exactly_what_it_names(text):
    trainable, _ = make_tuning(text, lambda: ORDER).init(jax.random.key(0), PARAMS)
    assert set(tj.paths(trainable)) == CASES[text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heda", "'heda' in 'heda' is no tuning; expected head"),
        ("last", "'last' in 'last' is no tuning"),
        ("last:0", "'last:0' in 'last:0' is no tuning"),
        ("head+lora:x", "'lora:x' in 'head\\+lora:x' is no tuning"),
        ("lora:0", "'lora:0' in 'lora:0': lora needs a rank of at least 1, for example lora:8"),
        ("head+lora:0:stem/kernel", "lora needs a rank of at least 1"),
        ("lora", "lora needs a rank of at least 1"),
        ("head:1", "'head:1' in 'head:1' is no tuning"),
        ("head+head", "names a part twice"),
        ("full+head", "full is everything already"),
        ("", "'' in '' is no tuning"),
    ],
)
def test_a_text_that_is_no_tuning_says_what_is_allowed(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse_tuning(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {"head": 1e-3, "lora": 1e-3}),
        ("1e-2", {"head": 1e-2, "lora": 1e-2}),
        ("head=1e-2,lora=1e-3", {"head": 1e-2, "lora": 1e-3}),
        ("3e-4,head=1e-2", {"head": 1e-2, "lora": 3e-4}),
    ],
)
def test_learning_rates_are_overall_or_by_group(text, expected):
    assert learning_rates(text, ["head", "lora"]) == expected


def test_a_rate_for_a_group_that_is_not_there_raises():
    with pytest.raises(tj.SelectionError, match=r"names the group 'lora', but the tuning has: head"):
        learning_rates("lora=1e-3", ["head"])


def test_a_group_without_a_rate_raises():
    message = r"gives none for the group 'lora'. Write one for every group of --tuning \(head=1e-3,lora=1e-3\), or a"
    with pytest.raises(tj.SelectionError, match=message):
        learning_rates("head=1e-2", ["head", "lora"])


@pytest.mark.parametrize("text", ["", "x", "-1", "head=", "=1", "inf", "nan", "head=1e-3,,"])
def test_a_text_that_is_no_rate_says_what_is_expected(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no learning rate; expected a number above 0"):
        rates_text(text)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_every_optimizer_has_one_schedule_per_group(name):
    trainable = {"a": jnp.ones(()), "b": jnp.ones(())}
    tx = make_optimizer(name, {"a": 1e-2, "b": 1e-3}, 10, 0.0)
    updates, _ = tx.update(trainable, tx.init(trainable), trainable)
    assert float(updates["a"]) == pytest.approx(10 * float(updates["b"]), rel=1e-4) != 0
