"""The networks: sizes, agreement with the torch reference, training mode, and the platform's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transferjax import models, tree
from transferjax._errors import TransferError
from transferjax.models import _efficientnet_lite as lite

PARAMETERS = {"efficientnet_lite0": 4_652_008, "efficientnet_lite1": 5_416_680, "efficientnet_lite2": 6_092_072}
WIDTHS = {
    "efficientnet_lite0": (16, 24, 40, 80, 112, 192, 320),
    "efficientnet_lite1": (16, 24, 40, 80, 112, 192, 320),
    "efficientnet_lite2": (16, 24, 48, 88, 120, 208, 352),
}
REPEATS = {
    "efficientnet_lite0": [1, 2, 2, 3, 3, 4, 1],
    "efficientnet_lite1": [1, 3, 3, 4, 4, 5, 1],
    "efficientnet_lite2": [1, 3, 3, 4, 4, 5, 1],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    build = lambda: lite.EfficientNetLite(lite.VARIANTS[name], 1000, rngs=nnx.Rngs(0))
    state = nnx.state(nnx.eval_shape(build), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_widths_and_repeats(name):
    features = [spec.features for spec in lite.block_specs(lite.VARIANTS[name])]
    assert features == [width for width, n in zip(WIDTHS[name], REPEATS[name], strict=True) for _ in range(n)]


def test_drop_connect_grows_with_depth_from_zero():
    rates = [spec.drop_connect for spec in lite.block_specs(lite.VARIANTS["efficientnet_lite0"])]
    assert rates == [0.2 * i / 16 for i in range(16)]


def test_rounding_never_goes_below_nine_tenths():
    assert [lite.round_features(n, 1.1) for n in (16, 24, 40, 80, 112, 192, 320)] == [16, 24, 48, 88, 120, 208, 352]
    assert lite.round_features(12, 0.9) == 16  # 10.8 would round to 8, which is below 90 %


@pytest.mark.parametrize(
    "name", ["efficientnet_lite0", *(pytest.param(n, marks=pytest.mark.slow) for n in [*PARAMETERS][1:])]
)
def test_outputs_agree_with_torch_on_photographs(name, photographed):
    model, images, reference = photographed(name)
    count = len(lite.block_specs(lite.VARIANTS[name]))
    at = "{blocks/*,head/dropout}"
    logits, _, features = jax.jit(lambda p, e, x: model.capture(p, e, x, at))(model.params, model.extra, images)
    np.testing.assert_allclose(logits, reference["logits"], atol=5e-5, rtol=0)
    np.testing.assert_allclose(features["head/dropout"], reference["pooled"], atol=5e-5, rtol=0)
    means = np.concatenate([features[f"blocks/{i}"].mean((1, 2)) for i in range(count)], axis=1)
    np.testing.assert_allclose(means, reference["blocks"], atol=5e-5, rtol=0)
    assert np.argmax(logits, axis=1).tolist() == np.argmax(reference["logits"], axis=1).tolist()


@pytest.fixture(scope="module")
def small():
    """A network of three blocks: what is tested does not depend on depth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lite, "STAGES", ((1, 3, 1, 1, 8), (2, 3, 2, 2, 8)))
        patch.setattr(lite, "DROP_CONNECT", 0.6)
        return models.create("efficientnet_lite0", num_classes=5, key=jax.random.key(0))


def test_training_mode_moves_statistics_and_drops_whole_branches(small):
    images = jax.random.normal(jax.random.key(1), (16, 16, 16, 3))
    run = jax.jit(lambda key: small.capture(small.params, small.extra, images, "blocks/2/*", key=key, train=True))
    _, extra, features = run(jax.random.key(2))
    before, after = tree.paths(small.extra), tree.paths(extra)
    assert all(not np.array_equal(before[path], after[path]) for path in before if path.endswith("/mean"))
    dropped = np.all(np.asarray(features["blocks/2/drop_connect"]) == 0, axis=(1, 2, 3))
    assert 0 < dropped.sum() < 16
    kept = np.asarray(features["blocks/2/project_bn"])[~dropped] / (1 - 0.4)
    np.testing.assert_allclose(features["blocks/2/drop_connect"][~dropped], kept, rtol=1e-5)


def test_inference_is_deterministic_and_moves_nothing(small):
    images = jnp.ones((2, 16, 16, 3))
    _, extra = jax.jit(small.apply)(small.params, small.extra, images)
    assert jax.tree.all(jax.tree.map(np.array_equal, extra, small.extra))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_get_the_native_convolution(small, platform):
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    loss = lambda params, x: jnp.sum(small.apply(params, small.extra, x)[0] ** 2)
    for function, copies in ((lambda p, x: loss(p, x), 1), (jax.grad(loss), 3)):
        text = jax.jit(function).trace(small.params, images).lower(lowering_platforms=(platform,)).as_text()
        kernels = [leaf for leaf in jax.tree.leaves(small.params) if leaf.ndim == 4]
        # Each layer: forward, and with gradients input and kernel too (the image itself needs none).
        assert text.count("stablehlo.convolution") == copies * len(kernels) - (copies == 3)
        assert "stablehlo.while" not in text


def test_cpu_gets_no_native_convolution(small):
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    lowered = jax.jit(small.apply).trace(small.params, small.extra, images).lower(lowering_platforms=("cpu",))
    assert lowered.as_text().count("stablehlo.convolution") == 0


def test_gradients_of_every_parameter_are_finite_and_not_all_zero(small):
    images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))

    def loss(params):
        logits, _ = small.apply(params, small.extra, images, key=jax.random.key(0), train=True)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    for path, gradient in tree.paths(jax.jit(jax.grad(loss))(small.params)).items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path


@pytest.mark.parametrize("shape", [(2, 32, 32, 1), (32, 32, 3)])
def test_images_of_another_shape_are_refused_with_what_to_write(small, shape):
    message = (
        r"expects images \[B, H, W, 3\], got \(.*\) float32. Give a single image a batch axis, x\[None\]; .*on_images"
    )
    with pytest.raises(TransferError, match=message):
        small.apply(small.params, small.extra, jnp.ones(shape))


def test_early_blocks_take_small_chunks_inside_larger_ones(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lite, "STAGES", ((1, 3, 1, 1, 8), (4, 3, 2, 2, 8)))
        model = models.create("efficientnet_lite0", num_classes=5, key=jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
    whole = jax.jit(lambda x: model.apply(model.params, model.extra, x)[0])
    expected, early = whole(images), []
    monkeypatch.setattr(lite, "EARLY_PIXELS", 2 * 16 * 16)
    monkeypatch.setattr(lite, "PIXELS", 4 * 16 * 16)
    run = lite.EfficientNetLite._early
    monkeypatch.setattr(lite.EfficientNetLite, "_early", lambda self, x: early.append(len(x)) or run(self, x))
    chunked = jax.jit(lambda x: model.apply(model.params, model.extra, x)[0])
    np.testing.assert_allclose(chunked(images), expected, rtol=1e-5, atol=1e-6)
    assert {2, 4, 8} >= set(early) >= {2}
