"""plan: real names, how rules combine, and every way in which a plan can be wrong."""

import jax
import numpy as np
import pytest

from transferjax import Model, where
from transferjax._errors import PlanError
from transferjax.surgery import (
    Rule,
    cast,
    dots_to_slashes,
    fresh,
    permute,
    plan,
    rename,
    reshape,
    torch_layout,
    waive,
)  # fmt: skip
from transferjax.tree import nest, paths


def leaf(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def sources(made):
    return {move.target: move.source for move in made.moves}


def refusal(*arguments):
    with pytest.raises(PlanError) as error:
        plan(*arguments)
    return str(error.value)


# Real names ----------------------------------------------------------------------------------------------------------


def test_every_tensor_of_lite0_is_accounted_for(lite0_source, lite0_target, lite0_rules):
    made = plan(lite0_source, lite0_target, *lite0_rules)
    assert made.counts() == {"copied": 197, "transformed": 50, "fresh": 0, "waived": 49}
    assert len(lite0_source) == 296 == 197 + 50 + 49
    assert repr(made) == "Plan(296 sources -> 247 targets: 197 copied, 50 transformed, 0 fresh, 49 waived)"
    depthwise = next(m for m in made.moves if m.target == "blocks/3/depthwise/kernel")
    assert (depthwise.source, depthwise.ops) == ("_blocks.3._depthwise_conv.weight", (("permute", (2, 3, 1, 0)),))


def test_moves_are_in_natural_order(lite0_source, lite0_target, lite0_rules):
    blocks = [
        int(m.target.split("/")[1])
        for m in plan(lite0_source, lite0_target, *lite0_rules).moves
        if "blocks" in m.target
    ]
    assert blocks == sorted(blocks) and set(blocks) == set(range(16))


def test_a_fresh_head_waives_the_old_head(lite0_source, lite0_target, lite0_rules):
    target = paths(lite0_target)
    target["head/fc/kernel"], target["head/fc/bias"] = leaf(1280, 10), leaf(10)
    made = plan(lite0_source, nest(target), *lite0_rules, fresh("head/fc/**"))
    assert set(made.waived) - {n for n in lite0_source if "batches" in n} == {"_fc.weight", "_fc.bias"}
    assert made.counts()["fresh"] == 2


def test_another_number_of_classes_without_fresh_raises(lite0_source, lite0_target, lite0_rules):
    target = {**paths(lite0_target), "head/fc/kernel": leaf(1280, 10), "head/fc/bias": leaf(10)}
    assert refusal(lite0_source, nest(target), *lite0_rules) == (
        "the plan has 2 problems:\n"
        "- target 'head/fc/bias' expects (10,) float32; source '_fc.bias' is (1000,) float32. "
        "Write fresh('head/fc/bias') to keep the target's own values.\n"
        "- target 'head/fc/kernel' expects (1280, 10) float32; source '_fc.weight' is (1000, 1280) float32 through "
        "permute(1, 0), which makes (1280, 1000). Write fresh('head/fc/kernel') to keep the target's own values."
    )


def test_params_and_extra_of_a_model_are_filled_from_one_file():
    target = Model(None, None, {"bn": {"scale": leaf(4)}}, {"bn": {"mean": leaf(4)}})
    made = plan({"bn.weight": leaf(4), "bn.running_mean": leaf(4)}, target,
                rename(r"bn\.weight", "bn/scale"), rename(r"bn\.running_mean", "bn/mean"))  # fmt: skip
    assert sources(made) == {"bn/mean": "bn.running_mean", "bn/scale": "bn.weight"}


def test_a_model_is_a_source_too():
    model = Model(None, None, {"a": leaf(4)}, {"b": leaf(2)})
    assert sources(plan(model, {"a": leaf(4), "b": leaf(2)})) == {"a": "a", "b": "b"}


# How rules combine ---------------------------------------------------------------------------------------------------


def test_unmatched_names_keep_themselves():
    assert sources(plan({"a": leaf(1), "b/c": leaf(2)}, {"a": leaf(1), "b": {"c": leaf(2)}})) == {
        "a": "a",
        "b/c": "b/c",
    }
    assert "source 'b.c' (2,) float32 has no target" in refusal({"b.c": leaf(2)}, {"b": {"c": leaf(2)}})


def test_names_swap():
    made = plan({"a": leaf(1), "b": leaf(1)}, {"a": leaf(1), "b": leaf(1)}, rename("a", "b"), rename("b", "a"))
    assert sources(made) == {"a": "b", "b": "a"}


def test_the_remaining_names_of_a_whole_file():
    source = {"stem.conv.weight": leaf(1), "head.bias": leaf(2), "plain": leaf(3)}
    target = nest({"stem/kernel": leaf(1), "head/bias": leaf(2), "plain": leaf(3)})
    for rules in [
        (dots_to_slashes(), rename(r"stem\..*", "stem/kernel")),
        (rename(r"stem\..*", "stem/kernel"), dots_to_slashes()),
    ]:
        assert sources(plan(source, target, *rules))["stem/kernel"] == "stem.conv.weight"


def test_transforms_run_in_their_order():
    made = plan({"w": leaf(4, 6)}, {"w": leaf(6, 2, 2)}, permute("w", (1, 0)), reshape("w", (6, 2, 2)))
    assert made.moves[0].ops == (("permute", (1, 0)), ("reshape", (6, 2, 2)))
    made = plan({"w": leaf(4, 6)}, {"w": leaf(6, 2, 2)}, reshape("w", (2, 2, 6)), permute("w", (2, 0, 1)))
    assert made.moves[0].ops == (("reshape", (2, 2, 6)), ("permute", (2, 0, 1)))


def test_a_square_matrix_is_transposed_because_the_rule_says_so():
    made = plan({"w": leaf(4, 4)}, {"w": leaf(4, 4)}, permute("w", (1, 0)))
    assert made.moves[0].ops == (("permute", (1, 0)),)


def test_cast_leaves_alone_what_comes_right():
    source = {"a": leaf(1, dtype=np.float16), "b": leaf(1)}
    made = plan(source, {"a": leaf(1), "b": leaf(1)}, cast("**", "float32"))
    assert [move.ops for move in made.moves] == [(("cast", "float32"),), ()]


def test_selectors_see_the_leaf():
    is_matrix = where(lambda path, leaf: len(leaf.shape) == 2, "matrices")
    made = plan({"a": leaf(2, 3), "b": leaf(3)}, {"a": leaf(3, 2), "b": leaf(3)}, permute(is_matrix, (1, 0)))
    assert [bool(move.ops) for move in made.moves] == [True, False]


def test_ready_rules_stay_valid_when_their_leaves_become_fresh():
    made = plan({"w": leaf(2, 3)}, {"v": leaf(5, 2)}, rename("w", "v"), permute("v", (1, 0)), fresh("v"))
    assert (made.moves[0].source, made.waived) == (None, ("w",))


def test_an_explicit_waiver_of_what_fresh_replaces_is_welcome():
    made = plan({"w": leaf(2)}, {"w": leaf(5)}, waive("w"), fresh("w"))
    assert made.waived == ("w",)


# What is wrong -------------------------------------------------------------------------------------------------------

ONE = {"a": leaf(2, 3)}


@pytest.mark.parametrize(
    ("source", "target", "rules", "message"),
    [
        # idle rules
        (ONE, ONE, [rename("b", "c")],
         "rename('b', 'c') does nothing: it matched no name in full of 1 source leaves. Nearest: a."),
        (ONE, ONE, [rename("a", "a")], "rename('a', 'a') does nothing"),
        ({"a.b": leaf(1)}, {"a": {"b": leaf(1)}}, [rename(r"a\.b", "a/b"), dots_to_slashes()],
         "dots_to_slashes() does nothing: it matched no name that it alone is for"),
        (ONE, ONE, [fresh("a"), fresh("b")],
         "fresh('b') does nothing: it matched none of 1 target leaves. Nearest: a."),
        (ONE, ONE, [fresh("a"), fresh("**")], "fresh('a') adds nothing: fresh('**') selects the same leaves."),
        (ONE, ONE, [waive("b")], "waive('b') does nothing: it matched none of 1 source leaves."),
        (ONE, {}, [waive("a"), waive("a")], "waive('a') adds nothing: waive('a') selects the same leaves."),
        (ONE, ONE, [permute("b", (1, 0))], "permute('b', (1, 0)) does nothing: it matched none of 1 target leaves."),
        (ONE, ONE, [reshape("a", (2, 3))],
         "reshape('a', (2, 3)) does nothing: 'a' come in that form already. Remove it."),
        (ONE, ONE, [cast("a", "float32")], "cast('a', 'float32') does nothing: 'a' come in that form already."),
        ({"a": leaf(1, dtype=np.int8)}, {"a": leaf(1)}, [cast("a", "float32"), cast("a", "float32")],
         "cast('a', 'float32') does nothing"),
        # overlaps
        (ONE, {"b": leaf(2, 3)}, [rename("a", "b"), rename("(.)", r"b")],
         r"source 'a' is matched by rename('a', 'b') and by rename('(.)', 'b'). Expected one such rule per name"),
        ({**ONE, "b": leaf(2, 3)}, ONE, [rename("b", "a")],
         "target 'a' has two sources: 'a' (its own name) and 'b' (by rename('b', 'a')). Waive one"),
        ({**ONE, "b": leaf(2, 3)}, {"c": leaf(9)}, [rename(".", "c"), fresh("c")],
         "target 'c' has two sources: 'a' (by"),
        ({"a": leaf(2, 3)}, ONE, [permute("a", (1, 0)), permute("*", (1, 0))],
         "permute('a', (1, 0)) and permute('*', (1, 0)) follow each other on one leaf. Write one rule for both."),
        # operations
        (ONE, ONE, [permute("a", (2, 1, 0))],
         "target 'a' from source 'a': permute('a', (2, 1, 0)) expects 3 axes; (2, 3) float32 came."),
        ({"a": leaf(2)}, {"a": leaf(2)}, [torch_layout("a")], "Change the rule: add 1: axes, or 1: None to leave it."),
        (ONE, ONE, [reshape("a", (7,))],
         "target 'a' from source 'a': reshape(7,) does not hold the 6 elements of (2, 3) float32."),
        (ONE, {"a": leaf(2, 3, dtype=np.int32)}, [cast("a", "int32")], "cast to int32 would not keep the numbers"),
        # shapes
        (ONE, {"a": leaf(3, 2)}, [], "target 'a' expects (3, 2) float32; source 'a' is (2, 3) float32. "
         "The sizes are the same: write permute('a', (1, 0)), or fresh('a') to keep the target's own values."),
        ({"a": leaf(8, 3, 5, 5)}, {"a": leaf(5, 5, 3, 8)}, [], "write permute('a', (2, 3, 1, 0))"),
        ({"a": leaf(8, 3, 5)}, {"a": leaf(3, 8, 5)}, [], "write permute('a', (1, 0, 2))"),
        ({"a": leaf(2, 3, 4)}, {"a": leaf(2, 3, 4)}, [permute("a", (2, 1, 0))],
         "source 'a' is (2, 3, 4) float32 through permute(2, 1, 0), which makes (4, 3, 2). "
         "The sizes are the same: write other axes in the permute rule of this leaf"),
        (ONE, {"a": leaf(6)}, [], "The number of elements is the same: write reshape('a', (6,)), or fresh('a')"),
        ({"a[0]": leaf(3)}, {"a[0]": leaf(4)}, [], r"Write fresh(regex(r'a\[0\]')) to keep the target's own values."),
        # dtypes
        (ONE, {"a": leaf(2, 3, dtype=np.float16)}, [],
         "target 'a' expects (2, 3) float16; source 'a' comes as (2, 3) float32. "
         "Write cast('a', 'float16') (cast('**', 'float16') for all)."),
        ({"a": leaf(1, dtype=np.int64)}, {"a": leaf(1, dtype=np.int32)}, [], "Write cast('a', 'int32')"),
        (ONE, {"a": leaf(2, 3, dtype=np.int32)}, [],
         "No cast keeps its numbers: give the target leaf the dtype float32"),
        # missing and surplus
        (ONE, {**ONE, "b": leaf(4)}, [],
         "target 'b' (4,) float32 has no source. Every source leaf is used or waived. "
         "Write fresh('b')."),
        ({"x.a": leaf(3, 2)}, ONE, [waive("x.a")],
         "target 'a' (2, 3) float32 has no source. Every source leaf is used"),
        (ONE, ONE, [waive("a")],
         "target 'a' (2, 3) float32 has no source. "
         "Source 'a' would fill it, but is waived by waive('a')."),
        ({**ONE, "b": leaf(4)}, ONE, [], "source 'b' (4,) float32 has no target. Write waive('b')."),
        ({**ONE, "b": leaf(4)}, ONE, [rename("b", "c")],
         "source 'b' (4,) float32, which a rule leads to 'c', has no target."),
        ({"fc.weight": leaf(3, 2)}, {"fc": {"kernel": leaf(2, 3)}}, [],
         "Nearest unused: 'fc.weight' (3, 2) float32. "
         "Write rename(r'fc\\.weight', 'fc/kernel') or fresh('fc/kernel')."),
        ({"fc.weight": leaf(3, 2)}, {"fc": {"kernel": leaf(2, 3)}}, [],
         "Nearest without a source: 'fc/kernel' (2, 3) float32. "
         "Write rename(r'fc\\.weight', 'fc/kernel') or waive('fc.weight')."),
        # arguments
        (ONE, ONE, [Rule()],
         "rule 0 of the plan is of an unknown kind, Rule, so nothing would apply it. Derive its class from "
         "surgery.Naming (where leaves go) or surgery.Transform (how they change)."),
        (ONE, ONE, [[fresh("a")]],
         "rule 0 of the plan is list; expected a rule such as fresh(...). Write a list of rules with a star"),
        (ONE, ONE, ["a"], "rule 0 of the plan is str"),
        ({"a": 3}, ONE, [], "source leaf 'a' is int; expected something with shape and dtype. Pass an array"),
        (ONE, {"a": 1.0}, [], "target leaf 'a' is float; expected something with shape and dtype."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(source, target, rules, message):
    assert message in refusal(source, target, *rules)


def test_an_open_checkpoint_instead_of_its_shapes():
    checkpoint = type("Checkpoint", (), {"shapes": {"a": leaf(1)}})()
    assert "source leaf '' is Checkpoint; expected something with shape and dtype. Pass its .shapes." in refusal(
        checkpoint, ONE
    )


def test_all_problems_are_reported_at_once():
    source = {"a": leaf(2), "b": leaf(3), "c": leaf(4), "z": leaf(1)}
    target = {"a": leaf(5), "b": leaf(3, dtype=np.float16), "d": leaf(4)}
    lines = refusal(source, target, waive("y"), rename("z", "a")).splitlines()
    assert lines[0] == "the plan has 6 problems:"
    starts = [
        "waive('y')",
        "target 'a' has two",
        "target 'a' expects",
        "target 'b' expects",
        "target 'd'",
        "source 'c'",
    ]
    assert [line[2:].startswith(start) for line, start in zip(lines[1:], starts, strict=True)] == [True] * 6


def test_long_lists_are_cut_and_counted():
    source = {f"layers.{i}.w": leaf(2) for i in range(30)}
    first, *lines = refusal(source, nest({f"layers/{i}/w": leaf(2) for i in range(30)})).splitlines()
    assert first.startswith("many leaves have no partner: surgery.align(source_shapes, target) proposes the rules")
    assert lines[0] == "the plan has 60 problems:"
    assert len(lines) == 1 + 9 + 9
    assert lines[9].startswith("- 22 more target leaves without a source: layers/8/w, layers/9/w")
    assert "Write rename(r'layers\\.3\\.w', 'layers/3/w') or fresh('layers/3/w')." in lines[4]


def test_messages_do_not_depend_on_the_order_of_dicts():
    source = {f"l.{i}": leaf(i + 1) for i in range(12)}
    target = {f"m{i}": leaf(i + 1) for i in range(12)}
    turned = lambda d: dict(reversed(d.items()))
    assert refusal(source, target) == refusal(turned(source), turned(target))


def test_the_nearest_candidates_are_near_by_name_and_by_shape(lite0_source, lite0_target, lite0_rules):
    broken = [rule for rule in lite0_rules if "_conv_head" not in repr(rule)]
    text = refusal(lite0_source, lite0_target, *broken)
    assert "Write rename(r'_conv_head\\.weight', 'head/conv/kernel') or fresh('head/conv/kernel')." in text
    assert "source '_conv_head.weight' (1280, 320, 1, 1) float32 has no target." in text
