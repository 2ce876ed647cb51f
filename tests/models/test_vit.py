"""ViT: agreement with the torch references, total plans for the full sizes, positions, adapters, refusals."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax import interop, models, surgery, testing, tree
from transferjax._errors import PlanError, TransferError
from transferjax.models import _initialise
from transferjax.models import _vit as vit
from transferjax.models._vit_rules import huggingface, timm

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "vit"
SMALL = vit.Variant(4, 32, 2, 2, size=16)
CASES = {
    "timm_token": (SMALL, timm),
    "timm_registers": (dataclasses.replace(SMALL, depth=1, registers=2), timm),
    "timm_mean": (dataclasses.replace(SMALL, depth=1, registers=2, prefix_positions=False, pool="mean"), timm),
    "huggingface": (dataclasses.replace(SMALL, epsilon=1e-12), huggingface),
}
BASE = vit.VARIANTS["vit_base_patch16_224"]
FILES = {"timm": timm, "huggingface_classifier": huggingface, "huggingface_model": huggingface}
PARAMETERS = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_small_patch32_224": 22_878_952,
    "vit_base_patch8_224": 86_576_872,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch32_224": 88_224_232,
    "vit_large_patch16_224": 304_326_632,
}


@functools.cache
def reference(case):
    """``(tensors of the file, images, {"blocks": ..., "features": ..., "logits": ...})`` of a small network."""
    with np.load(FIXTURES / f"{case}.npz") as stored:
        state = {name.removeprefix("state/"): stored[name] for name in stored.files if name.startswith("state/")}
        return state, stored["images"], {name: stored[name] for name in ("blocks", "features", "logits")}


@functools.cache
def names(file):
    """Name -> abstract leaf of a full network's file."""
    rows = json.loads((FIXTURES / "names.json").read_text())[file]
    return {name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for name, shape, dtype in rows}


@functools.cache
def abstract(variant, num_classes, image_size=None):
    return interop.nnx(jax.eval_shape(lambda: vit.build(variant, num_classes, image_size)))


def made(variant, num_classes):
    build = lambda: vit.build(variant, num_classes)
    return interop.nnx(_initialise.materialise(build, jax.random.key(0), vit.std, "head/fc/"))


@functools.cache
def restored(case, num_classes=5):
    """A small network with the reference's weights."""
    (variant, rules), state = CASES[case], reference(case)[0]
    model = abstract(variant, num_classes)
    plan = surgery.plan(state, model, *rules(variant, 5, num_classes))
    return surgery.assemble(model, jax.tree.map(jnp.asarray, plan.apply(state.__getitem__)))


def fresh_of(plan):
    return [move.target for move in plan.moves if move.source is None]


@pytest.mark.parametrize("name", vit.VARIANTS)
def test_number_of_parameters(name):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(vit.VARIANTS[name], 1000).params)) == PARAMETERS[name]


@pytest.mark.parametrize("case", CASES)
def test_blocks_and_logits_agree_with_torch(case):
    model, (_, images, expected) = restored(case), reference(case)
    logits, _, found = jax.jit(lambda x: model.capture(model.params, model.extra, x, "blocks/*"))(images)
    assert len(found) == len(expected["blocks"])
    for number, mean in enumerate(expected["blocks"]):
        np.testing.assert_allclose(found[f"blocks/{number}"].mean(1), mean, atol=2e-5, rtol=0)
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_without_classes_the_pooled_features_come_out(case):
    model, (_, images, expected) = restored(case, 0), reference(case)
    features, _ = jax.jit(model.apply)(model.params, model.extra, images)
    np.testing.assert_allclose(features, expected["features"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("file", "num_classes"),
    # The file of a ViTModel has no classifier, so that nothing fills one of 1000 outputs.
    [(file, n) for file in FILES for n in (1000, 10, 0) if (file, n) != ("huggingface_model", 1000)],
)
def test_plans_of_the_full_files_are_total(file, num_classes):
    plan = surgery.plan(names(file), abstract(BASE, num_classes), *FILES[file](BASE, 1000, num_classes))
    assert {move.target for move in plan.moves} == set(tree.paths(abstract(BASE, num_classes).params))
    assert fresh_of(plan) == (["head/fc/bias", "head/fc/kernel"] if num_classes == 10 else [])
    left = {name.split(".")[0] for name in plan.waived}
    ends = {"timm": "head", "huggingface_classifier": "classifier", "huggingface_model": "pooler"}
    assert left == (set() if num_classes == 1000 else {ends[file]})


def test_a_file_without_classifier_does_not_pass_for_one_with():
    with pytest.raises(PlanError, match="head/fc/kernel"):
        surgery.plan(names("huggingface_model"), abstract(BASE, 1000), *huggingface(BASE, 1000, 1000))


@pytest.mark.parametrize("num_classes", [5, 3, 0])
@pytest.mark.parametrize("case", ["timm_registers", "timm_mean", "huggingface"])
def test_rules_keep_the_laws_of_plans(case, num_classes):
    variant, rules = CASES[case]
    testing.check_plan(reference(case)[0], abstract(variant, num_classes), rules(variant, 5, num_classes))


@pytest.mark.parametrize(("case", "prefix"), [("timm_token", 1), ("timm_registers", 3), ("timm_mean", 0)])
def test_positions_of_another_image_size_are_resized(case, prefix):
    (variant, rules), state = CASES[case], reference(case)[0]
    plan = surgery.plan(state, abstract(variant, 0, 24), *rules(variant, 5, 0))
    expected = surgery.resize_position_embedding(state["pos_embed"], (6, 6), prefix=prefix)
    np.testing.assert_array_equal(plan.apply(state)["embeddings/position"], expected)


def test_a_file_of_another_size_is_loaded_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(vit.VARIANTS, "vit_tiny_patch16_224", SMALL)
    state, images, expected = reference("timm_token")
    tj.io.save(tmp_path / "vit.safetensors", state, "safetensors")
    load = functools.partial(models.load, "vit_tiny_patch16_224", tmp_path / "vit.safetensors")
    model, _ = load(0, image_size=16)
    features, _ = jax.jit(model.apply)(model.params, model.extra, images)
    np.testing.assert_allclose(features, expected["features"], atol=2e-5, rtol=0)
    model, plan = load(3, image_size=20, convention="timm", class_names=("a", "b", "c"))
    assert fresh_of(plan) == ["head/fc/bias", "head/fc/kernel"]
    assert model.params["embeddings"]["position"].shape == (1, 26, 32)
    assert (model.preprocess.size, model.preprocess.class_names) == ((20, 20), ("a", "b", "c"))


def test_a_patch_of_another_size_needs_a_rule_of_its_own():
    state = reference("timm_token")[0]
    variant = dataclasses.replace(SMALL, patch=8, size=32)
    with pytest.raises(PlanError, match="embeddings/patch/kernel"):
        surgery.plan(state, abstract(variant, 0), *timm(variant, 5, 0))
    resized = surgery.adapt("embeddings/patch/kernel", "patch_embedding")
    plan = surgery.plan(state, abstract(variant, 0), *timm(variant, 5, 0), resized)
    assert plan.apply(state)["embeddings/patch/kernel"].shape == (8, 8, 3, 32)


def test_a_network_without_class_token_pools_the_patches():
    model = made(dataclasses.replace(SMALL, class_token=False, pool="mean"), 0)
    assert set(model.params["embeddings"]) == {"patch", "position"}
    assert model.params["embeddings"]["position"].shape == (1, 16, 32)
    images = reference("timm_token")[1]
    outputs, _, found = jax.jit(lambda x: model.capture(model.params, model.extra, x, "blocks/1"))(images)
    pooled = found["blocks/1"].mean(1)
    normed = (pooled - pooled.mean(-1, keepdims=True)) / np.sqrt(pooled.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(outputs, normed, atol=1e-5)


def test_paths_and_shapes():
    leaves = tree.paths(abstract(BASE, 10, 384).params)
    for name in ("query", "key", "value", "out"):
        assert leaves[f"blocks/11/attention/{name}/kernel"].shape == (768, 768)
        assert leaves[f"blocks/11/attention/{name}/bias"].shape == (768,)
    assert leaves["blocks/0/mlp/up/kernel"].shape == (768, 3072)
    assert leaves["embeddings/position"].shape == (1, 1 + 24 * 24, 768)
    assert leaves["embeddings/patch/kernel"].shape == (16, 16, 3, 768)
    assert leaves["head/fc/kernel"].shape == (768, 10)


def test_low_rank_adapters_on_the_attention_learn():
    model, (_, images, _) = made(dataclasses.replace(SMALL, depth=1), 3), reference("timm_token")
    tuning = tj.chain(head=tj.train("head/fc/**"), lora=tj.lora("blocks/*/attention/{query,value}/kernel", 2))
    tx = tj.per_group(head=optax.adam(0.05), lora=optax.adam(0.05))
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    batch = {"inputs": images, "labels": np.array([0, 1, 2]), "id": np.arange(3)}
    losses = [float(metrics["loss"]) for _, metrics in tj.fit(step, state, frozen, [batch] * 20)]
    assert losses[-1] < 0.5 * losses[0]


def test_initial_values():
    leaves = tree.paths(made(dataclasses.replace(SMALL, width=256, depth=1, registers=4), 7).params)
    drawn = [path for path in leaves if path.endswith("kernel") and not path.startswith("head/")]
    for path in (*drawn, "embeddings/class_token", "embeddings/registers", "embeddings/position"):
        values = np.asarray(leaves[path])
        np.testing.assert_allclose(values.std(), 0.02, rtol=0.2, err_msg=path)
        assert abs(values.mean()) < 0.005, path
    assert not np.any(leaves["head/fc/kernel"]) and np.all(leaves["blocks/0/norm1/scale"] == 1)


def test_gradients_of_every_parameter_are_finite_and_not_all_zero():
    model, (_, images, _) = restored("timm_registers"), reference("timm_registers")

    def loss(params):
        logits, _ = model.apply(params, model.extra, images, train=True)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    for path, gradient in tree.paths(jax.jit(jax.grad(loss))(model.params)).items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path


@pytest.mark.parametrize("shape", [(2, 16, 16, 1), (16, 16, 3), (2, 20, 16, 3)])
def test_images_of_another_shape_are_refused_with_what_to_write(shape):
    model = abstract(SMALL, 5)
    message = (
        r"this ViT expects images \[B, 16, 16, 3\], got \(.*\) float32. Give a single image a batch axis, x\[None\]; "
        r".*on_images.*images of another size build the network with image_size="
    )
    with pytest.raises(TransferError, match=message):
        jax.eval_shape(model.apply, model.params, model.extra, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize(
    ("variant", "size", "message"),
    [
        (BASE, 230, "image_size is 230, which patches of 16 pixels do not divide.*such as image_size=224"),
        (BASE, 0, "image_size is 0, which patches of 16 pixels do not divide.*such as image_size=224"),
        (BASE, "224", "image_size is '224', which patches of 16 pixels do not divide.*such as image_size=224"),
        (dataclasses.replace(SMALL, heads=3), 16, "3 heads do not divide a width of 32. Write heads="),
        (dataclasses.replace(SMALL, pool="max"), 16, "pool is 'max' with a class token. Write pool='mean'"),
        (dataclasses.replace(SMALL, class_token=False), 16, "pool is 'token' without a class token.*class_token=True"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_write(variant, size, message):
    with pytest.raises(TransferError, match=message):
        vit.build(variant, 10, size)


def test_a_name_and_a_size_that_its_patch_does_not_divide(key):
    with pytest.raises(TransferError, match="image_size is 100, which patches of 16 pixels do not divide"):
        models.create("vit_tiny_patch16_224", key=key, image_size=100)
