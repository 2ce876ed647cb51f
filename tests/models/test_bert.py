"""BERT against the torch reference: a tiny random one, and MiniLM-L6 with its published weights."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax import interop, models, surgery, tree
from transferjax.models import _bert, _initialise

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "bert"
TINY = _bert.Variant(layers=2, width=8, heads=2, hidden=12, vocabulary=20, positions=10, types=3)
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def stored(name):
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


def model_of(variant, num_classes=0):
    build = lambda: _bert.build(variant, num_classes)
    return interop.nnx(_initialise.materialise(build, jax.random.key(0), _bert.std, "head/"))


@pytest.fixture(scope="module")
def tiny():
    """The tiny BERT with the reference's weights, its inputs, and what the reference returns."""
    file = stored("tiny")
    weights = {name.removeprefix("weights/"): array for name, array in file.items() if name.startswith("weights/")}
    model = model_of(TINY)
    plan = surgery.plan(weights, model, *models.rules("bert_base"))
    model = surgery.assemble(model, {path: jnp.asarray(leaf) for path, leaf in plan.apply(weights).items()})
    return model, {name: file[name] for name in INPUTS}, file


def test_the_outputs_agree_with_torch(tiny):
    model, inputs, expected = tiny
    outputs, _, features = model.capture(model.params, model.extra, inputs, ["embeddings", "layers/*"])
    kept = inputs["attention_mask"] != 0
    np.testing.assert_allclose(
        outputs["last_hidden_state"][kept], expected["last_hidden_state"][kept], atol=2e-5, rtol=0
    )
    np.testing.assert_allclose(outputs["pooled"], expected["pooled"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(outputs["embedding"], expected["embedding"], atol=1e-6, rtol=0)
    for number, name in enumerate(("embeddings", "layers/0", "layers/1")):
        np.testing.assert_allclose(features[name][:, 0], expected["layers"][number], atol=2e-5, rtol=0)


def test_what_is_padded_changes_nothing(tiny):
    model, inputs, _ = tiny
    other = inputs["input_ids"].copy()
    other[inputs["attention_mask"] == 0] = 7
    one, _ = model.apply(model.params, model.extra, inputs)
    two, _ = model.apply(model.params, model.extra, {**inputs, "input_ids": other})
    np.testing.assert_allclose(one["embedding"], two["embedding"], atol=1e-6)


def test_without_mask_and_types_every_token_counts_and_is_of_the_first_type(tiny):
    model, inputs, _ = tiny
    full = {**inputs, "attention_mask": np.ones((3, 7), np.int32), "token_type_ids": np.zeros((3, 7), np.int32)}
    one, _ = model.apply(model.params, model.extra, {"input_ids": inputs["input_ids"]})
    two, _ = model.apply(model.params, model.extra, full)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, two)


def test_names_with_the_prefix_of_a_larger_model_and_without_the_buffer_are_known():
    names = [name for name in stored("tiny") if name.startswith("weights/")]
    weights = {f"bert.{name.removeprefix('weights/')}": stored("tiny")[name] for name in names}
    assert not any(name.endswith("position_ids") for name in weights)
    assert surgery.plan(weights, model_of(TINY), *models.rules("bert_base")).counts()["waived"] == 0


def test_dropout_is_on_in_training_mode_only(tiny):
    model, inputs, _ = tiny
    run = lambda key, train: model.apply(model.params, model.extra, inputs, key=key, train=train)[0]["pooled"]
    one, two = (run(jax.random.key(seed), True) for seed in (0, 1))
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(run(jax.random.key(0), False), run(jax.random.key(1), False))


def test_a_classifier_of_texts_learns(tiny):
    _, inputs, _ = tiny
    model = model_of(TINY, num_classes=2)
    tuning, tx = tj.chain(head=tj.train("head/**"), lora=tj.lora("layers/*/attention/{query,value}/kernel", 2)), None
    tx = tj.per_group(head=optax.adam(0.1), lora=optax.adam(0.1))
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    batch = {"inputs": inputs, "labels": np.array([0, 1, 1]), "id": np.arange(3)}
    losses = [float(metrics["loss"]) for _, metrics in tj.fit(step, state, frozen, [batch] * 20)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_gradient_of_an_embedding_at_zero_is_no_nan():
    gradient = jax.grad(lambda x: models.sentence_embedding(x, jnp.zeros((1, 2))).sum())(jnp.zeros((1, 2, 3)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((1, 11), np.int32), r"has 10 positions, got texts of 11 tokens. Cut them: .*max_length=10"),
        (np.zeros((4,), np.int32), r"expects input_ids \[B, T\] of integers, got \(4,\) int32: .*tokenizer"),
        (np.zeros((1, 4), np.float32), r"expects input_ids \[B, T\] of integers, got \(1, 4\) float32"),
    ],
)
def test_other_inputs_say_what_to_write(tokens, message, tiny):
    model, _, _ = tiny
    with pytest.raises(tj.TransferError, match=message):
        model.apply(model.params, model.extra, {"input_ids": tokens})


def test_a_text_encoder_takes_no_images(key):
    with pytest.raises(tj.TransferError, match="'minilm_l6' takes no images: leave out image_size and class_names"):
        models.create("minilm_l6", key=key, image_size=32)


def test_published_sizes_and_initial_values(key):
    shapes = jax.eval_shape(lambda key: models.create("bert_base", key=key).params, key)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 109_482_240
    leaves = tree.paths(models.create("minilm_l6", num_classes=3, key=key).params)
    np.testing.assert_allclose(np.std(leaves["embeddings/word/embedding"]), 0.02, rtol=0.01)
    assert np.all(leaves["layers/3/mlp_norm/scale"] == 1) and leaves["head/kernel"].shape == (384, 3)


def test_minilm_agrees_with_torch_from_its_published_folder(loaded):
    model, plan = loaded("minilm_l6")
    assert plan.waived == ("embeddings.position_ids",) and len(plan.moves) == 103
    expected = stored("minilm_l6")
    inputs = {name: expected[name] for name in INPUTS}
    outputs, _, features = model.capture(model.params, model.extra, inputs, ["embeddings", "layers/*"])
    kept = inputs["attention_mask"] != 0
    np.testing.assert_allclose(
        outputs["last_hidden_state"][kept], expected["last_hidden_state"][kept], atol=2e-5, rtol=0
    )
    np.testing.assert_allclose(outputs["pooled"], expected["pooled"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(outputs["embedding"], expected["embedding"], atol=1e-6, rtol=0)
    for number, name in enumerate(["embeddings", *(f"layers/{i}" for i in range(6))]):
        np.testing.assert_allclose(features[name][:, 0], expected["layers"][number], atol=2e-5, rtol=0)


def test_the_tokenizer_of_the_folder_makes_the_reference_s_tokens(loaded):
    loaded("minilm_l6")
    expected = stored("minilm_l6")
    tokens = tj.data.tokenizer(models.default_weights("minilm_l6"))([str(text) for text in expected["texts"]])
    assert {*tokens} == {*INPUTS}
    for name, array in tokens.items():
        np.testing.assert_array_equal(array, expected[name])


def test_another_head_is_fresh(loaded, key):
    loaded("minilm_l6")
    _, plan = models.load("minilm_l6", num_classes=4, key=key)
    assert [move.target for move in plan.moves if move.source is None] == ["head/bias", "head/kernel"]
