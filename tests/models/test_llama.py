"""Llama against the torch reference: tiny random networks, unrolled and scanned; plans for the published sizes."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import transferjax as tj
from transferjax import interop, models, surgery, testing, tree
from transferjax._errors import PlanError
from transferjax.models import _initialise, _llama, _llama_rules

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "llama"
TINY = _llama.Variant(layers=2, width=16, heads=4, kv_heads=2, hidden=20, vocabulary=24, positions=20)
CASES = {
    "tied": dataclasses.replace(TINY, heads=2, kv_heads=2, tied=True),
    "untied": TINY,
    "scaled": dataclasses.replace(
        TINY, kv_heads=1, head_width=8, theta=100.0, epsilon=1e-3, scaling=_llama.Scaling(8.0, positions=32)
    ),
}
PARAMETERS = {"llama3_2_1b": 1_235_814_400, "tinyllama_1_1b": 1_100_048_384}
FORMS = pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])


@functools.cache
def stored(case):
    """``(tensors of the file, inputs, hidden states, logits)`` of a tiny network."""
    with np.load(FIXTURES / f"{case}.npz") as file:
        arrays = dict(file)
    weights = {name.removeprefix("weights/"): arrays[name] for name in arrays if name.startswith("weights/")}
    return weights, {name: arrays[name] for name in ("input_ids", "attention_mask")}, arrays["hidden"], arrays["logits"]


def published(name, dtype="float32"):
    """The tensors of a published file."""
    shapes = json.loads((FIXTURES / "names.json").read_text())[name]
    return {path: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for path, shape in shapes.items()}


@functools.cache
def abstract(name, num_classes=0):
    build = functools.partial(_llama.build, _llama.VARIANTS[name], num_classes)
    return interop.nnx(nnx.eval_shape(build))


def model_of(variant, num_classes=0):
    build = lambda: _llama.build(variant, num_classes)
    return interop.nnx(_initialise.materialise(build, jax.random.key(0), _llama.std, "head/"))


def form(case, scanned):
    return dataclasses.replace(CASES[case], scanned=scanned)


@functools.cache
def filled(case, scanned=False, num_classes=0):
    """The tiny network with the reference's weights."""
    variant, weights = form(case, scanned), stored(case)[0]
    model = model_of(variant, num_classes)
    plan = surgery.plan(weights, model, *_llama_rules.huggingface(variant, 0, num_classes))
    leaves = plan.apply(weights, tree.paths(model.params))
    return surgery.assemble(model, {path: jnp.asarray(leaf) for path, leaf in leaves.items()})


def run(model, inputs):
    return jax.jit(model.apply)(model.params, model.extra, inputs)[0]


def same(one, two):
    """Bit for bit, under the same paths."""
    assert tree.paths(one).keys() == tree.paths(two).keys()
    jax.tree.map(np.testing.assert_array_equal, one, two)


@FORMS
@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits_agree_with_torch(case, scanned):
    _, inputs, hidden, logits = stored(case)
    model, kept = filled(case, scanned), inputs["attention_mask"] != 0
    at = ["embed", "layers"] if scanned else ["embed", "layers/*"]
    outputs, _, features = jax.jit(lambda *given: model.capture(*given, at))(model.params, model.extra, inputs)
    close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=0)
    close(features["embed"], hidden[0])
    first = features["layers"][0] if scanned else features["layers/0"]
    close(first[kept], hidden[1][kept])
    close(outputs["last_hidden_state"][kept], hidden[-1][kept])
    close(outputs["logits"][kept], logits[kept])
    last = np.array([19, 13, 19])  # whole, padded at its end, padded at its start
    close(outputs["pooled"], hidden[-1][np.arange(3), last])
    mean = np.stack([row[keep].mean(0) for row, keep in zip(hidden[-1], kept, strict=True)])
    close(outputs["embedding"], mean / np.linalg.norm(mean, axis=1, keepdims=True))


def test_scanned_and_unrolled_are_one_function():
    one, many = (run(filled("untied", scanned), stored("untied")[1]) for scanned in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, many)
    shapes = {path: leaf.shape for path, leaf in tree.paths(filled("untied", True).params).items()}
    assert shapes["layers/attention/query/kernel"] == (2, 16, 16) and shapes["layers/mlp_norm/scale"] == (2, 16)


@FORMS
def test_a_token_sees_what_came_before_it_and_no_padding(scanned):
    model, (_, inputs, _, _) = filled("untied", scanned), stored("untied")
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    logits = run(model, inputs)["logits"]
    later = tokens.copy()
    later[:, 10:] = (later[:, 10:] + 1) % 24
    after = run(model, {"input_ids": later, "attention_mask": mask})["logits"]
    np.testing.assert_allclose(after[:2, :10], logits[:2, :10], atol=1e-6)
    assert np.abs(after - logits)[0, 10:].max(-1).min() > 1e-3
    other = np.where(mask == 0, (tokens + 1) % 24, tokens)
    padded = run(model, {"input_ids": other, "attention_mask": mask})["logits"]
    np.testing.assert_allclose(padded[mask != 0], logits[mask != 0], atol=1e-6)
    one, two = (
        run(model, given) for given in ({"input_ids": tokens}, {**inputs, "attention_mask": np.ones_like(mask)})
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, two)


@FORMS
def test_padding_alone_gives_numbers(scanned):
    inputs = {"input_ids": np.zeros((1, 4), np.int32), "attention_mask": np.zeros((1, 4), np.int32)}
    assert all(np.isfinite(array).all() for array in run(filled("untied", scanned), inputs).values())


def test_scaled_frequencies_are_kept_slowed_or_between():
    plain, scaled = (
        _llama.frequencies(dataclasses.replace(CASES["scaled"], scaling=s)) for s in (None, CASES["scaled"].scaling)
    )
    ratio = plain / scaled  # 5.1, 1.6, 0.5 and 0.2 turns in 32 positions
    np.testing.assert_allclose(ratio[[0, 2, 3]], [1, 8, 8], rtol=1e-6)
    between = (32 * plain[1] / (2 * np.pi) - 1) / 3
    np.testing.assert_allclose(1 / ratio[1], between + (1 - between) / 8, rtol=1e-6)


@FORMS
@pytest.mark.parametrize("case", CASES)
def test_rules_keep_the_laws_of_plans(case, scanned):
    variant, weights = form(case, scanned), stored(case)[0]
    for num_classes in (0, 3):
        model = model_of(variant, num_classes)
        testing.check_plan(weights, model, _llama_rules.huggingface(variant, 0, num_classes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", _llama.VARIANTS)
def test_plans_of_the_published_files_are_total(name, dtype):
    source, model = published(name.removesuffix("_scanned"), dtype), abstract(name)
    plan = surgery.plan(source, model, *models.rules(name))
    assert plan.counts()["waived"] == plan.counts()["fresh"] == 0
    assert {move.target for move in plan.moves} == {*tree.paths(model.params)}
    assert sorted(source) == sorted(path for move in plan.moves for path in move.sources)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == PARAMETERS[name.removesuffix("_scanned")]
    assert len(plan.moves) == (11 if name.endswith("_scanned") else len(source)) + (name == "tinyllama_1_1b_scanned")


@pytest.mark.parametrize("name", _llama.VARIANTS)
def test_a_classifier_is_fresh_and_takes_the_place_of_the_output_layer(name):
    plan = surgery.plan(published(name.removesuffix("_scanned")), abstract(name, 5), *models.rules(name, num_classes=5))
    assert [move.target for move in plan.moves if move.source is None] == ["head/bias", "head/kernel"]
    assert plan.waived == (("lm_head.weight",) if name.startswith("tiny") else ())


@FORMS
def test_files_of_other_makers_and_years_are_known(scanned):
    variant, weights = form("tied", scanned), stored("tied")[0]
    rules = _llama_rules.huggingface(variant, 0, 0)
    assert surgery.plan(weights, model_of(variant), *rules).waived == ("lm_head.weight",)
    bare = {name.removeprefix("model."): array for name, array in weights.items() if name != "lm_head.weight"}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    plan = surgery.plan(bare, model_of(variant), *rules)
    assert plan.waived == ("layers.0.self_attn.rotary_emb.inv_freq",)
    half = {name: array.astype(jnp.bfloat16) for name, array in weights.items()}
    leaves = surgery.plan(half, model_of(variant), *rules).apply(half)
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(leaves["embed/embedding"], half["model.embed_tokens.weight"].astype(np.float32))


def test_a_file_in_half_precision_is_read_into_a_scanned_network(tmp_path):
    weights = {name: jnp.asarray(array, jnp.bfloat16) for name, array in stored("untied")[0].items()}
    tj.io.save(tmp_path / "model.safetensors", weights, format="safetensors")
    variant = form("untied", True)
    source, model = tj.io.open(tmp_path / "model.safetensors"), model_of(variant)
    model = tj.io.restore(source, surgery.plan(source.shapes, model, *_llama_rules.huggingface(variant, 0, 0)), model)
    kernel = np.asarray(weights["model.layers.1.mlp.up_proj.weight"]).astype(np.float32).T
    np.testing.assert_array_equal(model.params["layers"]["mlp"]["up"]["kernel"][1], kernel)


def test_a_file_of_another_depth_or_without_an_output_layer_is_refused():
    weights = dict(stored("untied")[0])
    deeper = dataclasses.replace(TINY, layers=3)
    for scanned, message in ((False, r"layers/2/attention/key/kernel"), (True, r"layers/attention/key/kernel.*\(2, ")):
        variant = dataclasses.replace(deeper, scanned=scanned)
        with pytest.raises(PlanError, match=message):
            surgery.plan(weights, model_of(variant), *_llama_rules.huggingface(variant, 0, 0))
    del weights["lm_head.weight"]
    with pytest.raises(PlanError, match="lm_head/kernel"):
        surgery.plan(weights, model_of(TINY), *_llama_rules.huggingface(TINY, 0, 0))


def test_a_tied_file_fills_an_untied_network():
    weights = {name: array for name, array in stored("tied")[0].items() if name != "lm_head.weight"}
    variant = dataclasses.replace(CASES["tied"], tied=False)
    model = model_of(variant)
    tie = (surgery.tie("lm_head/kernel", "embed/embedding"), surgery.torch_layout("lm_head/kernel"))
    leaves = surgery.plan(weights, model, *_llama_rules.huggingface(CASES["tied"], 0, 0), *tie).apply(weights)
    np.testing.assert_array_equal(leaves["lm_head/kernel"], weights["model.embed_tokens.weight"].T)
    apart = surgery.assemble(model, {path: jnp.asarray(leaf) for path, leaf in leaves.items()})
    inputs = stored("tied")[1]
    np.testing.assert_allclose(run(apart, inputs)["logits"], run(filled("tied"), inputs)["logits"], atol=1e-5)


@pytest.mark.parametrize("name", ["llama3_2_1b", "tinyllama_1_1b"])
def test_unrolled_and_scanned_hold_the_same_leaves(name):
    one, many = abstract(name), abstract(f"{name}_scanned")
    there = surgery.plan(one.params, many, *models.rules(f"{name}_scanned", "unrolled"))
    back = surgery.plan(many.params, one, *models.rules(name, "scanned"))
    assert there.counts()["waived"] == back.counts()["waived"] == 0
    assert models.rules(name, "unrolled") == models.rules(f"{name}_scanned", "scanned") == ()


@pytest.mark.parametrize("case", CASES)
def test_unrolled_scanned_unrolled_is_bit_for_bit(case):
    one, many = filled(case), filled(case, True)
    variant, leaves = CASES[case], tree.paths(one.params)
    there = surgery.plan(leaves, many, *_llama_rules.unrolled(form(case, True), 0, 0)).apply(leaves)
    same(surgery.assemble(many, there).params, many.params)
    back = surgery.plan(there, one, *_llama_rules.scanned(variant, 0, 0)).apply(there)
    same(surgery.assemble(one, back).params, one.params)


@FORMS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_hugging_face_and_back_is_bit_for_bit(case, dtype, scanned):
    variant = form(case, scanned)
    tensors = {name: array.astype(np.dtype(dtype)) for name, array in stored(case)[0].items()}
    if variant.tied:
        del tensors["lm_head.weight"]
    plan = surgery.plan(tensors, model_of(variant), *_llama_rules.huggingface(variant, 0, 0))
    same(plan.inverse().apply(plan.apply(tensors)), tensors)


def test_nnx_linen_scanned_nnx_is_bit_for_bit():
    nnx_leaves = tree.paths(filled("untied").params)
    as_linen = [
        surgery.rename(r"layers/(\d+)/(.*)", r"params/layers_\1/\2"),
        surgery.rename("(embed|norm|lm_head)/(.*)", r"params/\1/\2"),
    ]
    flat = {rule(path): leaf for path, leaf in nnx_leaves.items() for rule in as_linen if rule(path)}
    linen = jax.tree.map(jnp.zeros_like, tree.nest(flat))
    linen = surgery.assemble(linen, surgery.plan(nnx_leaves, linen, *as_linen).apply(nnx_leaves))
    assert set(linen["params"]) == {"embed", "layers_0", "layers_1", "lm_head", "norm"}
    scanned_linen = {"params": filled("untied", True).params}
    from_linen = (surgery.stack(r"params/layers_(?P<i>\d+)/(.*)", r"params/layers/\2"),)
    stacked = surgery.plan(linen, scanned_linen, *from_linen).apply(tree.paths(linen))
    same(surgery.assemble(scanned_linen, stacked), scanned_linen)
    to_nnx = (surgery.unstack(r"params/layers/(.*)", r"layers/{i}/\1"), surgery.rename("params/((?!layers/).*)", r"\1"))
    again = surgery.plan(stacked, filled("untied"), *to_nnx).apply(stacked)
    same(again, nnx_leaves)


@FORMS
def test_gradients_of_every_parameter_are_finite_and_not_all_zero(scanned):
    model, inputs = filled("untied", scanned), stored("untied")[1]
    loss = lambda params: jnp.mean(model.apply(params, model.extra, inputs)[0]["logits"] ** 2)
    for path, gradient in tree.paths(jax.jit(jax.grad(loss))(model.params)).items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path


def test_a_classifier_of_texts_learns():
    inputs, model = stored("untied")[1], model_of(form("untied", True), num_classes=2)
    tuning = tj.chain(head=tj.train("head/**"), rest=tj.train("layers/**"))
    tx = tj.per_group(head=optax.adam(0.1), rest=optax.adam(0.01))
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    batch = {"inputs": inputs, "labels": np.array([0, 1, 1]), "id": np.arange(3)}
    losses = [float(metrics["loss"]) for _, metrics in tj.fit(step, state, frozen, [batch] * 15)]
    assert losses[-1] < 0.5 * losses[0]


def test_low_rank_adapters_fit_the_attention_kernels():
    init = tj.lora("layers/*/attention/{query,key,value,out}/kernel", 4).init
    trainable, _ = jax.eval_shape(init, jax.random.key(0), abstract("llama3_2_1b").params)
    assert len(jax.tree.leaves(trainable)) == 16 * 4 * 2


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((1, 21), np.int32), r"has 20 positions, got texts of 21 tokens. Cut them: .*max_length=20"),
        (np.zeros((4,), np.int32), r"Llama expects input_ids \[B, T\] of integers, got \(4,\) int32: .*tokenizer"),
        (np.zeros((1, 4), np.float32), r"Llama expects input_ids \[B, T\] of integers, got \(1, 4\) float32"),
    ],
)
def test_other_inputs_say_what_to_write(tokens, message):
    with pytest.raises(tj.TransferError, match=message):
        run(filled("untied"), {"input_ids": tokens})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 3}, r"3 heads do not divide a width of 16. Write heads=... that divides it, or head_width="),
        ({"kv_heads": 3}, r"3 key and value heads do not divide 4 query heads. Write kv_heads=... that divides them"),
        ({"head_width": 5}, r"heads of 5 features cannot be rotated in pairs. Write an even head_width="),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(sizes, message):
    with pytest.raises(tj.TransferError, match=message):
        nnx.eval_shape(lambda: _llama.build(dataclasses.replace(TINY, **sizes), 0))


def test_created_by_name(key):
    shapes = jax.eval_shape(lambda key: models.create("tinyllama_1_1b_scanned", num_classes=3, key=key).params, key)
    assert shapes["layers"]["attention"]["key"]["kernel"].shape == (22, 2048, 256)
    assert shapes["head"]["kernel"].shape == (2048, 3) and "lm_head" not in shapes
    assert models.stages("llama3_2_1b_scanned") == ["embed/**", "layers/**", "{norm,lm_head,head}/**"]


def test_initial_values():
    leaves = tree.paths(model_of(TINY, num_classes=3).params)
    drawn = np.concatenate(
        [np.ravel(leaf) for path, leaf in leaves.items() if path.startswith("layers") and leaf.ndim > 1]
    )
    np.testing.assert_allclose(np.std(drawn), 0.02, rtol=0.05)
    assert np.all(leaves["layers/1/mlp_norm/scale"] == 1) and np.all(leaves["head/bias"] == 0)
