"""Layers under other numbers: a few of them, or some of them several times."""

import jax
import numpy as np
import pytest

from transferjax._errors import PlanError
from transferjax.surgery import Lead, Plan, Spec, permute, plan, rename, waive
from transferjax.surgery._layers import repeat, select
from transferjax.testing import check_plan

BLOCKS = r"blocks/(?P<i>\d+)/.*"


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, np.dtype("float32"))


def network(depth):
    return {f"blocks/{i}/kernel": leaf(2, 3) for i in range(depth)} | {"head/bias": leaf(4)}


def sources(made):
    return {move.target: move.source for move in made.moves}


def test_select_leads_the_chosen_layers_and_waives_the_others():
    made = check_plan(network(6), network(3), [select(BLOCKS, [0, 2, 4])])
    assert sources(made) == {
        "blocks/0/kernel": "blocks/0/kernel",
        "blocks/1/kernel": "blocks/2/kernel",
        "blocks/2/kernel": "blocks/4/kernel",
        "head/bias": "head/bias",
    }
    assert made.waived == ("blocks/1/kernel", "blocks/3/kernel", "blocks/5/kernel")


def test_select_may_change_the_order():
    made = check_plan(network(3), network(2), [select(BLOCKS, (2, 0))])
    assert [move.source for move in made.moves] == ["blocks/2/kernel", "blocks/0/kernel", "head/bias"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(2, [0, 0, 1, 1]), ([0, 1, 0, 1], [0, 1, 0, 1]), ({0: 0, 1: 0, 2: 1}, [0, 0, 1]), (range(2, 0, -1), None)],
)
def test_repeat_fills_several_layers_from_one(layers, expected):
    if expected is None:
        made = plan(network(3), network(2), repeat(BLOCKS, layers))
        assert [move.source for move in made.moves[:2]] == ["blocks/2/kernel", "blocks/1/kernel"]
        assert made.waived == ("blocks/0/kernel",)
        return
    made = check_plan(network(2), network(len(expected)), [repeat(BLOCKS, layers)])
    assert [move.source for move in made.moves[:-1]] == [f"blocks/{old}/kernel" for old in expected]
    arrays = {name: np.full(spec.shape, n, np.float32) for n, (name, spec) in enumerate(network(2).items())}
    out = made.apply(arrays)
    assert [int(out[f"blocks/{i}/kernel"][0, 0]) for i in range(len(expected))] == expected


def test_other_rules_change_the_layers_on_the_way_and_the_plan_is_json():
    source = {f"h.{i}.w": leaf(3, 2) for i in range(4)} | {"h.mask": leaf(1), "out": leaf(4)}
    target = {f"h.{i}.w": leaf(2, 3) for i in range(2)} | {"bias": leaf(4)}
    rules = [select(r"h\.(?P<i>\d+)\.w", [1, 3]), permute("h.*", (1, 0)), rename("out", "bias"), waive("h.mask")]
    made = check_plan(source, target, rules)
    assert sources(made) == {"h.0.w": "h.1.w", "h.1.w": "h.3.w", "bias": "out"}
    assert Plan.from_json(made.to_json()) == made


def test_a_name_with_leading_zeros_keeps_its_width():
    assert select(r"b(?P<i>\d+)", [3, 11]).names("b03") == ("b00",)
    assert repeat(r"b(?P<i>\d+)", 2).names("b05") == ("b10", "b11")
    assert repeat(r"b(?P<i>\d+)", 2).names("b0") == ("b0", "b1")


def test_a_rule_leads_and_prints_as_it_is_written():
    rule = repeat(BLOCKS, {1: 0, 0: 0})
    assert rule.leads("blocks/0/bias", Spec((1,), "float32")) == (Lead("blocks/0/bias"), Lead("blocks/1/bias"))
    assert rule.leads("head/bias", Spec((1,), "float32")) is None and rule.names("head/bias") is None
    assert repr(rule) == r"repeat(r'blocks/(?P<i>\d+)/.*', {1: 0, 0: 0})"
    assert repr(select(BLOCKS, (0, 2))) == r"select(r'blocks/(?P<i>\d+)/.*', [0, 2])"
    assert select(BLOCKS, [0, 2]) == select(BLOCKS, (0, 2)) and len({rule, select(BLOCKS, [1])}) == 2


def test_layers_that_all_stay_are_an_idle_rule():
    with pytest.raises(PlanError, match=r"select\(.*\) does nothing"):
        plan(network(2), network(2), select(BLOCKS, [0, 1]))


def test_a_layer_that_the_source_lacks_is_a_target_without_a_source():
    with pytest.raises(PlanError, match=r"target 'blocks/1/kernel' .* has no source"):
        plan(network(4), network(2), select(BLOCKS, [0, 9]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: select(BLOCKS, 3), "expects a list of layers, got int."),
        (lambda: select(BLOCKS, [0, 2, 0]), "names layer 0 twice. Write repeat(...) to use a layer several times."),
        (lambda: select(BLOCKS, []), "expects at least one layer, and whole numbers of at least 0."),
        (lambda: select(BLOCKS, [0, -1]), "expects at least one layer, and whole numbers of at least 0."),
        (lambda: select("blocks/.*", [0]), "has no group i in its pattern. Write (?P<i>\\d+)"),
        (lambda: select("(", [0]), "select('(', [0]) is malformed"),
        (lambda: repeat(BLOCKS, 1), "expects a number of at least 2, a list of old layers, or {new layer: old layer}."),
        (lambda: repeat(BLOCKS, "01"), "expects a number of at least 2, a list"),
        (lambda: repeat(BLOCKS, {"a": 1, 2: 0}), "expects at least one layer, and whole numbers"),
        (lambda: repeat(3, 2), "repeat(3, 2) is malformed"),
        (lambda: select("b(?P<i>[a-z]*)", [0]).names("bx"), "finds no number in its group i: 'x'. Write (?P<i>\\d+)."),
        (lambda: select("b(?P<i>\\d+)?", [0]).names("b"), "finds no number in its group i: None."),
    ],
)
def test_a_malformed_rule_raises(make, message):
    with pytest.raises(PlanError) as error:
        make()
    assert message in str(error.value)
