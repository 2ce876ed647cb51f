"""The rule adapt: the operation it makes from both shapes, how it prints, and plans with it as JSON."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax._errors import PlanError
from transferjax.surgery import Move, Plan, Spec, adapt, plan, rename, torch_layout
from transferjax.surgery._adapt import Adapt
from transferjax.surgery._ops import infer, run
from transferjax.surgery._resize import (
    adapt_input_channels,
    resize_patch_embedding,
    resize_position_embedding,
    resize_rows,
)
from transferjax.testing import check_plan

F = "float32"
CASES = [
    (adapt("p", "position_embedding"), (1, 50, 4), (1, 145, 4),
     ("resize_position_embedding", (7, 7), (12, 12), 1, "bicubic"),
     lambda a: resize_position_embedding(a, (12, 12))),
    (adapt("p", "position_embedding", prefix=2, grid=[2, 4], method="align_corners"), (11, 4), (10, 4),
     ("resize_position_embedding", (3, 3), (2, 4), 2, "align_corners"),
     lambda a: resize_position_embedding(a, (2, 4), prefix=2, method="align_corners")),
    (adapt("p", "position_embedding", prefix=0, old_grid=(2, 8), method="bilinear"), (16, 4), (16, 4),
     ("resize_position_embedding", (2, 8), (4, 4), 0, "bilinear"),
     lambda a: resize_position_embedding(a, (4, 4), old_grid=(2, 8), prefix=0, method="bilinear")),
    (adapt("p", "patch_embedding"), (8, 8, 3, 4), (5, 6, 3, 4),
     ("resize_patch_embedding", (5, 6)), lambda a: resize_patch_embedding(a, (5, 6))),
    (adapt("p", "input_channels"), (3, 3, 3, 4), (3, 3, 5, 4),
     ("adapt_input_channels", 5), lambda a: adapt_input_channels(a, 5)),
    (adapt("p", "rows"), (4, 3), (6, 3), ("resize_rows", 6, "mean", None, 0), lambda a: resize_rows(a, 6)),
    (adapt("p", "rows", fill="zeros", mapping={1: 3}, axis=1), (2, 4), (2, 3),
     ("resize_rows", 3, "zeros", (-1, 3, -1), 1), lambda a: resize_rows(a, 3, "zeros", {1: 3}, axis=1)),
    (adapt("p", "rows", mapping=[3, None]), (4, 3), (2, 3),
     ("resize_rows", 2, "mean", (3, -1), 0), lambda a: resize_rows(a, 2, mapping=[3, None])),
    (adapt("p", "rows", mapping=range(3, -1, -1)), (4,), (4,),
     ("resize_rows", 4, "mean", (3, 2, 1, 0), 0), lambda a: a[::-1]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "came", "expected", "op", "function"), CASES)
def test_the_operation_does_what_the_function_does(rule, came, expected, op, function):
    assert rule.op_for(Spec(came, F), Spec(expected, "bfloat16")) == op
    assert infer([op], [Spec(came, F)]) == Spec(expected, F)
    array = np.random.default_rng(0).standard_normal(came).astype(np.float32)
    for value in (array, jnp.asarray(array)):
        out = run([op], [value])
        assert isinstance(out, type(value)) and np.array_equal(out, function(value))


@pytest.mark.parametrize(("rule", "came", "expected", "op", "function"), CASES)
def test_a_plan_with_it_round_trips_through_json(rule, came, expected, op, function):
    made = Plan((Move("p", "s", (op,)),), (), {"p": Spec(expected, F)}, {"s": Spec(came, F)})
    again = Plan.from_json(made.to_json())
    assert again == made and again.to_json() == made.to_json()
    array = np.random.default_rng(0).standard_normal(came).astype(np.float32)
    assert np.array_equal(again.apply({"s": array})["p"], function(array))


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (adapt("p", "position_embedding"), (1, 12, 4)),
        (adapt("p", "position_embedding", old_grid=(2, 4), grid=(2, 4)), (9, 4)),
        (adapt("p", "patch_embedding"), (8, 8, 3, 4)),
        (adapt("p", "input_channels"), (3, 3, 9, 4)),
        (adapt("p", "rows"), (4, 3)),
        (adapt("p", "rows", mapping=[0, 1, 2, 3]), (4, 3)),
    ],
)
def test_a_leaf_of_the_right_size_is_left_as_it_is(rule, shape):
    assert rule.op_for(Spec(shape, F), Spec(shape, F)) is None


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (adapt("a/*", "patch_embedding"), "adapt('a/*', 'patch_embedding')"),
        (adapt("a", "position_embedding", method="bilinear", grid=[2, 3]),
         "adapt('a', 'position_embedding', grid=(2, 3), method='bilinear')"),
        (adapt("a", "rows", mapping={2: 0, 1: 5}), "adapt('a', 'rows', mapping={1: 5, 2: 0})"),
        (adapt("a", "rows", mapping=[1, None], axis=1), "adapt('a', 'rows', mapping=(1, None), axis=1)"),
        (adapt("a", "rows", mapping=range(5000)), "adapt('a', 'rows', mapping=<5,000 rows>)"),
    ],
)  # fmt: skip
def test_the_rule_prints_as_it_is_written(rule, text):
    assert repr(rule) == text


def test_rules_compare_and_hash():
    one, two = adapt("a", "rows", mapping={1: 2, 0: 3}), adapt("a", "rows", mapping={0: 3, 1: 2})
    assert one == two and len({one, two, adapt("a", "rows")}) == 2
    assert isinstance(one, Adapt) and hash(adapt("a", "position_embedding", grid=[1, 2]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapt("a", "position"), "adapt('a', 'position') is unknown. Expected one of 'position_embedding', "
         "'patch_embedding', 'input_channels', 'rows'. Nearest: position_embedding."),
        (lambda: adapt("a", "rows", method="mean"),
         "adapt('a', 'rows') has no option 'method'. Its options: fill, mapping, axis."),
        (lambda: adapt("a", "patch_embedding", size=3), "has no option 'size'. Its options: none."),
        (lambda: adapt("a", "position_embedding", method="cubic"), "method='cubic') has an unknown method. Expected"),
        (lambda: adapt("a", "position_embedding", method=[3]), "method=(3,)) has an unknown method."),
        (lambda: adapt("a", "position_embedding", grid=7), "grid 7 is malformed"),
        (lambda: adapt("a", "position_embedding", old_grid=(7,)), "old_grid (7,) is malformed"),
        (lambda: adapt("a", "position_embedding", prefix="1"), "prefix '1' is malformed"),
        (lambda: adapt("a", "rows", axis=-1), "axis -1 is malformed"),
        (lambda: adapt("a", "rows", fill=np.zeros((2, 3))),
         "adapt('a', 'rows') has a fill that a plan cannot hold. Expected 'mean' or 'zeros'"),
        (lambda: adapt("a", "rows", mapping={"b": 1}), "the mapping has 'b': 1; expected {new row: old row}, whole"),
        (lambda: adapt("a", "rows", mapping={}), "the mapping has no row; expected {new row: old row}"),
        (lambda: adapt("a", "rows", mapping="ab"), "the mapping is str"),
        (lambda: adapt("a", "rows", mapping=["a"]), "the mapping is malformed"),
    ],
)  # fmt: skip
def test_a_malformed_rule_raises_where_it_is_written(make, message):
    with pytest.raises(PlanError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rule", "came", "expected", "message"),
    [
        (adapt("p", "position_embedding"), (1, 13, 4), (1, 50, 4), "12 tokens after 1 prefix tokens form no square "
         "grid: (1, 13, 4) came. Write old_grid=(h, w)"),
        (adapt("p", "position_embedding"), (1, 50, 4), (1, 13, 4), "Write grid=(h, w), and the right prefix."),
        (adapt("p", "rows"), (4, 3), (3, 3, 3), "adapt('p', 'rows') needs a leaf of as many axes as its target; "
         "(4, 3) float32 came for (3, 3, 3) float32. Write it after the reshape and permute rules"),
        (adapt("p", "rows", axis=2), (4, 3), (5, 3), "rows along axis 2 are expected; the target is (5, 3) float32."),
        (adapt("p", "rows", mapping={5: 0}), (4, 3), (5, 3), "the mapping names the new row 5"),
        (adapt("p", "rows", mapping=[1, 2]), (4, 3), (5, 3), "the mapping has 2 entries; expected 5"),
        (adapt("p", "input_channels"), (4, 3), (5, 3), "is [h, w, in, out]; (5, 3) float32 is expected of it."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(rule, came, expected, message):
    with pytest.raises(PlanError) as error:
        rule.op_for(Spec(came, F), Spec(expected, F))
    assert message in str(error.value)


def test_the_operation_needs_the_target():
    with pytest.raises(PlanError, match=r"adapt\('p', 'rows'\) depends on the size of its target. Call op_for\("):
        adapt("p", "rows").op(Spec((4, 3), F))


def leaf(*shape, dtype=F):
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def test_a_plan_resizes_what_has_another_size_and_copies_what_has_not():
    source = {"pos": leaf(1, 50, 4), "conv.weight": leaf(6, 3, 4, 4), "vocab": leaf(10, 4), "head": leaf(4, 7)}
    target = {"pos": leaf(1, 145, 4), "conv/kernel": leaf(8, 8, 1, 6), "vocab": leaf(12, 4), "head": leaf(4, 7)}
    rules = [
        rename(r"conv\.weight", "conv/kernel"),
        torch_layout("conv/kernel"),
        adapt("conv/kernel", "patch_embedding"),
        adapt("conv/kernel", "input_channels"),
        adapt("pos", "position_embedding"),
        adapt("{vocab,head}", "rows", mapping=None),
    ]
    made = check_plan(source, target, rules)
    assert {move.target: move.ops for move in made.moves} == {
        "conv/kernel": (("permute", (2, 3, 1, 0)), ("resize_patch_embedding", (8, 8)), ("adapt_input_channels", 1)),
        "head": (),
        "pos": (("resize_position_embedding", (7, 7), (12, 12), 1, "bicubic"),),
        "vocab": (("resize_rows", 12, "mean", None, 0),),
    }


def test_where_every_size_fits_the_rule_may_stay_but_its_selector_has_to_match():
    side = {"pos": leaf(1, 50, 4)}
    assert check_plan(side, side, [adapt("pos", "position_embedding")]).counts()["copied"] == 1
    with pytest.raises(PlanError, match=r"adapt\('poss', 'position_embedding'\) does nothing: it matched none"):
        plan(side, side, adapt("poss", "position_embedding"))


def test_a_leaf_that_cannot_be_resized_is_named():
    with pytest.raises(PlanError, match=r"target 'pos' from source 'pos': 12 tokens after 1 prefix tokens form no"):
        plan({"pos": leaf(1, 13, 4)}, {"pos": leaf(1, 50, 4)}, adapt("pos", "position_embedding"))


@pytest.mark.parametrize(("came", "expected"), [((5, 5, 1, 144), (3, 3, 1, 144)), ((3, 3, 64, 8), (5, 5, 64, 8))])
def test_a_convolution_inside_of_a_network_is_not_said_to_be_a_patch_embedding(came, expected):
    with pytest.raises(PlanError) as error:
        plan({"p": leaf(*came)}, {"p": leaf(*expected)})
    assert "adapt(" not in str(error.value) and "Write fresh('p')" in str(error.value)


@pytest.mark.parametrize(
    ("came", "expected", "how"),
    [
        ((1, 50, 4), (1, 145, 4), "position_embedding"),
        ((16, 16, 3, 4), (8, 8, 3, 4), "patch_embedding"),
        ((3, 3, 3, 4), (3, 3, 5, 4), "input_channels"),
        ((10, 4), (12, 4), "rows"),
    ],
)
def test_a_plan_without_it_says_that_it_is_there(came, expected, how):
    with pytest.raises(PlanError) as error:
        plan({"p": leaf(*came)}, {"p": leaf(*expected)})
    assert f"Write adapt('p', '{how}') to resize it, or fresh('p')" in str(error.value)
    assert plan({"p": leaf(*came)}, {"p": leaf(*expected)}, adapt("p", how)).counts()["transformed"] == 1
