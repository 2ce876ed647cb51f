"""Growth of whole networks: what is preserved and what is not, on an MLP, a CNN with BatchNorm, and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax._errors import PlanError, SelectionError
from transferjax.surgery._depth import drop_layers, insert_identity, interleave_layers, stack_layers
from transferjax.surgery._growth import growth_report, narrow, widen, widen_aki
from transferjax.surgery._units import map_units
from transferjax.tree import nest, paths

KEY = jax.random.key(3)
BLOCKS = r"blocks/(?P<i>\d+)/.*"


def made(shapes, seed=0):
    """Nested dicts of normal values, variances positive, scales about 1."""
    rng = np.random.default_rng(seed)
    value = lambda path, shape: (
        rng.uniform(0.5, 2.0, shape) if path.endswith(("var", "scale"))
        else rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]) or 1)
    )  # fmt: skip
    return nest({path: value(path, shape).astype(np.float32) for path, shape in shapes.items()})


def probe(*shape):
    return np.random.default_rng(9).standard_normal(shape).astype(np.float32)


def gap(old, new, batch, apply, apply_new=None):
    report = growth_report(old, new, batch, apply, apply_new)
    assert report.column("new")[2] > 0.1, "the outputs are too small to tell"
    return report.metadata["max |f_old - f_new|"]


# MLP -----------------------------------------------------------------------------------------------------------------

MLP = made({"in/kernel": (5, 6), "in/bias": (6,), "mid/kernel": (6, 7), "mid/bias": (7,), "out/kernel": (7, 3)})
MLP_IN = {"in/kernel": (1, "outgoing"), "in/bias": (0, "outgoing"), "mid/kernel": (0, "incoming")}


def mlp(p, x):
    x = jax.nn.relu(x @ p["in"]["kernel"] + p["in"]["bias"])
    return jax.nn.gelu(x @ p["mid"]["kernel"] + p["mid"]["bias"]) @ p["out"]["kernel"]


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("width", [6, 7, 10, 25])
def test_a_wider_mlp_computes_the_same(width, key):
    grown = widen(MLP, MLP_IN, width, key)
    assert grown["in"]["kernel"].shape == (5, width) and grown["mid"]["kernel"].shape == (width, 7)
    assert gap(MLP, grown, probe(8, 5), mlp) < 1e-5


def test_uneven_shares_compute_the_same_and_let_copies_learn_apart():
    loss = lambda p: jnp.sum(mlp(p, probe(8, 5)) ** 2)
    even, uneven = widen(MLP, MLP_IN, 12), widen(MLP, MLP_IN, 12, KEY, uneven=0.5)
    assert gap(MLP, uneven, probe(8, 5), mlp) < 1e-5
    units = np.array([np.flatnonzero(MLP["in"]["bias"] == b)[0] for b in uneven["in"]["bias"]])
    first, second = next(np.flatnonzero(units == u)[:2] for u in units if (units == u).sum() > 1)
    slope = jax.grad(loss)(even)["in"]["kernel"]
    assert np.allclose(slope[:, 0], slope[:, 6], atol=1e-6)
    slope = jax.grad(loss)(uneven)["in"]["kernel"]
    assert not np.allclose(slope[:, first], slope[:, second], rtol=1e-2)


def test_growth_keeps_kind_dtype_and_structure():
    for array_of in (np.asarray, jnp.asarray):
        tree = jax.tree.map(lambda a, of=array_of: of(a.astype(jnp.bfloat16)), MLP)
        grown = widen(tree, MLP_IN, 9, KEY, uneven=0.2)
        assert jax.tree.structure(grown) == jax.tree.structure(tree)
        assert all(isinstance(a, type(b)) and a.dtype == b.dtype for a, b in zip(*map(jax.tree.leaves, (grown, tree))))
        assert grown["out"]["kernel"] is tree["out"]["kernel"]


def test_a_narrower_mlp_keeps_its_strongest_units():
    tree = jax.tree.map(np.copy, MLP)
    tree["in"]["kernel"][:, [1, 4]] *= 1e-4
    tree["in"]["bias"][[1, 4]] = 0
    small = narrow(tree, MLP_IN, 4)
    assert np.array_equal(small["in"]["kernel"], tree["in"]["kernel"][:, [0, 2, 3, 5]])
    assert np.array_equal(small["mid"]["kernel"], tree["mid"]["kernel"][[0, 2, 3, 5]])
    assert gap(tree, small, probe(8, 5), mlp) < 1e-2
    assert np.array_equal(narrow(tree, MLP_IN, [5, 2])["in"]["bias"], tree["in"]["bias"][[5, 2]])
    assert gap(MLP, narrow(MLP, MLP_IN, 3), probe(8, 5), mlp) > 1e-2


# CNN with BatchNorm --------------------------------------------------------------------------------------------------

NORM = ("scale", "bias", "mean", "var")
CNN = made({
    "a/kernel": (3, 3, 2, 4), **{f"a_bn/{n}": (4,) for n in NORM}, "dw/kernel": (3, 3, 1, 4),
    "b/kernel": (3, 3, 4, 6), **{f"b_bn/{n}": (6,) for n in NORM}, "fc/kernel": (5 * 4 * 6, 3), "fc/bias": (3,),
})  # fmt: skip
CNN_A = {"a/kernel": (3, "outgoing"), "a_bn/*": (0, "outgoing"), "dw/kernel": (-1, "outgoing"),
         "b/kernel": (2, "incoming")}  # fmt: skip
CNN_B = {"b/kernel": (3, "outgoing"), "b_bn/*": (0, "outgoing"), "fc/kernel": (0, "incoming", "interleaved")}


def convolve(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", (1, 1), (1, 1), ("NHWC", "HWIO", "NHWC"), groups)


def normalise(p, x):
    return (x - p["mean"]) / jnp.sqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]


def cnn(p, x):
    x = jax.nn.relu(normalise(p["a_bn"], convolve(x, p["a"]["kernel"])))
    x = convolve(x, p["dw"]["kernel"], groups=x.shape[-1])
    x = jax.nn.relu(normalise(p["b_bn"], convolve(x, p["b"]["kernel"])))
    return x.reshape(len(x), -1) @ p["fc"]["kernel"] + p["fc"]["bias"]


@pytest.mark.parametrize("uneven", [0.0, 0.4])
def test_a_wider_cnn_with_batch_norm_computes_the_same(uneven):
    grown = widen(CNN, CNN_A, 7, KEY, uneven=uneven)
    grown = widen(grown, CNN_B, 11, KEY, uneven=uneven)
    assert grown["dw"]["kernel"].shape == (3, 3, 1, 7) and grown["fc"]["kernel"].shape == (5 * 4 * 11, 3)
    assert gap(CNN, grown, probe(3, 5, 4, 2), cnn) < 1e-5


def test_a_flattened_map_taken_as_blocks_is_another_function():
    axes = {**CNN_B, "fc/kernel": (0, "incoming", "blocks")}
    assert gap(CNN, widen(CNN, axes, 11), probe(3, 5, 4, 2), cnn) > 1e-2


# Residual CNN --------------------------------------------------------------------------------------------------------

RESNET = made({"stem/kernel": (3, 3, 2, 4)} | {
    f"blocks/{i}/{leaf}": shape for i in range(2) for leaf, shape in
    [("kernel", (3, 3, 4, 4)), *[(f"bn/{n}", (4,)) for n in NORM]]
})  # fmt: skip


def resnet(p, x):
    x = jax.nn.relu(convolve(x, p["stem"]["kernel"]))
    for i in range(len(p["blocks"])):
        block = p["blocks"][str(i)]
        x = jax.nn.relu(x + normalise(block["bn"], convolve(x, block["kernel"])))
    return x.mean((1, 2))


def test_a_deeper_resnet_computes_the_same_when_its_last_norm_is_zero():
    grown = insert_identity(RESNET, BLOCKS, after=[0, 1], zero="blocks/*/bn/{scale,bias}")
    assert list(grown["blocks"]) == ["0", "1", "2", "3"]
    assert gap(RESNET, grown, probe(3, 5, 4, 2), resnet) < 1e-5
    slopes = jax.grad(lambda p: jnp.sum(resnet(p, probe(3, 5, 4, 2)) ** 2))(jax.tree.map(jnp.asarray, grown))
    assert np.abs(slopes["blocks"]["1"]["bn"]["scale"]).max() > 0
    kernels = insert_identity(RESNET, BLOCKS, after=[0, 1], zero="blocks/*/kernel")
    assert gap(RESNET, kernels, probe(3, 5, 4, 2), resnet) > 1e-2


# Transformers --------------------------------------------------------------------------------------------------------

WIDTH, HEADS, SIZE, INNER = 8, 2, 4, 12
LEAVES = {
    "ln1/scale": (WIDTH,), "ln1/bias": (WIDTH,), "ln2/scale": (WIDTH,), "ln2/bias": (WIDTH,),
    **{f"{name}/kernel": (WIDTH, HEADS * SIZE) for name in "qkv"},
    **{f"{name}/bias": (HEADS * SIZE,) for name in "qkv"},
    "o/kernel": (HEADS * SIZE, WIDTH), "o/bias": (WIDTH,), "up/kernel": (WIDTH, INNER), "up/bias": (INNER,),
    "down/kernel": (INNER, WIDTH), "down/bias": (WIDTH,),
}  # fmt: skip
BERT = made({
    "embed": (11, WIDTH), "position": (6, WIDTH), "ln/scale": (WIDTH,), "ln/bias": (WIDTH,), "head/kernel": (WIDTH, 5),
    **{f"blocks/{i}/{leaf}": shape for i in range(3) for leaf, shape in LEAVES.items()},
})  # fmt: skip
TOKENS = np.random.default_rng(2).integers(0, 11, (4, 6))
RESIDUAL = {
    "embed": (1, "outgoing"), "position": (1, "outgoing"), "**/{ln,ln1,ln2}/*": (0, "outgoing"),
    "blocks/*/{q,k,v,up}/kernel": (0, "incoming"), "blocks/*/{o,down}/kernel": (1, "outgoing"),
    "blocks/*/{o,down}/bias": (0, "outgoing"), "head/kernel": (0, "incoming"),
}  # fmt: skip
FORWARD = {"blocks/*/up/kernel": (1, "outgoing"), "blocks/*/up/bias": (0, "outgoing"),
           "blocks/*/down/kernel": (0, "incoming")}  # fmt: skip
ATTENTION = {"blocks/*/{q,k,v}/kernel": (1, "outgoing", "blocks"), "blocks/*/{q,k,v}/bias": (0, "outgoing", "blocks"),
             "blocks/*/o/kernel": (0, "incoming", "blocks")}  # fmt: skip


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def attend(p, x):
    q, k, v = (jnp.reshape(x @ p[n]["kernel"] + p[n]["bias"], (*x.shape[:2], -1, SIZE)) for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(SIZE))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1)
    return mixed @ p["o"]["kernel"] + p["o"]["bias"]


def forward(p, x):
    return jax.nn.gelu(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"] + p["down"]["bias"]


def transformer(p, tokens, post):
    x = p["embed"][tokens] + p["position"]
    x = layer_norm(p["ln"], x) if post else x
    for i in range(len(p["blocks"])):
        block = p["blocks"][str(i)]
        if post:
            x = layer_norm(block["ln1"], x + attend(block, x))
            x = layer_norm(block["ln2"], x + forward(block, x))
        else:
            x = x + attend(block, layer_norm(block["ln1"], x))
            x = x + forward(block, layer_norm(block["ln2"], x))
    return (x if post else layer_norm(p["ln"], x)) @ p["head"]["kernel"]


NORMS = pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])


def change(grown, post):
    return gap(BERT, grown, TOKENS, lambda p, x: transformer(p, x, post))


@NORMS
@pytest.mark.parametrize("key", [None, KEY])
def test_more_inner_units_and_heads_compute_the_same(post, key):
    grown = widen(BERT, FORWARD, 17, key)
    grown = widen(grown, ATTENTION, 3, key, count=HEADS)
    assert grown["blocks"]["0"]["q"]["kernel"].shape == (WIDTH, 3 * SIZE)
    assert change(grown, post) < 1e-5


@NORMS
def test_a_multiple_of_the_residual_width_computes_the_same(post):
    for times in (2, 3):
        grown = widen(BERT, RESIDUAL, times * WIDTH)
        assert grown["ln"]["scale"].shape == (times * WIDTH,)
        assert change(grown, post) < 1e-5


@NORMS
def test_any_other_residual_width_is_near_only(post):
    assert change(widen(BERT, RESIDUAL, 12), post) > 1e-3
    assert change(widen(BERT, RESIDUAL, 16, KEY), post) > 1e-3


@NORMS
def test_advanced_knowledge_takes_new_units_from_the_layer_above_and_is_not_exact(post):
    grown, plain = widen_aki(BERT, FORWARD, 18, BLOCKS), widen(BERT, FORWARD, 18)
    for i, above in [("0", "1"), ("1", "2"), ("2", "2")]:
        kernel = grown["blocks"][i]["up"]["kernel"]
        assert np.array_equal(kernel[:, :INNER], BERT["blocks"][i]["up"]["kernel"])
        assert np.array_equal(kernel[:, INNER:], BERT["blocks"][above]["up"]["kernel"][:, :6])
        assert np.array_equal(grown["blocks"][i]["up"]["bias"][INNER:], BERT["blocks"][above]["up"]["bias"][:6])
        assert np.array_equal(grown["blocks"][i]["down"]["kernel"], plain["blocks"][i]["down"]["kernel"])
    assert change(grown, post) > 1e-3


def test_advanced_knowledge_of_heads_and_of_a_residual_stream_keeps_the_old_entries():
    grown = widen_aki(BERT, ATTENTION, 3, BLOCKS, KEY, count=HEADS)
    kernel, above = grown["blocks"]["0"]["q"]["kernel"], BERT["blocks"]["1"]["q"]["kernel"]
    assert np.array_equal(kernel[:, : HEADS * SIZE], BERT["blocks"]["0"]["q"]["kernel"])
    assert any(np.array_equal(kernel[:, HEADS * SIZE :], above[:, h * SIZE : (h + 1) * SIZE]) for h in range(HEADS))
    grown = widen_aki(BERT, RESIDUAL, 16, BLOCKS)
    assert np.array_equal(grown["embed"], np.tile(BERT["embed"], (1, 2)))
    assert np.array_equal(grown["blocks"]["0"]["o"]["kernel"][:, WIDTH:], BERT["blocks"]["1"]["o"]["kernel"])
    assert np.array_equal(grown["blocks"]["0"]["q"]["kernel"], widen(BERT, RESIDUAL, 16)["blocks"]["0"]["q"]["kernel"])


def test_advanced_knowledge_of_an_interleaved_axis():
    tree = {f"{i}/w": np.arange(4.0)[None] + 10 * i for i in range(2)}
    grown = widen_aki(tree, {"*/w": (1, "outgoing", "interleaved")}, 3, r"(?P<i>\d+)/.*", count=2)
    assert grown["0/w"].tolist() == [[0, 1, 10, 2, 3, 12]] and grown["1/w"].tolist() == [[10, 11, 10, 12, 13, 12]]


def test_identity_blocks_deepen_a_pre_norm_transformer_exactly_and_a_post_norm_one_not():
    grown = insert_identity(BERT, BLOCKS, after=[0, 2], zero="blocks/*/{o,down}/*")
    assert len(grown["blocks"]) == 5
    assert change(grown, post=False) < 1e-5
    assert change(grown, post=True) > 1e-3


@NORMS
@pytest.mark.parametrize("other", [stack_layers, interleave_layers])
def test_stacked_and_interleaved_transformers_are_other_functions(other, post):
    grown = other(BERT, BLOCKS)
    assert len(grown["blocks"]) == 6 and change(grown, post) > 1e-2


@NORMS
def test_a_smaller_student_runs(post):
    small = drop_layers(BERT, BLOCKS, [1])
    small = narrow(narrow(small, FORWARD, 6), ATTENTION, 1, count=HEADS)
    small = narrow(small, RESIDUAL, 5)
    assert small["blocks"]["1"]["o"]["kernel"].shape == (SIZE, 5)
    assert change(small, post) > 1e-3


def test_growth_and_its_inverse():
    grown = widen(BERT, RESIDUAL, 2 * WIDTH)
    halved = map_units(grown, RESIDUAL, range(WIDTH), shares=np.ones(WIDTH))
    assert np.array_equal(halved["embed"], BERT["embed"])
    assert np.allclose(halved["head"]["kernel"], BERT["head"]["kernel"] / 2)


# Report and refusals -------------------------------------------------------------------------------------------------


def test_the_report_tells_sizes_and_the_difference():
    grown = widen(MLP, MLP_IN, 9, KEY)
    report = growth_report(MLP, grown, probe(8, 5), mlp)
    assert report.title == f"Growth: 106 -> {106 + 3 * (5 + 1 + 7)} parameters"
    assert report.columns == ("quantity", "old", "new")
    assert report.column("quantity") == ["leaves", "parameters", "largest |output|", "max |f_old - f_new|"]
    assert report.rows[:2] == (("leaves", 5, 5), ("parameters", 106, 145))
    assert report.metadata["function preserved"] is True and report.metadata["tolerance"] == 1e-5
    shifted = growth_report(MLP, grown, probe(8, 5), mlp, lambda p, x: {"a": mlp(p, x)}["a"] + 0.25)
    assert abs(shifted.rows[3][2] - 0.25) < 1e-5 and shifted.metadata["function preserved"] is False


def test_a_network_that_gives_nan_is_not_preserved():
    report = growth_report(MLP, MLP, probe(8, 5), mlp, lambda p, x: mlp(p, x) * np.nan)
    assert np.isnan(report.metadata["max |f_old - f_new|"]) and report.metadata["function preserved"] is False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: widen(MLP, MLP_IN, 5), "6 units do not grow to 5. Expected more; write narrow(...) for fewer."),
        (lambda: widen(MLP, MLP_IN, 9, uneven=0.1), "uneven is 0.1; expected at least 0 and below 1, and a key"),
        (lambda: widen(MLP, MLP_IN, 9, KEY, uneven=1.0), "uneven is 1.0; expected at least 0 and below 1"),
        (lambda: narrow(MLP, MLP_IN, 9), "9 units are asked for; expected 1 to 6. Write widen(...) for more."),
        (lambda: narrow(MLP, MLP_IN, [1, 1]), "a unit comes twice in units. Expected each at most once"),
        (lambda: narrow(MLP, {"in/bias": (0, "outgoing"), "mid/kernel": (0, "incoming")}, 3),
         "no outgoing leaf has two axes or more, so units have no norm. Give the units to keep."),
        (lambda: widen_aki(BERT, FORWARD, 18, "blocks/.*"), "'blocks/.*' has no group i. Write (?P<i>\\d+)"),
        (lambda: widen_aki(BERT, FORWARD, 18, "("), "widen_aki(..., '(') is malformed"),
        (lambda: widen_aki(MLP, MLP_IN, 18, BLOCKS), "has a next layer. Write widen(...) instead."),
        (lambda: widen_aki({"0/w": np.ones((1, 2)), "1/w": np.ones((3, 2))}, {"*/w": (1, "outgoing")}, 3,
                           r"(?P<i>\d+)/.*"),
         "'0/w' and '1/w' of the next layer differ: (1, 3) float64 and (3, 3) float64 when widened. Expected layers"),
        (lambda: growth_report(MLP, MLP, probe(8, 5), mlp, lambda p, x: mlp(p, x)[:2]),
         "the outputs of the two networks differ in form: ('', (8, 3)) and ('', (2, 3)). Expected the same paths"),
        (lambda: growth_report(MLP, MLP, probe(8, 5), mlp, lambda p, x: ()),
         "the outputs of the two networks differ in form: 1 and 0 arrays."),
    ],
)  # fmt: skip
def test_what_cannot_grow_is_said(make, message):
    with pytest.raises(PlanError) as error:
        make()
    assert message in str(error.value)


def test_a_selector_that_matches_nothing_names_the_nearest():
    with pytest.raises(SelectionError, match=r"selector 'inn/kernel' matched none of 5 parameters. Nearest: in/kernel"):
        widen(MLP, {"inn/kernel": (1, "outgoing")}, 9)


def test_flat_trees_grow_too():
    flat = paths(MLP)
    grown = widen(flat, MLP_IN, 9)
    assert list(grown) == list(flat) and grown["in/kernel"].shape == (5, 9)
