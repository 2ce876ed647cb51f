import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax import _errors, interop
from transferjax._types import Preprocess
from transferjax.data import on_images, preprocess, preprocessor

IMAGENET = Preprocess((8, 6), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic")
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)


def test_the_formula():
    expected = (jax.image.resize(IMAGES / 255.0, (2, 8, 6, 3), "cubic") - jnp.array(IMAGENET.mean)) / jnp.array(
        IMAGENET.std
    )
    outputs = preprocess(IMAGES, IMAGENET)
    assert outputs.dtype == jnp.float32
    np.testing.assert_allclose(outputs, expected, atol=2e-5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_every_interpolation_keeps_a_flat_image_flat(interpolation):
    spec = Preprocess((7, 9), (0.5,), (0.25,), interpolation)
    outputs = preprocess(np.full((1, 3, 4, 1), 255, np.uint8), spec)
    np.testing.assert_allclose(outputs, np.full((1, 7, 9, 3), 2.0), atol=1e-5)


def test_grey_equals_the_same_image_in_three_channels():
    grey = IMAGES[..., :1]
    np.testing.assert_allclose(preprocess(grey, IMAGENET), preprocess(np.repeat(grey, 3, axis=-1), IMAGENET), atol=1e-6)
    assert preprocess(grey, Preprocess((5, 4), (0.5,), (0.5,)), channels=1).shape == (2, 5, 4, 1)


def test_floats_are_taken_as_scaled_already():
    np.testing.assert_allclose(
        preprocess((IMAGES / 255.0).astype(np.float32), IMAGENET), preprocess(IMAGES, IMAGENET), atol=1e-5
    )


def test_size_overrides_the_network_s():
    assert preprocess(IMAGES, IMAGENET, 3).shape == (2, 3, 3, 3)
    assert preprocess(IMAGES[0], IMAGENET, (2, 3)).shape == (2, 3, 3)
    assert preprocessor(IMAGENET)(IMAGES).shape == (2, 8, 6, 3)


def test_a_preprocessor_is_static_and_does_not_compile_anew():
    traced = []

    @jax.jit
    def run(function, images):
        traced.append(1)
        return function(images)

    run(preprocessor(IMAGENET, 4), IMAGES)
    run(preprocessor(IMAGENET, 4), IMAGES)
    assert len(traced) == 1
    assert jax.tree.leaves(preprocessor(IMAGENET)) == []


@pytest.mark.parametrize(
    ("images", "spec", "message"),
    [
        (np.zeros((2, 5, 4, 4), np.uint8), IMAGENET, r"images have 4 channels: \(2, 5, 4, 4\) uint8; expected 1 or 3"),
        (np.zeros((5, 4), np.uint8), IMAGENET, r"expected images \[B, H, W, C\] uint8 or float32; got \(5, 4\) uint8"),
        (
            np.zeros((2, 5, 4, 3), np.int32),
            IMAGENET,
            r"as uint8 \(0 to 255\) or floats in \[0, 1\]; got .* int32",
        ),
        (IMAGES, Preprocess((8, 8), interpolation="cubic"), r"'cubic' is no interpolation.* Nearest: bicubic."),
    ],
)
def test_images_that_do_not_fit_raise(images, spec, message):
    with pytest.raises(_errors.DataError, match=message):
        preprocess(images, spec)


def test_on_images_takes_stored_images_and_records_the_size():
    model = on_images(interop.pure(lambda params, x: x, {}, preprocess=IMAGENET), 4)
    outputs, _ = model.apply({}, {}, IMAGES)
    np.testing.assert_allclose(outputs, preprocess(IMAGES, IMAGENET, 4), atol=1e-6)
    assert model.preprocess.size == (4, 4)


def test_on_images_needs_a_preprocess():
    with pytest.raises(_errors.DataError, match="expects a Model with a preprocess"):
        on_images(interop.pure(lambda params, x: x, {}))


def test_on_images_twice_would_normalise_twice():
    model = on_images(interop.pure(lambda params, x: x.mean(), {}, preprocess=Preprocess((8, 8))), 4)
    with pytest.raises(_errors.DataError, match=r"takes images as they are stored already; .*on_images\(model, size\)"):
        on_images(model)
