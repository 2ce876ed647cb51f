"""Rules as JSON and as Python: what is written comes back, and what cannot be written is said."""

import json

import numpy as np
import pytest

from transferjax._errors import PlanError
from transferjax.surgery import (
    adapt,
    cast,
    dots_to_slashes,
    fresh,
    fuse,
    permute,
    plan,
    rename,
    repeat,
    reshape,
    select,
    split,
    stack,
    tie,
    torch_layout,
    unstack,
    waive,
)  # fmt: skip
from transferjax.surgery._rules_json import FACTORIES, rules_from_json, rules_to_json, rules_to_python
from transferjax.tree import everything, glob, regex

LAYER = r"blocks\.(?P<i>\d+)\.(.*)"
RULES = [
    rename(r"(\w+)\.weight", r"\1/kernel"),
    rename("it's", "its", otherwise=True),
    dots_to_slashes(),
    select(LAYER, [0, 2]),
    repeat(LAYER, 2),
    repeat(LAYER, {0: 1, 1: 0}),
    split(r"(.*)\.qkv", (r"\1/q", None, r"\1/v"), axis=0, sizes=(2, 2, 4)),
    unstack(r"layers\.(\w+)", r"layers/{i}/\1"),
    fuse([r"(.*)\.q", r"(.*)\.k"], r"\1/qk", axis=1),
    stack(r"layers\.(?P<i>\d+)\.(\w+)", r"layers/\2", axis=1),
    tie("head/kernel", "embed/embedding"),
    permute("**/kernel", (1, 0)),
    permute("**/kernel", {4: (2, 3, 1, 0), 2: None, 3: (2, 1, 0)}),
    torch_layout(),
    reshape("query/kernel", (8, 2, -1)),
    adapt("pos", "position_embedding", grid=(7, 7), method="bilinear"),
    adapt("vocab", "rows", mapping={0: 5, 3: 1}, axis=0),
    cast(regex(r".*\d"), "bfloat16"),
    cast("**"),
    fresh("{head,neck}/**"),
    waive("*.mask", optional=True),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_each_rule_comes_back_from_json(rule):
    assert rules_from_json(rules_to_json([rule])) == (rule,)


def test_all_come_back_in_order_and_each_factory_is_covered():
    text = rules_to_json(RULES)
    assert rules_from_json(text) == tuple(RULES) and rules_to_json(rules_from_json(text)) == text
    assert len(text.splitlines()) == len(RULES) + 2 and rules_from_json(rules_to_json([])) == ()
    assert {next(iter(line)) for line in json.loads(text)} == set(FACTORIES)


def test_a_file_written_by_hand_is_read():
    text = (
        '[{"dots_to_slashes": []}, {"torch_layout": ["**/kernel"]}, {"fresh": "head/**"}, {"waive": {"regex": "a."}}]'
    )
    assert rules_from_json(text) == (dots_to_slashes(), torch_layout(), fresh("head/**"), waive(regex("a.")))


def test_python_comes_back_when_it_is_run():
    names = {}
    exec(rules_to_python(RULES), names)
    assert names["RULES"] == tuple(RULES)
    exec(rules_to_python([]), names)
    assert names["RULES"] == ()


def test_they_make_the_plan_that_they_made():
    source = {"a.weight": np.zeros((2, 3)), "b.weight": np.zeros((3, 2)), "mask": np.zeros(1)}
    target = {"a/kernel": np.zeros((3, 2)), "b/kernel": np.zeros((2, 3))}
    rules = [rename(r"(\w)\.weight", r"\1/kernel"), permute("*/kernel", (1, 0)), waive("mask")]
    assert plan(source, target, *rules_from_json(rules_to_json(rules))) == plan(source, target, *rules)


@pytest.mark.parametrize(
    "rule",
    [
        rename("a", lambda match: "b"),
        reshape("a", lambda shape: shape[::-1]),
        fresh(glob("a") | glob("b")),
        fresh(everything & ~glob("b")),
        adapt("a", "rows", mapping=range(100)),
    ],
)
def test_what_is_no_data_stays_in_python(rule):
    with pytest.raises(PlanError, match=r"is not made of strings and numbers alone, so it is not written as JSON"):
        rules_to_json([rule])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "the rules are no JSON: Expecting value"),
        ("[" * 100_000, "the rules are no JSON"),
        ('{"fresh": ["a"]}', "the rules are dict in JSON. Expected a list: [{"),
        ('["fresh"]', 'rule 0 is "fresh". Expected an object such as {"rename": ['),
        ("[{}]", "rule 0 is {}. Expected an object"),
        ('[{"fresh": ["a"]}, {"fersh": ["a"]}]', "rule 1 is 'fersh'. Expected one of adapt, cast,"),
        ('[{"fersh": ["a"]}]', "Nearest: fresh."),
        (
            '[{"permute": ["a"]}]',
            "rule 0 of the file, permute, does not fit its factory: permute() missing 1 required",
        ),
        ('[{"waive": ["a"], "maybe": true}]', "rule 0 of the file, waive, does not fit its factory: waive() got an"),
        ('[{"permute": ["a", [0, 0]]}]', "rule 0 of the file, permute, does not fit"),
        ('[{"rename": ["(", "a"]}]', "rule 0 of the file, rename, does not fit its factory: rename('(', 'a')"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(PlanError) as error:
        rules_from_json(text)
    assert message in str(error.value)
