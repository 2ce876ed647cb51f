"""Leaves that are split, joined, stacked and shared."""

import jax
import numpy as np
import pytest

from transferjax._errors import PlanError
from transferjax.surgery import fresh, fuse, permute, plan, rename, split, stack, tie, unstack, waive
from transferjax.testing import check_plan
from transferjax.tree import nest


def leaf(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def refusal(*arguments):
    with pytest.raises(PlanError) as error:
        plan(*arguments)
    return str(error.value)


def numbered(*shape):
    return np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)


QKV = split(r"blocks\.(\d+)\.qkv\.weight", [rf"blocks/\1/{n}/kernel" for n in ("query", "key", "value")], axis=0)


def test_split_cuts_a_fused_projection_and_each_part_is_transposed():
    target = nest({f"blocks/0/{name}/kernel": leaf(4, 2) for name in ("query", "key", "value")})
    made = check_plan({"blocks.0.qkv.weight": leaf(6, 4)}, target, [QKV, permute("**/kernel", (1, 0))])
    fused = numbered(6, 4)
    out = made.apply({"blocks.0.qkv.weight": fused})
    assert made.moves[0].ops == (("slice", 0, 2, 4), ("permute", (1, 0)))
    assert np.array_equal(out["blocks/0/query/kernel"], fused[:2].T)
    assert np.array_equal(out["blocks/0/value/kernel"], fused[4:].T)


def test_split_takes_sizes_and_drops_parts():
    made = check_plan({"qkv": leaf(2, 10)}, {"q": leaf(2, 6), "v": leaf(2, 3)},
                      [split("qkv", ("q", None, "v"), axis=1, sizes=(6, 1, 3))])  # fmt: skip
    assert [move.ops for move in made.moves] == [(("slice", 1, 0, 6),), (("slice", 1, 7, 10),)]


def test_fuse_joins_in_the_order_of_its_patterns():
    rule = fuse((r"(.*)\.q", r"(.*)\.k", r"(.*)\.v"), r"\1/qkv", axis=0)
    made = check_plan({"a.v": leaf(1, 4), "a.q": leaf(2, 4), "a.k": leaf(3, 4)}, {"a": {"qkv": leaf(6, 4)}}, [rule])
    assert (made.moves[0].source, made.moves[0].ops) == (("a.q", "a.k", "a.v"), (("concat", 0),))
    assert "a.q + a.k + a.v" in str(made) and "(2, 4) + (3, 4) + (1, 4)" in str(made)


def test_stack_and_unstack_are_inverse_and_count_as_numbers():
    layers = {f"blocks.{i}.w": leaf(2, 3) for i in range(11)}
    stacked = {"layers": {"w": leaf(11, 2, 3)}}
    to = check_plan(layers, stacked, [stack(r"blocks\.(?P<i>\d+)\.(.*)", r"layers/\2")])
    back = check_plan(stacked, layers, [unstack("layers/(.*)", r"blocks.{i}.\1")])
    assert to.moves[0].source == tuple(f"blocks.{i}.w" for i in range(11))
    arrays = {name: numbered(2, 3) + 6 * i for i, name in enumerate(layers)}
    again = back.apply(to.apply(arrays))
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)


def test_stack_along_another_axis():
    made = check_plan({"b.3": leaf(2), "b.4": leaf(2)}, {"w": leaf(2, 2)}, [stack(r"b\.(?P<i>\d+)", "w", axis=1)])
    assert made.apply({"b.3": np.float32([1, 2]), "b.4": np.float32([3, 4])})["w"].tolist() == [[1, 3], [2, 4]]


def test_jax_arrays_stay_jax_arrays():
    made = plan({"b.0": leaf(2), "b.1": leaf(2)}, {"w": leaf(2, 2)}, stack(r"b\.(?P<i>\d+)", "w"))
    assert isinstance(made.apply(lambda name: jax.numpy.ones(2))["w"], jax.Array)


def test_tied_leaves_share_a_source_each_in_its_own_layout():
    rules = [
        rename(r"wte\.weight", "embed/embedding"),
        tie("head/kernel", "embed/embedding"),
        permute("head/*", (1, 0)),
    ]
    made = check_plan(
        {"wte.weight": leaf(5, 2)}, {"embed": {"embedding": leaf(5, 2)}, "head": {"kernel": leaf(2, 5)}}, rules
    )
    assert [(move.source, move.ops) for move in made.moves] == [
        ("wte.weight", ()),
        ("wte.weight", (("permute", (1, 0)),)),
    ]
    assert "parameters read: 10" in str(made)


def test_a_part_may_be_fresh_and_a_whole_may_be_too():
    source, rule = {"ab": leaf(4)}, split("ab", ("a", "b"), axis=0)
    assert plan(source, {"a": leaf(2), "b": leaf(7)}, rule, fresh("b")).waived == ()
    assert plan(source, {"a": leaf(9), "b": leaf(7)}, rule, fresh("{a,b}")).waived == ("ab",)


STACK = stack(r"b\.(?P<i>\d+)", "w")
FUSE = fuse(("q", "k"), "qk", axis=0)
TWO = {"q": leaf(2), "k": leaf(2)}


@pytest.mark.parametrize(
    ("source", "target", "rules", "message"),
    [
        ({"ab": leaf(5)}, {"a": leaf(2), "b": leaf(2)}, [split("ab", ("a", "b"), axis=0)],
         "source 'ab': split('ab', ...) cannot cut axis 0 of (5,) float32 into 2 equal parts. Write sizes=(...)."),
        ({"ab": leaf(5)}, {"a": leaf(2), "b": leaf(2)}, [split("ab", ("a", "b"), axis=0, sizes=(2, 2))],
         "has sizes that sum to 4; axis 0 of (5,) float32 has 5."),
        ({"ab": leaf(4)}, {"a": leaf(2), "b": leaf(2)}, [split("ab", ("a", "b"), axis=1)],
         "needs an axis 1; (4,) float32 came."),
        ({"ab": leaf(4)}, {"a": leaf(2)}, [split("ab", ("a", "b"), axis=0)],
         "source 'ab' (4,) float32, which a rule leads to 'b', has no target."),
        ({"w": leaf(2)}, {"w": leaf(2)}, [split("ab", ("a", "b"), axis=0)],
         "does nothing: it matched no name in full of 1 source leaves."),
        ({"b.0": leaf(2), "b.2": leaf(2)}, {"w": leaf(2, 2)}, [STACK],
         "found the numbers (0, 2); expected each once, without a gap."),
        ({"b.0": leaf(2), "b.00": leaf(2)}, {"w": leaf(2, 2)}, [STACK], "found the numbers (0, 0); expected each once"),
        ({"b.0": leaf(2), "b.1": leaf(3)}, {"w": leaf(2, 2)}, [STACK],
         "target 'w' from source 'b.0', 'b.1': stack(0) needs arrays of one shape and dtype; "
         "(2,) float32 and (3,) float32 came."),
        ({"b.x": leaf(2)}, {"w": leaf(1, 2)}, [stack(r"b\.(?P<i>.)", "w")],
         "finds no number in its group i: 'x'. Write (?P<i>\\d+)."),
        ({"b.0": leaf(2), "b.1": leaf(2), "w": leaf(2, 2)}, {"w": leaf(2, 2)}, [STACK],
         "target 'w' has two sources: 'b.0' (by stack("),
        ({"q": leaf(2)}, {"qk": leaf(4)}, [FUSE],
         "target 'qk': fuse(('q', 'k'), 'qk', axis=0) found 0 sources for its pattern 'k'; expected one"),
        (TWO, {"qk": leaf(4)}, [FUSE, waive("k")], "found 0 sources for its pattern 'k'"),
        (TWO, {"qk": leaf(4)}, [fuse((".", "k"), "qk", axis=0)],
         "source 'k': fuse(('.', 'k'), 'qk', axis=0) has 2 patterns that match it"),
        ({"q": leaf(2), "k": leaf(2, 2)}, {"qk": leaf(4)}, [FUSE],
         "concat(0) needs arrays that differ along axis 0 only; (2,) float32 and (2, 2) float32 came."),
        (TWO, {"qk": leaf(4)}, [fuse(("q", "k"), "qk", axis=1)],
         "concat(1) needs arrays that differ along axis 1 only"),
        (TWO, {"qk": leaf(5)}, [FUSE],
         "target 'qk' expects (5,) float32; source 'q' is (2,) float32, 'k' is (2,) float32 "
         "through concat(0), which makes (4,)."),
        ({"w": leaf()}, {"w": leaf()}, [unstack("w", "b/{i}")], "needs an axis 0; () float32 came."),
        ({"a": leaf(2)}, {"a": leaf(2), "b": leaf(2)}, [tie("c", "a")],
         "tie('c', 'a') does nothing: it matched no name in full of 2 target leaves."),
        ({"a": leaf(2)}, {"a": leaf(2), "b": leaf(2)}, [tie("b", "c")],
         "target 'b' is tied to 'c', which the target does not have. Correct tie('b', 'c')"),
        ({"a": leaf(2), "b": leaf(2)}, {"a": leaf(2), "b": leaf(2)}, [tie("b", "a")],
         "target 'b' has an origin of its own; expected none."),
        ({"a": leaf(2)}, {"a": leaf(2), "b": leaf(2)}, [tie("b", "a"), fresh("a")],
         "target 'b' is tied to 'a', which no source leads to."),
        ({"a": leaf(2)}, {"a": leaf(2), "b": leaf(2)}, [tie("b", "a"), fresh("b")],
         "target 'b' has an origin of its own"),
        ({"a": leaf(2)}, {"a": leaf(2), "b": leaf(3)}, [tie("b", "a")],
         "target 'b' expects (3,) float32; source 'a' is (2,) float32."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(source, target, rules, message):
    assert message.replace("split('ab', ...)", "split('ab', ('a', 'b'), axis=0)") in refusal(source, target, *rules)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split("a", ("b",), axis=0), "expects a tuple of at least two replacements"),
        (lambda: split("a", (None, None), axis=0),
         "expects a tuple of at least two replacements, one of them no None."),
        (lambda: split("a", "bc", axis=0), "expects a tuple of at least two replacements"),
        (lambda: split("(a", ("b", "c"), axis=0), "split('(a', ('b', 'c')) is malformed: missing )"),
        (lambda: split("a", ("b", r"\1"), axis=0), r"split('a', ('b', r'\1')) is malformed: invalid group reference 1"),
        (lambda: split("a", ("b", 3), axis=0), "split('a', ('b', 3)) expects a str as replacement, got int."),
        (lambda: split("a", ("b", "c"), axis=-1),
         "axis and numbers (-1,) are malformed: expected integers of at least 0."),
        (lambda: split("a", ("b", "c"), axis=0, sizes=(1,)),
         "has the sizes (1,); expected one of at least 0 for each replacement."),
        (lambda: split("a", ("b", "c"), axis=0, sizes=(-1, 1)), "has the sizes (-1, 1); expected"),
        (lambda: unstack("a", "b"), "unstack('a', 'b') has no {i} in its replacement."),
        (lambda: stack("a", "b"), "stack('a', 'b') has no group i in its pattern. Write (?P<i>\\d+)"),
        (lambda: split("a", None, axis=0), "split('a', None) expects a tuple of at least two replacements"),
        (lambda: fuse("ab", "c", axis=0), "fuse('ab', 'c') expects a tuple of at least two patterns."),
        (lambda: fuse(("a",), "c", axis=0), "fuse(('a',), 'c') expects a tuple of at least two patterns."),
        (lambda: fuse(("a", "(b"), "c", axis=0), "is malformed: missing )"),
        (lambda: tie("(a", "b"), "tie('(a', 'b') is malformed"),
        (lambda: tie("a", str), "tie('a', <class 'str'>) expects a str as replacement, got type."),
    ],
)  # fmt: skip
def test_a_malformed_rule_raises_where_it_is_written(make, message):
    with pytest.raises(PlanError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (split("a", ("b", None), axis=0, sizes=[1, 2]), "split('a', ('b', None), axis=0, sizes=(1, 2))"),
        (unstack("a", "b/{i}"), "unstack('a', 'b/{i}', axis=0)"),
        (fuse(["a", "b"], "c", axis=1), "fuse(('a', 'b'), 'c', axis=1)"),
        (STACK, r"stack(r'b\.(?P<i>\d+)', 'w', axis=0)"),
        (tie("a", "b"), "tie('a', 'b')"),
    ],
)
def test_a_rule_prints_as_it_is_written(rule, text):
    assert repr(rule) == text


def test_fused_leaves_of_unrolled_layers_fill_a_scanned_target_in_two_plans():
    source = {f"b.{i}.qkv": np.arange(24.0).reshape(4, 6) + 100 * i for i in range(2)}
    target = {"layers": {"q": np.zeros((2, 4, 3)), "kv": np.zeros((2, 4, 3))}}
    halfway = {f"{i}/{part}": jax.ShapeDtypeStruct((4, 3), np.dtype(float)) for i in range(2) for part in ("q", "kv")}
    cut = plan(source, halfway, split(r"b\.(\d+)\.qkv", (r"\1/q", r"\1/kv"), axis=1))
    piled = plan(halfway, target, stack(r"(?P<i>\d+)/(.*)", r"layers/\2"))
    made = piled.apply(cut.apply(source))
    assert np.array_equal(made["layers/kv"], np.stack([source[f"b.{i}.qkv"][:, 3:] for i in range(2)]))
