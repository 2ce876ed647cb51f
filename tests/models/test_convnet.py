"""The small convolutional network of the zoo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax import TransferError


@pytest.fixture(scope="module")
def model():
    return tj.models.create("convnet_small", num_classes=10, key=jax.random.key(0))


def test_it_has_a_tenth_of_the_parameters_of_efficientnet_lite0(model):
    count = lambda one: sum(leaf.size for leaf in jax.tree.leaves(one.params))
    large = tj.models.create("efficientnet_lite0", num_classes=10, key=jax.random.key(0))
    assert count(model) == 316_970 and count(model) < count(large) / 10


def test_it_takes_images_of_any_size_and_refuses_others(model):
    for size in (8, 28, 33):
        assert model.apply(model.params, model.extra, jnp.zeros((2, size, size, 3)))[0].shape == (2, 10)
    with pytest.raises(TransferError, match=r"ConvNet expects images \[B, H, W, 3\] of 8 pixels or more"):
        model.apply(model.params, model.extra, jnp.zeros((2, 7, 7, 3)))


def test_activations_of_a_fresh_network_keep_their_size(model):
    x = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
    _, _, layers = model.capture(model.params, model.extra, x, "blocks/*", train=True)
    sizes = [float(jnp.std(layer)) for layer in layers.values()]
    assert len(sizes) == 4 and all(0.3 < size < 1.5 for size in sizes)


def test_stages_cover_each_parameter_once(model):
    for path in tj.paths(model.params):
        assert sum(tj.glob(stage)(path, None) for stage in tj.models.stages("convnet_small")) == 1
    assert tj.data.on_images(model).preprocess.size == (32, 32)


def test_a_file_of_its_own_gives_everything(model, tmp_path):
    leaves = {**tj.paths(model.params), **tj.paths(model.extra)}
    tj.io.save(tmp_path / "student.safetensors", leaves, format="safetensors")
    loaded, _ = tj.models.load("convnet_small", tmp_path / "student.safetensors", num_classes=10)
    for path, leaf in tj.paths(loaded.params).items():
        np.testing.assert_array_equal(leaf, tj.paths(model.params)[path])
    bare, _ = tj.models.load("convnet_small", tmp_path / "student.safetensors", num_classes=0)
    assert "head" not in bare.params
