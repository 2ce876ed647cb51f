import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax import _errors
from transferjax._types import Preprocess
from transferjax.data import (
    compose,
    cutmix,
    example_keys,
    mixup,
    on_inputs,
    preprocessor,
    random_crop,
    random_flip,
    random_resized_crop,
    soft_targets,
)

KEY = jax.random.key(0)
FOR_EACH = [random_flip(), random_crop(2), random_resized_crop(5), random_resized_crop(5, interpolation="nearest")]
MIXING = [mixup(0.4, num_classes=3), cutmix(1.0, num_classes=3)]
EVERY = [*FOR_EACH, *MIXING, compose(*FOR_EACH[:3], MIXING[1]), compose()]
run = jax.jit(lambda function, batch, key: function(batch, key))


def batch_of(count=8, dtype=np.uint8):
    images = np.random.default_rng(0).integers(1, 256, (count, 8, 6, 3)).astype(np.uint8)
    images = images if dtype == np.uint8 else (images / 255).astype(dtype)
    return {"inputs": images, "labels": np.arange(count) % 3, "id": np.arange(100, 100 + count)}


@pytest.mark.parametrize("augment", EVERY, ids=repr)
def test_the_key_determines_the_result(augment):
    first, again, other = (run(augment, batch_of(), key) for key in (KEY, KEY, jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert set(first) == {"inputs", "labels", "id"}
    assert augment == compose() or not np.array_equal(first["inputs"], other["inputs"])


@pytest.mark.parametrize("augment", FOR_EACH, ids=repr)
def test_an_example_does_not_depend_on_the_rest_of_its_batch(augment):
    batch = batch_of()
    order = np.array([5, 2, 7])
    part = {name: value[order] for name, value in batch.items()}
    np.testing.assert_allclose(run(augment, part, KEY)["inputs"], run(augment, batch, KEY)["inputs"][order], atol=1e-6)


def test_without_ids_the_position_counts():
    batch = {"inputs": np.tile(batch_of(1)["inputs"], (40, 1, 1, 1))}
    flipped = random_flip()(batch, KEY)["inputs"]
    assert 5 < sum(np.array_equal(f, i) for f, i in zip(flipped, batch["inputs"])) < 35
    assert len(np.unique(jax.random.key_data(example_keys(batch, KEY)), axis=0)) == 40


@pytest.mark.parametrize("augment", [*FOR_EACH[:2], compose(*FOR_EACH[:2])], ids=repr)
def test_built_twice_it_is_equal_and_compiles_once(augment):
    traced = []

    @jax.jit
    def count(function, key):
        traced.append(1)
        return function(batch_of(), key)["inputs"]

    count(augment, KEY)
    count(type(augment)(augment.function, augment.options), KEY)
    assert len(traced) == 1
    assert jax.tree.leaves(augment) == []


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_flipping_twice_is_the_identity(dtype):
    batch, flip = batch_of(dtype=dtype), random_flip()
    once = flip(batch, KEY)
    assert once["inputs"].dtype == dtype
    assert not np.array_equal(once["inputs"], batch["inputs"])
    np.testing.assert_array_equal(flip(once, KEY)["inputs"], batch["inputs"])


def test_flip_probabilities():
    batch = batch_of()
    np.testing.assert_array_equal(random_flip(0.0)(batch, KEY)["inputs"], batch["inputs"])
    np.testing.assert_array_equal(random_flip(1.0)(batch, KEY)["inputs"], batch["inputs"][:, :, ::-1])


@pytest.mark.parametrize("padding", [0, 1, 3, (2, 0)])
def test_a_crop_is_a_shift_within_the_padding(padding):
    vertical, horizontal = (padding, padding) if isinstance(padding, int) else padding
    batch = batch_of()
    padded = np.pad(batch["inputs"], ((0, 0), (vertical, vertical), (horizontal, horizontal), (0, 0)))
    for image, around in zip(run(random_crop(padding), batch, KEY)["inputs"], padded):
        windows = [
            around[top : top + 8, left : left + 6]
            for top in range(2 * vertical + 1)
            for left in range(2 * horizontal + 1)
        ]
        assert any(np.array_equal(image, window) for window in windows)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(8, 6), (5, 9)])
def test_the_whole_image_as_crop_is_the_plain_resize(interpolation, size):
    batch = batch_of()
    crop = random_resized_crop(size, scale=(1.0, 1.0), ratio=(6 / 8, 6 / 8), interpolation=interpolation)
    expected = jax.image.resize(batch["inputs"] / np.float32(255), (8, *size, 3), interpolation)
    np.testing.assert_allclose(run(crop, batch, KEY)["inputs"], expected, atol=2e-5)


def test_square_images_need_no_ratio_for_that():
    batch = {"inputs": batch_of()["inputs"][:, :6], "labels": np.zeros(8, int), "id": np.arange(8)}
    crop = random_resized_crop(12, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    expected = jax.image.resize(batch["inputs"] / np.float32(255), (8, 12, 12, 3), "linear")
    np.testing.assert_allclose(run(crop, batch, KEY)["inputs"], expected, atol=2e-5)


def test_crops_stay_inside_the_image_and_have_the_area_asked_for():
    ramp = np.linspace(0, 1, 64, dtype=np.float32)
    images = np.broadcast_to(np.stack(np.meshgrid(ramp, ramp, indexing="ij"), -1), (50, 64, 64, 2))
    batch = {"inputs": images, "id": np.arange(50)}
    crops = np.asarray(run(random_resized_crop(64, scale=(0.2, 0.4)), batch, KEY)["inputs"])
    extent = crops[:, -1, -1] - crops[:, 0, 0]
    assert crops.min() >= -1e-6
    assert crops.max() <= 1 + 1e-6
    area, ratio = extent.prod(-1), extent[:, 1] / extent[:, 0]
    assert 0.17 < area.min() < 0.24 < 0.35 < area.max() < 0.44
    assert 0.7 < ratio.min() < 0.85 < 1.15 < ratio.max() < 1.4
    assert np.ptp(crops[:, 0, 0], axis=0).min() > 0.3


def test_when_no_rectangle_fits_the_largest_central_one_is_taken():
    ramp = np.broadcast_to(np.linspace(0, 1, 64, dtype=np.float32)[None, None, :, None], (3, 16, 64, 1))
    crop = random_resized_crop((16, 16), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    images = np.asarray(run(crop, {"inputs": ramp}, KEY)["inputs"])
    np.testing.assert_allclose(images.mean((1, 2, 3)), 0.5, atol=1e-3)
    np.testing.assert_allclose(np.ptp(images, axis=2), 15 / 63, atol=1e-3)


@pytest.mark.parametrize("augment", [*MIXING, compose(*MIXING)], ids=repr)
def test_mixing_keeps_the_mass_of_the_labels(augment):
    for seed in range(5):
        batch = run(augment, batch_of(), jax.random.key(seed))
        assert batch["labels"].shape == (8, 3)
        assert batch["labels"].min() >= 0
        np.testing.assert_allclose(batch["labels"].sum(-1), 1, atol=1e-6)
        np.testing.assert_allclose(
            batch["labels"].mean(0), soft_targets(jnp.asarray(batch_of()["labels"]), 3).mean(0), atol=1e-6
        )


def test_mixup_blends_images_as_it_blends_labels():
    images = np.broadcast_to(np.eye(8, dtype=np.float32)[:, None, None, :], (8, 4, 4, 8))
    batch = run(mixup(1.0, num_classes=8), {"inputs": images, "labels": np.arange(8)}, KEY)
    np.testing.assert_allclose(batch["inputs"][:, 0, 0], batch["labels"], atol=1e-6)
    assert np.asarray(batch["labels"]).diagonal().min() < 0.99


def test_cutmix_s_labels_are_areas():
    for seed in range(8):
        images = np.broadcast_to(np.eye(8, dtype=np.float32)[:, None, None, :], (8, 9, 7, 8))
        batch = run(cutmix(1.0, num_classes=8), {"inputs": images, "labels": np.arange(8)}, jax.random.key(seed))
        np.testing.assert_allclose(batch["inputs"].mean((1, 2)), batch["labels"], atol=1e-6)
        assert set(np.unique(batch["inputs"])) <= {0.0, 1.0}


def test_cutmix_keeps_the_type_of_images_and_mixup_scales_them():
    assert run(MIXING[1], batch_of(), KEY)["inputs"].dtype == jnp.uint8
    mixed = run(MIXING[0], batch_of(), KEY)["inputs"]
    assert mixed.dtype == jnp.float32
    assert mixed.max() <= 1


def test_steps_compose_with_preprocessing_and_have_keys_of_their_own():
    spec = Preprocess((12, 12), (0.5,), (0.5,))
    steps = compose(random_flip(), on_inputs(preprocessor(spec)), mixup(num_classes=3))
    outputs = run(steps, batch_of(), KEY)
    assert outputs["inputs"].shape == (8, 12, 12, 3)
    assert outputs["labels"].shape == (8, 3)
    both = compose(random_flip(), random_flip())(batch_of(), KEY)["inputs"]
    assert not np.array_equal(both, batch_of()["inputs"])


def test_a_wrong_option_or_batch_says_what_is_expected():
    table = [
        (lambda: random_flip(1.5), "probability is 1.5; expected 0.0 to 1.0"),
        (lambda: random_crop(-1), "padding is -1; expected pixels as a whole number of at least 0"),
        (
            lambda: random_resized_crop(scale=(0.5, 0.2)),
            r"scale is \(0.5, 0.2\); expected 0 < least <= greatest",
        ),
        (lambda: random_resized_crop(ratio=(0, 1)), r"ratio is \(0, 1\); expected 0 < least <= greatest <= inf"),
        (lambda: random_resized_crop(interpolation="cube"), "'cube' is no interpolation"),
        (lambda: mixup(0, num_classes=2), "alpha is 0; expected 1e-06 to inf"),
        (lambda: cutmix(-1.0, num_classes=2), "alpha is -1.0; expected 1e-06 to inf"),
        (
            lambda: random_flip()({"inputs": np.zeros((2, 3))}, KEY),
            r"images \[B, H, W, C\] as inputs; got \(2, 3\)",
        ),
        (lambda: random_flip()({"inputs": {"a": 1}}, KEY), r"expects images \[B, H, W, C\] as inputs; got dict"),
        (lambda: soft_targets(np.zeros((2, 4)), 3), r"labels \[B\] or soft targets \[B, 3\]; got \(2, 4\) float64"),
    ]
    for call, message in table:
        with pytest.raises(_errors.DataError, match=message):
            call()
