"""Plans as JSON: exact, readable, and checked when read."""

import json

import jax
import numpy as np
import pytest

from transferjax._errors import PlanError
from transferjax.surgery import Plan, fresh, plan, rename, torch_layout, waive

S = jax.ShapeDtypeStruct


@pytest.fixture
def made():
    source = {"é.weight": S((3, 2), np.float32), "n": S((), np.int64)}
    target = {"fc": {"kernel": S((2, 3), np.float32), "bias": S((3,), np.float32)}}
    return plan(source, target, rename(r"é\.weight", "fc/kernel"), torch_layout(), waive("n"), fresh("fc/bias"))


def test_round_trip_is_exact(made):
    for one in (made, made.with_source("sha256:00")):
        back = Plan.from_json(one.to_json())
        assert back == one and hash(back) == hash(one)
        assert back.to_json() == one.to_json()
        assert str(back) == str(one)


def test_lite0_round_trips(lite0_source, lite0_target, lite0_rules):
    made = plan(lite0_source, lite0_target, *lite0_rules)
    assert Plan.from_json(made.to_json()) == made
    assert made.to_json().count("\n") > 247 + 296


def test_an_empty_plan_round_trips():
    assert Plan.from_json(plan({}, {}).to_json()) == plan({}, {})


def edited(made, edit):
    data = json.loads(made.to_json())
    edit(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format="other"),
         'the JSON is no plan: expected an object with "format": "transferjax.plan"'),
        (lambda d: d.update(version=2), "the plan has version 2; this transferjax reads version 1."),
        (lambda d: d.pop("version"), "the plan has version None"),
        (lambda d: d.pop("moves"), "the plan has the entries fingerprint, sources, targets, waived; expected"),
        (lambda d: d.update(more=1), "the plan has the entries fingerprint, more, moves, sources, targets, waived;"),
        (lambda d: d.update(fingerprint=3), "the fingerprint in the plan is int; expected a string."),
        (lambda d: d.update(moves={}), "the moves of the plan are dict; expected a list."),
        (lambda d: d.update(targets=[]), "the targets of the plan are list; expected an object of [shape, dtype]."),
        (lambda d: d["targets"].update({"fc/bias": [3]}), "'fc/bias' in the targets of the plan is malformed"),
        (lambda d: d["targets"].update({"fc/bias": [[-1], "float32"]}), "has the shape (-1,); expected sizes"),
        (lambda d: d["targets"].update({"fc/bias": ["3", "float32"]}), "shape '3' is malformed"),
        (lambda d: d["targets"].update({"fc/bias": [[3], 4]}), "the dtype of 'fc/bias' in the plan is int"),
        (lambda d: d["moves"].append(["x"]), "move 2 of the plan is malformed: expected [target, source, operations]."),
        (lambda d: d["moves"].append([1, None, []]), "the target of move 2 in the plan is int"),
        (lambda d: d["moves"].append(["x", 3, []]), "the source of move 2 in the plan is int"),
        (lambda d: d["moves"].append(["x", [], []]), "move 2 of the plan has an empty list of sources"),
        (lambda d: d["moves"].append(["x", None, None]), "the operations of move 2 of the plan are NoneType"),
        (lambda d: d["moves"].append(["x", None, []]), "the plan does not have one move per target leaf: see x."),
        (lambda d: d["moves"].append(d["moves"][0]), "the plan does not have one move per target leaf: see fc/bias."),
        (lambda d: d["moves"].pop(), "the plan does not have one move per target leaf: see fc/kernel."),
        (lambda d: d["moves"][1].__setitem__(1, "w"), "the plan does not use or waive each source leaf once: see w."),
        (lambda d: d["waived"].pop(), "the plan does not use or waive each source leaf once: see n."),
        (lambda d: d["waived"].append("n"), "the plan does not use or waive each source leaf once: see n."),
        (lambda d: d["waived"].append("é.weight"),
         "the plan does not use or waive each source leaf once: see é.weight."),
        (lambda d: d["waived"].append(3), "the waived name in the plan is int"),
        (lambda d: d["moves"][0].__setitem__(2, [["cast", "float32"]]), "'fc/bias' is fresh and has operations"),
        (lambda d: d["moves"][1].__setitem__(2, []),
         "'fc/kernel' expects (2, 3) float32; its move makes (3, 2) float32."),
        (lambda d: d["moves"][1].__setitem__(2, [["turn", 1]]), "operation 'turn' is unknown."),
        (lambda d: d["moves"][1].__setitem__(2, [["permute", [1, 1]]]), "axes (1, 1) are no permutation"),
    ],
)  # fmt: skip
def test_a_damaged_plan_raises(made, edit, message):
    with pytest.raises(PlanError) as error:
        Plan.from_json(edited(made, edit))
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1", None, 3, "[" * 100_000])
def test_text_that_is_no_json_raises(text):
    with pytest.raises(PlanError, match="the text of the plan is no JSON"):
        Plan.from_json(text)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"a"'])
def test_json_that_is_no_plan_raises(text):
    with pytest.raises(PlanError, match="the JSON is no plan"):
        Plan.from_json(text)
