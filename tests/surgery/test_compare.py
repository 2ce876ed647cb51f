"""Two networks beside each other: the first layer that departs is the one that was made wrong."""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import transferjax as tj
from transferjax import interop, models, surgery
from transferjax._errors import PlanError, SelectionError, TransferError
from transferjax.models import _bert, _initialise
from transferjax.models import _efficientnet_lite as lite
from transferjax.surgery import _compare

compare = _compare.compare
FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "bert"
TINY = _bert.Variant(layers=2, width=8, heads=2, hidden=12, vocabulary=20, positions=10, types=3)


def first(report):
    return report.metadata["first departure"]


def results(report):
    return dict(zip(report.column("layer"), report.column("result"), strict=True))


# EfficientNet: two blocks of the real modules, small ----------------------------------------------------------------


class Small(nnx.Module):
    def __init__(self, rngs):
        self.stem = lite.Stem(rngs=rngs)
        specs = [(3, 1, 1, 32, 8), (5, 2, 2, 8, 8)]
        self.blocks = nnx.List([lite.Block(lite.BlockSpec(*spec, 0.1), rngs=rngs) for spec in specs])
        self.fc = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))


@functools.cache
def small():
    return Small(nnx.Rngs(0))


def lite_model(wrong=None):
    module = nnx.clone(small())
    if wrong:
        wrong(module)
    return interop.nnx(module)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


def wrong_epsilon(module):
    module.blocks[1].depthwise_bn.epsilon = 1e-1


def wrong_kernel(module):
    kernel = module.blocks[1].project.kernel
    kernel.set_value(kernel[...].reshape(4, 4, 8).swapaxes(0, 1).reshape(kernel.shape))


def wrong_padding(module):
    module.blocks[1].depthwise.padding = ((2, 2), (2, 2))


def wrong_statistics(module):
    module.stem.bn.mean.set_value(module.stem.bn.mean[...] + 0.1)


@pytest.mark.parametrize(
    ("wrong", "layer"),
    [
        (None, None),
        (wrong_epsilon, "blocks/1/depthwise_bn"),
        (wrong_kernel, "blocks/1/project"),
        (wrong_padding, "blocks/1/depthwise"),
        (wrong_statistics, "stem/bn"),
    ],
)
def test_the_wrong_layer_of_an_efficientnet_is_named(wrong, layer, images):
    report = compare(lite_model(), lite_model(wrong), images)
    assert first(report) == layer
    order = [name for name in report.column("layer") if "drop_connect" not in name]
    block = lambda n, *names: [*(f"blocks/{n}/{name}" for name in names), f"blocks/{n}"]
    three = ("depthwise", "depthwise_bn", "project", "project_bn")
    assert order == [
        *("stem/conv", "stem/bn", "stem"),
        *block(0, *three),
        *block(1, "expand", "expand_bn", *three),
        *("fc", "(outputs)"),
    ]
    before = report.column("layer")[: report.column("layer").index(layer)] if layer else report.column("layer")
    assert all(results(report)[name] == "agrees" for name in before)
    assert report.title == (
        "Compare: 17 layers agree" if layer is None else f"Compare: 17 layers, the first departure is '{layer}'"
    )


# BERT -----------------------------------------------------------------------------------------------------------------


@functools.cache
def bert(layers):
    variant = dataclasses.replace(TINY, layers=layers)
    return _initialise.materialise(lambda: _bert.build(variant, 0), jax.random.key(0), _bert.std, "head/")


def bert_model(layers, change=lambda module: None):
    module = nnx.clone(bert(layers))
    change(module)
    return interop.nnx(module)


def transposed(module):
    kernel = module.layers[0].attention.value.kernel
    kernel.set_value(kernel[...].T)


def other_norm(module):
    module.layers[0].mlp_norm.epsilon = 1e-2


@pytest.mark.parametrize(
    ("change", "layer"), [(transposed, "layers/0/attention/value"), (other_norm, "layers/0/mlp_norm")]
)
def test_the_wrong_layer_of_a_bert_is_named(change, layer):
    tokens = {"input_ids": np.array([[3, 4, 5], [6, 7, 1]]), "attention_mask": np.array([[1, 1, 1], [1, 1, 0]])}
    report = compare(bert_model(1), bert_model(1, change), tokens)
    assert first(report) == layer
    assert sorted(results(report))[:3] == [f"(outputs)/{name}" for name in ("embedding", "last_hidden_state", "pooled")]
    assert sorted(list(results(report))[-3:]) == sorted(results(report))[:3]


def test_what_torch_computed_is_a_reference_too():
    with np.load(FIXTURES / "tiny.npz") as reference:
        weights = {n.removeprefix("weights/"): reference[n] for n in reference if n.startswith("weights/")}
        model = bert_model(2)
        plan = surgery.plan(weights, model, *models.rules("bert_base"))
        model = surgery.assemble(model, {path: jnp.asarray(leaf) for path, leaf in plan.apply(weights).items()})
        tokens = {name: reference[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        at = {name: f"(outputs)/{name}" for name in ("pooled", "embedding")}
        report = compare(reference, model, tokens, at=at)
        assert first(report) is None and report.metadata["largest relative difference"] < 1e-5
        assert sorted(zip(report.column("layer"), report.column("in b"), strict=True)) == sorted(at.items())
        other = model._replace(
            params={**model.params, "pooler": jax.tree.map(lambda w: w * 1.01, model.params["pooler"])}
        )
        assert first(compare(other, reference, tokens, at={"(outputs)/pooled": "pooled"})) == "(outputs)/pooled"


# Plain functions: names, order, shapes, numbers -----------------------------------------------------------------------


def chain(*steps):
    """A Model of marked steps, each a function of one array."""

    def apply(params, x):
        for name, step in steps:
            x = interop.mark(name, step(x))
        return x

    return interop.pure(apply, {"unused": jnp.zeros(())})


DOUBLE, ADD = (lambda x: 2 * x), (lambda x: x + 1)


def test_names_that_differ_are_paired():
    a = chain(("stem", DOUBLE), ("body", ADD), ("twice", DOUBLE), ("twice", DOUBLE))
    b = chain(("first", DOUBLE), ("second", ADD), ("tw", DOUBLE), ("tw", ADD))
    at = {"stem": "first", "body": "second", "twice": "tw"}
    for given in (at, list(at.items()), [list(pair) for pair in at.items()]):
        report = compare(a, b, jnp.ones(2), at=given)
        assert report.column("layer") == ["stem", "body", "twice", "twice#2", "(outputs)"]
        assert report.column("in b") == ["first", "second", "tw", "tw#2", None]
        assert first(report) == "twice#2"


def test_parts_of_outputs_are_paired_with_their_module():
    a, b = (chain((name, lambda x: (x, {"more": 3 * x})), ("sum", lambda x: x[0] + x[1]["more"])) for name in "ab")
    report = compare(a, b, jnp.ones(2), at={"a": "b", "sum": "sum"})
    assert report.column("layer") == ["a/0", "a/1/more", "sum", "(outputs)"] and first(report) is None


def test_layers_come_in_the_order_in_which_they_run_also_in_loops_and_calls():
    def apply(params, x):
        x = interop.mark("same", interop.mark("z0", ADD(x)))
        x = interop.mark("z", jax.jit(DOUBLE)(x))
        return interop.mark("a", interop.mark("b/c", interop.mark("y", ADD(x))))

    model = interop.pure(apply, {"z0": {"bias": jnp.zeros(())}})
    assert compare(model, model, jnp.ones(2)).column("layer") == ["z0", "same", "z", "b/c", "a", "y", "(outputs)"]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(3, name="zeta")(x)
        return nn.Dense(3, name="alpha")(jnp.tanh(x)), None


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        axes = {"params": 0, "intermediates": 0}
        return nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=4)(name="layers")(x, None)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_layers_of_a_scan_come_in_the_order_of_its_body(remat):
    module = Scanned(remat)
    model = interop.linen(module, module.init(jax.random.key(0), jnp.ones((1, 3))))
    report = compare(model, model, jnp.ones((1, 3)), at=["layers/*"])
    assert report.column("layer") == ["layers/zeta", "layers/alpha", "(outputs)"]
    assert report.column("shape")[0] == "(4, 1, 3)"
    kernel = model.params["layers"]["alpha"]["kernel"]
    alpha = {**model.params["layers"]["alpha"], "kernel": kernel.at[3].mul(2)}
    wrong = model._replace(params={"layers": {**model.params["layers"], "alpha": alpha}})
    assert first(compare(model, wrong, jnp.ones((1, 3)), at=["layers/*"])) == "layers/alpha"


def test_what_is_found_in_only_one_is_told():
    a = chain(("stem", DOUBLE), ("norm", lambda x: x), ("head", ADD))
    b = chain(("stem", DOUBLE), ("gate", lambda x: x), ("head", ADD))
    report = compare(a, b, jnp.ones(2))
    assert results(report) == {"stem": "agrees", "norm": "only in a", "head": "agrees", "(outputs)": "agrees",
                               "gate": "only in b"}  # fmt: skip
    assert report.metadata["only in a"] == "norm" and report.metadata["only in b"] == "gate"
    assert first(report) is None and report.title == "Compare: 3 layers agree"


def test_outputs_of_another_form_are_told():
    a, b = chain(("stem", DOUBLE)), chain(("stem", DOUBLE), ("pack", lambda x: {"logits": x}))
    report = compare(a, b, jnp.ones(2), at="stem")
    assert results(report) == {"stem": "agrees", "(outputs)": "only in a", "(outputs)/logits": "only in b"}


def test_other_shapes_depart_and_are_shown():
    a, b = chain(("stem", DOUBLE), ("flat", jnp.ravel)), chain(("stem", lambda x: x.T), ("flat", jnp.ravel))
    report = compare(a, b, jnp.ones((2, 3)))
    assert first(report) == "stem"
    row = report.to_dicts()[0]
    assert (row["shape"], row["result"]) == ("(2, 3) and (3, 2)", "another shape")
    assert row["largest difference"] is row["relative"] is row["cosine"] is None


def test_the_numbers_of_a_row():
    a, b = np.array([[3.0, 0.0], [0.0, -4.0]]), np.array([[3.0, 0.0], [0.0, -3.0]])
    row = compare({"x": a}, {"x": b}, None).to_dicts()[0]
    assert (row["largest difference"], row["relative"]) == (1.0, 0.25)
    assert row["cosine"] == pytest.approx(21 / (5 * np.sqrt(18)))
    assert compare({"x": a}, {"x": b}, None, tolerance=0.25).column("result") == ["agrees"]
    assert compare({"x": a}, {"x": b}, None, tolerance=0.2499).column("result") == ["departs"]


INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("a", "b", "largest", "result"),
    [
        ([1.0, INF], [1.0, INF], 0.0, "agrees"),
        ([1.0, -INF], [1.0, INF], INF, "departs"),
        ([1.0, INF], [1.0, 2.0], INF, "departs"),
        ([0.0, 0.0], [0.0, 0.0], 0.0, "agrees"),
        ([0.0, 0.0], [0.0, 1e-9], 1e-9, "departs"),
        ([1.0, NAN], [1.0, 2.0], NAN, "NaN in a"),
        ([1.0, 2.0], [1.0, NAN], NAN, "NaN in b"),
        ([1.0, NAN], [1.0, NAN], NAN, "NaN in a and b"),
        ([NAN], [NAN], NAN, "NaN in a and b"),
        ([], [], 0.0, "agrees"),
        ([True, False], [True, True], 1.0, "departs"),
        ([1 + 1j], [1 - 1j], 2.0, "departs"),
    ],
)
def test_what_is_not_finite_never_agrees_by_accident(a, b, largest, result):
    report = compare({"x": np.array(a)}, {"x": np.array(b)}, None)
    assert report.column("result") == [result]
    np.testing.assert_equal(report.column("largest difference"), [largest])
    assert (first(report) is None) == (result == "agrees")


def test_bfloat16_is_compared_in_its_own_steps():
    a, b = (chain(("x", lambda x, d=d: x.astype(d))) for d in (jnp.float32, jnp.bfloat16))
    report = compare(a, b, jnp.array([1.0, 3.1415927]))
    assert first(report) == "x" and 1e-4 < report.column("relative")[0] < 4e-3
    assert first(compare(a, b, jnp.array([1.0, 3.1415927]), tolerance=1e-2)) is None


def test_each_model_may_have_its_own_inputs():
    a = chain(("sum", lambda x: x.sum((1, 2))))
    b = chain(("sum", lambda x: x.sum((2, 3))))
    x = jnp.arange(24.0).reshape(1, 2, 4, 3)
    assert first(compare(a, b, x, inputs_b=x.transpose(0, 3, 1, 2))) is None
    features = {"sum": np.asarray(x.sum((1, 2)))}
    assert compare(features, b, None, inputs_b=x.transpose(0, 3, 1, 2)).column("result") == ["agrees"]


def test_one_forward_pass_each():
    calls = []
    counted = lambda x: jax.pure_callback(lambda v: calls.append(1) or v, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    model = chain(("count", counted), ("double", DOUBLE))
    compare(model, model, jnp.ones(2))
    assert len(calls) == 2


def test_a_report_prints_what_was_found():
    text = str(compare({"stem": np.ones(2), "head": np.ones(2)}, {"stem": np.ones(2), "head": np.zeros(2)}, None))
    assert text.splitlines()[0] == "Compare: 2 layers, the first departure is 'head'"
    assert "first departure: head" in text and "tolerance: 0.0001" in text


STEM = chain(("stem", DOUBLE))


@pytest.mark.parametrize(
    ("a", "b", "at", "error", "message"),
    [
        (STEM, STEM, "body", SelectionError, r"matched none of 1 module. Nearest: stem"),
        (STEM, STEM, [], SelectionError, r"compare\(\) expects at least one layer in at="),
        (STEM, STEM, 3, SelectionError, r"expected a selector or a glob such as 'head/\*\*', got int"),
        (STEM, STEM, [("stem", "stem", "x")], SelectionError, r"expects pairs \(path in a, path in b\) of str in at="),
        (STEM, STEM, [("stem", 3)], SelectionError, r"expects pairs \(path in a, path in b\) of str in at="),
        (STEM, STEM, {"stme": "stem"}, SelectionError, r"selector 'stme' matched none of 1 module. Nearest: stem"),
        (STEM, chain(("first", DOUBLE)), "**", SelectionError,
         r"compare\(\) found no layer in both: a has stem, \(outputs\); b has first, \(outputs\)."),
        ({"stem": np.ones(2)}, STEM, {"stme": "stem"}, SelectionError,
         r"compare\(\): model_a has no 'stme'. Nearest: stem"),
        (STEM, {"first": np.ones(2)}, "**/stem", SelectionError,
         r"compare\(\): '\*\*/stem' matched none of the 1 names of model_b: first."),
        (STEM, STEM, {"st*": "st*"}, SelectionError,
         r"^compare\(\): model_a: selector 'st\*' matched none of 1 module.*In pairs each name is one path, not a gl"),
        ({"stem": np.ones(2)}, STEM, {"st*": "stem"}, SelectionError,
         r"model_a has no 'st\*'. Nearest: stem. In pairs each name is one path, not a glob: write each pair out"),
        (STEM, {"stem": "x"}, "**", TransferError,
         r"compare\(\): 'stem' of model_b is str; expected an array of numbers."),
        (STEM, 3, "**", TransferError, r"compare\(\) expects a Model or a mapping {name: array} as model_b, got int"),
        (STEM._replace(params={"unused": jax.ShapeDtypeStruct((), np.float32)}), STEM, "**", TransferError,
         r"compare\(\): the weights of model_a are abstract, see 'unused'."),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_says_what_to_write(a, b, at, error, message):
    with pytest.raises(error, match=message):
        compare(a, b, jnp.ones(2), at=at)


@pytest.mark.parametrize("tolerance", [-1, "x", NAN, None, True])
def test_a_tolerance_that_is_none_is_said(tolerance):
    with pytest.raises(PlanError, match=r"tolerance is .*; expected a number of at least 0, such as 1e-4"):
        compare(STEM, STEM, jnp.ones(2), tolerance=tolerance)


def test_the_public_name():
    assert tj.surgery.compare is compare
