"""Permutations found in programs leave their outputs as they are, and move values without changing a bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from transferjax import Model
from transferjax._errors import SelectionError, TransferError
from transferjax.merging._axes import Axes
from transferjax.merging._permutations import apply_permutations, leaves_of, resolve
from transferjax.merging._symmetries import permutation_spec

RNG = np.random.default_rng(0)
TOKENS = np.array([[1, 3, 0]])


def whole(*shape):
    """Small whole numbers: their sums and products are exact in any order."""
    return jnp.asarray(RNG.integers(-3, 4, shape), jnp.float32)


def network(function, params, extra=None):
    apply = lambda params, extra, inputs, *, key=None, train=False: (function({**params, **extra}, inputs), extra)
    return Model(apply, None, params, extra or {})


def shuffled(model, spec, seed=1):
    random = np.random.default_rng(seed)
    orders = {name: np.roll(random.permutation(g.size), 1) for name, g in resolve(spec, leaves_of(model)).items()}
    return apply_permutations(model, spec, orders)


def mlp(p, x):
    return jnp.maximum(x @ p["a"] + p["b"], 0) @ p["c"]


def residual(p, x):
    x = x @ p["a"]
    x = x + jnp.maximum(x @ p["b"], 0) @ p["c"]
    return (x * p["d"]) @ p["e"]


def flattened(p, x):
    x = lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(len(x), -1) @ p["b"]


def grouped(groups):
    def apply(p, x):
        x = x @ p["a"]
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, p["b"], (1, 1), "SAME", None, None, numbers, groups) @ p["c"]

    return apply


def heads(p, x):
    q, k, v = (jnp.reshape(x @ p[name], (*x.shape[:2], 2, 4)) for name in "qkv")
    weights = jnp.einsum("bthd,bshd->bhts", q, k)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*x.shape[:2], 8) @ p["o"]


def gated(p, x):
    gate, up = jnp.split(x @ p["a"], 2, axis=-1)
    return (jnp.maximum(gate, 0) * up) @ p["b"]


def sliced(p, x):
    return (x @ p["a"])[:, 4:8] @ p["b"]


def stacked(p, x):
    return jnp.concatenate([x @ p["a"], x @ p["b"]], axis=-1) @ p["c"]


def embedded(p, tokens):
    return (jnp.take(p["a"], tokens, axis=0) + p["b"][: tokens.shape[1]]) @ p["c"]


def scanned(p, x):
    turn = lambda x, layer: (x + jnp.maximum(x @ layer["b"], 0) @ layer["c"], jnp.sum(x))
    x, sums = lax.scan(turn, x @ p["a"], {"b": p["b"], "c": p["c"]})
    return x @ p["d"], sums


def looped(p, x):
    return lax.fori_loop(0, 2, lambda i, x: x @ p["b"], x @ p["a"]) @ p["c"]


def branched(p, x):
    x = x @ p["a"]
    return lax.cond(jnp.sum(x) > 0, lambda x: x + p["b"], lambda x: x * p["c"], x) @ p["d"]


def dynamic(p, x):
    x = lax.dynamic_update_slice(x @ p["a"], (x @ p["b"])[:1], (1, 0))
    return lax.dynamic_slice(x, (1, 0), (1, 8)) @ p["c"]


def called(p, x):
    return jax.jit(jax.checkpoint(jax.nn.relu))(x @ p["a"]) @ p["b"]


def barred(p, x):
    return lax.optimization_barrier((x @ p["a"],))[0].T.swapaxes(0, 1)[:, None, :].squeeze(1) @ p["b"]


def regrouped(p, x):
    x = x @ p["a"]
    return (x.reshape(2, 2, 4) + x.reshape(2, 4, 2).swapaxes(1, 2)).reshape(2, 8) @ p["b"]


def reduced(p, x):
    return jnp.max(x @ p["a"], axis=1) + jnp.sum(lax.stop_gradient(p["b"])), jnp.sum(x @ p["a"], 1)


X, IMAGES, TEXT = whole(2, 3), whole(2, 4, 4, 3), whole(1, 5, 3)
GROUPS = {
    "an MLP": (mlp, {"a": (3, 8), "b": (8,), "c": (8, 2)}, X, ["a1 b0 c0"]),
    "a residual stream": (
        residual, {"a": (3, 6), "b": (6, 8), "c": (8, 6), "d": (6,), "e": (6, 2)}, X, ["a1 b0 c1 d0 e0", "b1 c0"]),
    "an image flattened": (flattened, {"a": (3, 3, 3, 8), "b": (32, 2)}, IMAGES, ["a3 b0:4,1"]),
    "a depthwise convolution": (grouped(4), {"a": (3, 4), "b": (3, 3, 1, 4), "c": (4, 2)}, IMAGES, ["a1 b3 c0"]),
    "a depthwise convolution that multiplies": (
        grouped(4), {"a": (3, 4), "b": (3, 3, 1, 8), "c": (8, 2)}, IMAGES, ["a1 b3:1,2 c0:1,2", "b3:4,1 c0:4,1"]),
    "a convolution in groups": (
        grouped(2), {"a": (3, 6), "b": (3, 3, 3, 8), "c": (8, 2)}, IMAGES,
        ["a1:1,3 b3:1,4 c0:1,4", "a1:2,1 b2", "b3:2,1 c0:2,1"]),
    "attention": (
        heads, {"q": (3, 8), "k": (3, 8), "v": (3, 8), "o": (8, 2)}, TEXT,
        ["k1:1,4 o0:1,4 q1:1,4 v1:1,4", "k1:2,1 q1:2,1", "o0:2,1 v1:2,1"]),
    "a gate beside what it opens": (gated, {"a": (3, 16), "b": (8, 2)}, X, ["a1:2,1 b0"]),
    "a slice of one part": (sliced, {"a": (3, 12), "b": (4, 2)}, X, ["a1:3,1 b0"]),
    "equal parts side by side": (stacked, {"a": (3, 4), "b": (3, 4), "c": (8, 2)}, X, ["a1 b1 c0:2,1"]),
    "an embedding": (embedded, {"a": (7, 8), "b": (5, 8), "c": (8, 2)}, TOKENS, ["a1 b1 c0"]),
    "layers in a scan": (
        scanned, {"a": (3, 6), "b": (2, 6, 8), "c": (2, 8, 6), "d": (6, 2)}, X, ["a1 b1 c2 d0", "b2 c1"]),
    "a loop": (looped, {"a": (3, 6), "b": (6, 6), "c": (6, 2)}, X, ["a1 b0 b1 c0"]),
    "a branch": (branched, {"a": (3, 6), "b": (6,), "c": (2, 6), "d": (6, 2)}, X, ["a1 b0 c1 d0"]),
    "dynamic slices": (dynamic, {"a": (3, 8), "b": (3, 8), "c": (8, 2)}, X, ["a1 b1 c0"]),
    "calls": (called, {"a": (3, 8), "b": (8, 2)}, X, ["a1 b0"]),
    "barriers and views": (barred, {"a": (3, 8), "b": (8, 2)}, X, ["a1 b0"]),
    "halves of halves": (
        regrouped, {"a": (3, 8), "b": (8, 2)}, X, ["a1:1,4 a1:2,2 a1:4,1 b0:1,4 b0:2,2 b0:4,1"]),
    "reductions": (reduced, {"a": (3, 8), "b": (4,)}, X, ["a1", "b0"]),
}  # fmt: skip


def written(spec):
    """``a1 b0:4,1`` for axis 1 of a and, of axis 0 of b, units of 1 entry that come 4 times."""
    return [
        " ".join(f"{p}{axis}" + "".join(f":{o},{i}" for o, i in rest) for p, axis, *rest in s) for s in spec.values()
    ]


@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_of_a_program_leave_its_outputs_exactly_as_they_are(name):
    function, shapes, inputs, expected = GROUPS[name]
    model = network(function, {path: whole(*shape) for path, shape in shapes.items()})
    spec = permutation_spec(model, inputs)
    assert sorted(written(spec)) == sorted(expected)
    moved = shuffled(model, spec)
    assert not jax.tree.all(jax.tree.map(np.array_equal, model.params, moved.params))
    before, after = (jax.tree.leaves(one.apply(one.params, {}, inputs)[0]) for one in (model, moved))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def gathered(p, x):
    return jnp.take_along_axis(x @ p["a"], jnp.array([[*range(1, 8), 0]] * 2), axis=1) @ p["b"]


def written_over(p, x):
    return lax.dynamic_update_slice(x @ p["a"], jnp.ones((2, 3)), (0, x[0, 0].astype(int))) @ p["b"]


def read_in_part(p, x):
    return jnp.tile(lax.dynamic_slice(x @ p["a"], (0, x[0, 0].astype(int)), (2, 4)), 2) @ p["b"]


def handed_over(p, x):
    return jax.pure_callback(np.sort, jax.ShapeDtypeStruct((2, 8), jnp.float32), x @ p["a"]) @ p["b"]


ORDERED = {
    "sorted": lambda p, x: jnp.sort(x @ p["a"], axis=-1) @ p["b"],
    "summed up": lambda p, x: jnp.cumsum(x @ p["a"], axis=-1) @ p["b"],
    "turned round": lambda p, x: (x @ p["a"])[:, ::-1] @ p["b"],
    "padded": lambda p, x: jnp.pad(x @ p["a"], ((0, 0), (1, 0)))[:, :8] @ p["b"],
    "numbered": lambda p, x: (x @ p["a"] + jnp.arange(8)) @ p["b"],
    "met by a constant": lambda p, x: (x @ p["a"] * np.arange(8.0)) @ p["b"],
    "searched for the largest": lambda p, x: jnp.argmax(x @ p["a"], -1) + p["b"][0, 0],
    "cut to the largest": lambda p, x: lax.top_k(x @ p["a"], 8)[0] @ p["b"],
    "every second": lambda p, x: jnp.pad((x @ p["a"])[:, ::2], ((0, 0), (0, 4))) @ p["b"],
    "cut off": lambda p, x: jnp.pad((x @ p["a"])[:, :5], ((0, 0), (0, 3))) @ p["b"],
    "side by side with other units": lambda p, x: jnp.concatenate([x @ p["a"], x @ p["a"][:, :1]], 1)[:, 1:] @ p["b"],
    "split unevenly": lambda p, x: jnp.split(x @ p["a"], [3], axis=1)[1] @ p["b"][:5],
    "pooled": lambda p, x: lax.reduce_window(x @ p["a"], 0.0, lax.add, (1, 3), (1, 1), "SAME") @ p["b"],
    "filtered": lambda p, x: jnp.stack([jnp.convolve(row, jnp.ones(3), "same") for row in x @ p["a"]]) @ p["b"],
    "reshaped otherwise": lambda p, x: (jnp.ones((3, 2)) @ x @ p["a"]).reshape(8, 3).T @ p["b"],
    "written over": written_over,
    "read in part": read_in_part,
    "gathered": gathered,
    "scattered": lambda p, x: (x @ p["a"]).at[:, 0].set(0.0) @ p["b"],
    "transformed": lambda p, x: jnp.fft.fft(x @ p["a"]).real @ p["b"],
    "handed over": handed_over,
    "the outputs": lambda p, x: (x @ p["a"], p["b"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERED)
def test_units_whose_order_matters_are_in_no_group(name):
    """A second pair of layers, without such an operation, keeps its own group."""
    function = lambda p, x: (ORDERED[name](p, x), jnp.maximum(x @ p["c"], 0) @ p["d"])
    params = {"a": whole(3, 8), "b": whole(8, 2), "c": whole(3, 4), "d": whole(4, 2)}
    assert written(permutation_spec(network(function, params), X)) == ["c1 d0"]


def test_statistics_follow_their_units_and_unused_leaves_are_left_out():
    function = lambda p, x: ((x @ p["a"] - p["mean"]) * p["scale"]) @ p["b"]
    params = {"a": whole(3, 8), "scale": whole(8), "b": whole(8, 2), "idle": whole(8, 8)}
    model = network(function, params, {"mean": whole(8)})
    spec = permutation_spec(model, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    assert spec == {"P0": [("a", 1), ("b", 0), ("extra/mean", 0), ("scale", 0)]}
    moved = shuffled(model, spec)
    assert sorted(moved.extra["mean"].tolist()) == sorted(model.extra["mean"].tolist())
    np.testing.assert_array_equal(moved.apply(moved.params, moved.extra, X)[0], model.apply(params, model.extra, X)[0])


def test_factors_that_do_not_fit_each_other_are_fixed():
    axes = Axes()
    a, b, c = axes.new(12), axes.new(12), axes.new(7)
    axes.regroup([a], (3, 4))
    axes.regroup([b], (4, 3))
    axes.unite(a, b)
    assert all(map(axes.is_fixed, axes.leaves(a + b)))
    assert all(map(axes.is_fixed, axes.leaves(sum(axes.regroup([a], (0, 4)), ()))))
    axes.unite(c, ())
    assert axes.is_fixed(c[0])


def test_a_spec_is_data_and_survives_json():
    spec = {"P0": [("a", 1), ("b", 0, (4, 1))]}
    params = {"a": np.arange(8).reshape(1, 8), "b": np.arange(32)}
    again = json.loads(json.dumps(spec))
    order = {"P0": np.arange(8)[::-1]}
    one, other = apply_permutations(params, spec, order), apply_permutations(params, again, order)
    assert one["b"].tolist() == other["b"].tolist() == params["b"].reshape(4, 8)[:, ::-1].reshape(-1).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_values_keep_their_bits_type_and_kind(dtype):
    host = {"layers": [np.asarray(jnp.asarray(RNG.normal(size=(3, 4)), dtype)), np.ones(4)]}
    spec, order = {"P0": [("layers/0", -1), ("layers/?", -1)][:1]}, {"P0": [3, 1, 0, 2]}
    for tree in (host, jax.tree.map(jnp.asarray, host)):
        moved = apply_permutations(tree, spec, order)
        assert type(moved["layers"][0]) is type(tree["layers"][0]) and moved["layers"][0].dtype == dtype
        assert np.asarray(moved["layers"][0]).tobytes() == host["layers"][0][:, [3, 1, 0, 2]].tobytes()
        assert moved["layers"][1] is tree["layers"][1]


def test_permutations_are_traced_and_stay_where_the_arrays_lie():
    spec, order = {"P0": [("a", 0)]}, {"P0": [1, 2, 0]}
    assert jax.jit(lambda tree: apply_permutations(tree, spec, order))({"a": jnp.arange(3)})["a"].tolist() == [1, 2, 0]
    placed = jax.device_put(jnp.arange(3), jax.devices()[0])
    moved = apply_permutations({"a": placed, "b": jnp.arange(3)}, spec, order)["a"]
    assert moved.committed and moved.sharding == placed.sharding
    assert not apply_permutations({"a": jnp.arange(3) + 0}, spec, order)["a"].committed


def test_a_group_that_is_left_out_stays_and_globs_name_several_leaves():
    tree = {"one": {"bias": np.arange(3)}, "two": {"bias": np.arange(3)}, "three": np.arange(4)}
    spec = {"P0": [("*/bias", 0)], "P1": [("three", 0)]}
    moved = apply_permutations(tree, spec, {"P0": [2, 0, 1]})
    assert moved["one"]["bias"].tolist() == moved["two"]["bias"].tolist() == [2, 0, 1]
    assert moved["three"] is tree["three"]


TREE = {"dense1": {"kernel": np.ones((3, 8)), "bias": np.ones(8)}, "dense2": {"kernel": np.ones((9, 2))}}
WRONG = {
    r"the spec names no group, or one without entries": {},
    r"no group, or one without": {"P0": []},
    r"has the entry 'dense1/bias'. Expected \(path, axis\), or \(path, axis, \(outer, inner\)\)": {
        "P0": ["dense1/bias"]},
    r"has the entry \('dense1/bias', 0, \(0, 1\)\)": {"P0": [("dense1/bias", 0, (0, 1))]},
    r"has the entry 7": {"P0": [7]},
    r"path 'dense1/kernal' matched none of 3 leaves. Nearest: dense1/kernel": {"P0": [("dense1/kernal", 1)]},
    r"'extra/mean' matched none of 3 .* Statistics are there in a Model, or in {\*\*params": {
        "P0": [("extra/mean", 0)]},
    r"axis 2 is out of range for 'dense1/kernel', which is \(3, 8\) float64. Expected an axis from 0 to 1": {
        "P0": [("dense1/kernel", 2)]},
    r"group 'P0' has 8 units in axis 1 of 'dense1/kernel' and 9 in axis 0 of 'dense2/kernel'": {
        "P0": [("dense1/kernel", 1), ("dense2/kernel", 0)]},
    r"axis 0 of 'dense2/kernel' has 9 entries, which \(2, 1\) does not divide": {"P0": [("dense2/kernel", 0, (2, 1))]},
    r"axis 0 of 'dense1/bias' is permuted by 'P0' and by 'P1'. Expected one entry per axis": {
        "P0": [("dense1/bias", 0)], "P1": [("dense1/bias", 0, (1, 2))]},
    r"is permuted by 'P0' and by 'P0'": {"P0": [("dense1/bias", 0), ("*/bias", 0)]},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_spec_that_does_not_fit_says_where(message):
    with pytest.raises(SelectionError, match=message):
        apply_permutations(TREE, WRONG[message], {})


def test_parts_of_an_axis_that_lie_within_each_other_are_no_conflict():
    spec = {"heads": [("a", 0, (1, 3))], "inside": [("a", 0, (2, 1))]}
    orders = {"inside": [2, 0, 1], "heads": [1, 0]}
    assert apply_permutations({"a": np.arange(6)}, spec, orders)["a"].tolist() == [5, 3, 4, 2, 0, 1]


def test_a_permutation_that_is_none_is_refused():
    spec = {"P0": [("dense1/bias", 0)]}
    message = r"permutation 'P0' is .* Expected the numbers 0 to 7, each once: its group has 8 units"
    for order in ([0, 1], [0] * 8, np.arange(8.0)):
        with pytest.raises(TransferError, match=message):
            apply_permutations(TREE, spec, {"P0": order})
    with pytest.raises(SelectionError, match=r"permutation 'P1' is of no group of the spec. Nearest: P0"):
        apply_permutations(TREE, spec, {"P1": np.arange(8)})


def test_a_network_without_hidden_units_says_so():
    model = network(lambda p, x: x @ p["a"], {"a": whole(3, 2)})
    with pytest.raises(TransferError, match=r"found no axis that may be permuted in 1 leaves: every axis reaches"):
        permutation_spec(model, X)


def test_params_that_hide_extra_are_refused():
    model = Model(None, None, {"extra": np.ones(3)}, {"mean": np.ones(3)})
    with pytest.raises(TransferError, match="have an entry 'extra' of their own, cannot be told from its extra"):
        apply_permutations(model, {"P0": [("extra", 0)]}, {})
