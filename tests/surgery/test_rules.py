"""Rules by themselves: what they match, how they print, what they refuse."""

import numpy as np
import pytest

from transferjax import regex
from transferjax._errors import PlanError, SelectionError
from transferjax.surgery import Spec, cast, dots_to_slashes, fresh, permute, plan, rename, reshape, torch_layout, waive

F = "float32"


@pytest.mark.parametrize(
    ("rule", "name", "expected"),
    [
        (rename(r"a\.(\d+)\.w", r"a/\1/kernel"), "a.12.w", "a/12/kernel"),
        (rename(r"(?P<m>\w+)\.w", r"\g<m>/kernel"), "stem.w", "stem/kernel"),
        (rename("w", "kernel"), "w", "kernel"),
        (rename("w", "kernel"), "w1", None),
        (rename("w", "kernel"), "aw", None),
        (rename(r"a\.w", "kernel"), "a_w", None),
        (rename("(a|b)(c)?", r"\1\2"), "a", "a"),
        (rename(r"(\d)", lambda m: str(int(m[1]) + 1)), "3", "4"),
        (dots_to_slashes(), "a.b.c", "a/b/c"),
        (dots_to_slashes(), "abc", None),
    ],
)
def test_rename_matches_names_in_full(rule, name, expected):
    assert rule(name) == expected


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (rename(r"a\.w", "b"), r"rename(r'a\.w', 'b')"),
        (rename("(.)", r"\1"), r"rename('(.)', r'\1')"),
        (dots_to_slashes(), "dots_to_slashes()"),
        (permute("a", (1, 0)), "permute('a', (1, 0))"),
        (permute("a", {2: (1, 0), 1: None}), "permute('a', {2: (1, 0), 1: None})"),
        (reshape("a", [2, -1]), "reshape('a', (2, -1))"),
        (cast("a", np.float16), "cast('a', 'float16')"),
        (fresh(regex("a|b")), "fresh(regex('a|b'))"),
        (waive("*.n"), "waive('*.n')"),
    ],
)
def test_a_rule_prints_as_it_is_written(rule, text):
    assert repr(rule) == text


def test_rules_compare_and_hash():
    assert permute("a", (1, 0)) == permute("a", [1, 0])
    assert len({rename("a", "b"), rename("a", "b"), rename("a", "c")}) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rename("(a", "b"), "rename('(a', 'b') is malformed: missing ), unterminated subpattern"),
        (lambda: rename("(a)", r"\2"), r"rename('(a)', r'\2') is malformed: invalid group reference 2"),
        (lambda: rename("(a)", r"\g<x>"), r"is malformed: unknown group name 'x'"),
        (lambda: rename(3, "a"), "rename(3, 'a') is malformed"),
        (lambda: rename("a", 3), "rename('a', 3) expects a str or a function of the match as replacement, got int"),
        (lambda: permute("a", (0, 1)), "permute('a', (0, 1)) leaves every axis in its place. Remove it"),
        (lambda: permute("a", ()), "permute('a', ()) leaves every axis in its place"),
        (lambda: permute("a", (1, 2)), "axes (1, 2) are no permutation"),
        (lambda: permute("a", {3: (1, 0)}), "permute('a', ...) has 2 axes (1, 0) for rank 3; expected 3"),
        (lambda: permute("a", {1: None}), "permute('a', {1: None}) does nothing"),
        (lambda: reshape("a", (-1, -1)), "shape (-1, -1) is malformed"),
        (lambda: reshape("a", "22"), "shape '22' is malformed"),
        (lambda: cast("a", "floatt"), "'floatt' is no dtype"),
    ],
)
def test_a_malformed_rule_raises_where_it_is_written(make, message):
    with pytest.raises(PlanError) as error:
        make()
    assert message in str(error.value)


def test_a_selector_that_is_none_raises():
    with pytest.raises(SelectionError, match=r"expected a selector or a glob such as 'head/\*\*', got int"):
        fresh(3)


def test_a_function_that_makes_no_path_raises():
    with pytest.raises(PlanError, match="made NoneType from 'a'; expected a str, the target path"):
        rename("a", {}.get)("a")
    with pytest.raises(PlanError, match=r"raised KeyError\('a'\) for 'a'. Write a narrower pattern"):
        rename("a", lambda m: {}[m[0]])("a")


@pytest.mark.parametrize(
    ("rule", "came", "op"),
    [
        (torch_layout(), (32, 3, 5, 7), ("permute", (2, 3, 1, 0))),
        (torch_layout(), (10, 4), ("permute", (1, 0))),
        (torch_layout(), (8, 4, 3), ("permute", (2, 1, 0))),
        (torch_layout(), (8, 4, 3, 5, 7), ("permute", (2, 3, 4, 1, 0))),
        (permute("a", {2: (1, 0), 1: None}), (4,), None),
        (reshape("a", (4,)), (4,), None),
        (reshape("a", lambda s: (s[0] * s[1],)), (2, 3), ("reshape", (6,))),
        (cast("a", F), (4,), None),
        (cast("a", "float16"), (4,), ("cast", "float16")),
    ],
)
def test_a_transform_makes_an_operation_from_what_comes(rule, came, op):
    assert rule.op(Spec(came, F)) == op


def test_a_rank_without_axes_raises():
    with pytest.raises(PlanError) as error:
        torch_layout().op(Spec((4,), F))
    assert "expects 2 or 3 or 4 or 5 axes; (4,) float32 came. Change the rule: add 1: axes" in str(error.value)
    with pytest.raises(PlanError, match=r"expects 2 axes; .* came. Change the rule: select only what it fits"):
        permute("a", (1, 0)).op(Spec((4,), F))


def test_the_shape_function_is_checked():
    with pytest.raises(PlanError, match=r"reshape\(5,\) does not hold the 4 elements"):
        reshape("a", lambda s: (5,)).op(Spec((4,), F))


def test_an_optional_waive_may_be_idle():
    source = {"w": np.zeros(2), "steps": np.zeros(())}
    for leaves in (source, {"w": np.zeros(2)}):
        made = plan(leaves, {"w": np.zeros(2)}, waive("steps", optional=True))
        assert made.waived == tuple(set(leaves) - {"w"})
    assert repr(waive("steps", optional=True)) == "waive('steps', optional=True)"


def test_a_cast_without_a_dtype_follows_the_target():
    rule, spec = cast("**"), lambda dtype: Spec((2,), dtype)
    assert repr(rule) == "cast('**')"
    assert rule.op_for(spec("float32"), spec("bfloat16")) == ("cast", "bfloat16")
    assert rule.op_for(spec("int8"), spec("float32")) == ("cast", "float32")
    for came, expected in (("float16", "float16"), ("float32", "int8"), ("float32", "bool")):
        assert rule.op_for(spec(came), spec(expected)) is None
    same = {"a": np.zeros(2, np.float32)}
    assert plan(same, same, rule).counts()["copied"] == 1
    with pytest.raises(PlanError, match=r"expects \(2,\) int8.*No cast keeps its numbers"):
        plan(same, {"a": np.zeros(2, np.int8)}, rule)
