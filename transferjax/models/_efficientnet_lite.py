"""EfficientNet-Lite 0, 1 and 2 in Flax NNX."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from transferjax._errors import TransferError, describe
from transferjax._types import Preprocess
from transferjax.interop import chunked
from transferjax.numerics import batch_norm, conv_general_dilated, relu6

EPSILON = 1e-3
MOMENTUM = 0.99
STEM_FEATURES = 32
HEAD_FEATURES = 1280
DROP_CONNECT = 0.2
CLASSIFIER_STD = 0.01
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EARLY_BLOCKS = 3
EARLY_PIXELS, PIXELS = 100_000, 400_000
"""Pixels of the images that the early blocks, and the whole network, take at a time on CPU: the early ones fill
memory, the late ones read many weights for few pixels. Measured from 64 to 224 pixels of a side."""

# repeats, kernel, stride, expansion, features: one row per stage of Lite0.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """The scaling of one EfficientNet-Lite.

    Attributes:
      width: factor on the features of every stage.
      depth: factor on the repeats of the stages between the first and the last.
      size: pixels of a side of the image at which the weights were trained.
      dropout: rate in front of the last dense layer.
    """

    width: float
    depth: float
    size: int
    dropout: float


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One inverted residual block, and which block of how many it is."""

    kernel: int
    stride: int
    expansion: int
    inputs: int
    features: int
    drop_connect: float


VARIANTS = {
    "efficientnet_lite0": Variant(1.0, 1.0, 224, 0.2),
    "efficientnet_lite1": Variant(1.0, 1.1, 240, 0.2),
    "efficientnet_lite2": Variant(1.1, 1.2, 260, 0.3),
}


def round_features(features: int, width: float) -> int:
    """Features scaled and rounded to a multiple of 8, never below 90 % of the scaled number.

    >>> round_features(24, 1.1), round_features(16, 1.1), round_features(320, 1.1)
    (24, 16, 352)
    """
    scaled = features * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def block_specs(variant: Variant) -> tuple[BlockSpec, ...]:
    """Every block from input to output.

    >>> [spec.features for spec in block_specs(VARIANTS["efficientnet_lite0"])]
    [16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]
    """
    rows: list[tuple[int, int, int, int, int]] = []
    inputs = STEM_FEATURES
    for number, (repeats, kernel, stride, expansion, features) in enumerate(STAGES):
        features = round_features(features, variant.width)
        if 0 < number < len(STAGES) - 1:
            repeats = -int(-repeats * variant.depth // 1)
        for repeat in range(repeats):
            rows.append((kernel, stride if repeat == 0 else 1, expansion, inputs, features))
            inputs = features
    return tuple(BlockSpec(*row, drop_connect=DROP_CONNECT * i / len(rows)) for i, row in enumerate(rows))


def _convolution(inputs: int, features: int, kernel: int, rngs: nnx.Rngs, stride: int = 1, groups: int = 1) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding="SAME",
        feature_group_count=groups,
        use_bias=False,
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
    )


class BatchNorm(nnx.BatchNorm):
    """``nnx.BatchNorm`` over the last axis; in training mode with the leaner derivative of ``numerics.batch_norm``."""

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        inference = self.use_running_average if use_running_average is None else use_running_average
        scale, bias = self.scale, self.bias
        if inference is not False or mask is not None or scale is None or bias is None:
            return super().__call__(x, use_running_average, mask=mask)
        y, mean, variance = batch_norm(x, scale[...], bias[...], epsilon=self.epsilon)
        for stored, now in ((self.mean, mean), (self.var, variance)):
            stored[...] = self.momentum * stored[...] + (1 - self.momentum) * lax.stop_gradient(now)
        return y


_batch_norm = partial(BatchNorm, use_running_average=True, momentum=MOMENTUM, epsilon=EPSILON)


class Stem(nnx.Module):
    """3x3 convolution of stride 2, BatchNorm, ReLU6: ``[B, H, W, 3] -> [B, H/2, W/2, 32]``."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = _convolution(3, STEM_FEATURES, 3, rngs, stride=2)
        self.bn = _batch_norm(STEM_FEATURES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return relu6(self.bn(self.conv(x)))


class Block(nnx.Module):
    """Inverted residual block: expand 1x1, depthwise kxk, project 1x1; no activation after the projection."""

    def __init__(self, spec: BlockSpec, *, rngs: nnx.Rngs):
        hidden = spec.inputs * spec.expansion
        self.expands = spec.expansion != 1
        self.skips = spec.stride == 1 and spec.inputs == spec.features
        if self.expands:
            self.expand = _convolution(spec.inputs, hidden, 1, rngs)
            self.expand_bn = _batch_norm(hidden, rngs=rngs)
        self.depthwise = _convolution(hidden, hidden, spec.kernel, rngs, stride=spec.stride, groups=hidden)
        self.depthwise_bn = _batch_norm(hidden, rngs=rngs)
        self.project = _convolution(hidden, spec.features, 1, rngs)
        self.project_bn = _batch_norm(spec.features, rngs=rngs)
        if self.skips:
            # One draw per example drops the whole branch (stochastic depth).
            self.drop_connect = nnx.Dropout(spec.drop_connect, broadcast_dims=(1, 2, 3), deterministic=True, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        x = relu6(self.expand_bn(self.expand(inputs))) if self.expands else inputs
        x = relu6(self.depthwise_bn(self.depthwise(x)))
        x = self.project_bn(self.project(x))
        return inputs + self.drop_connect(x) if self.skips else x


class Head(nnx.Module):
    """1x1 convolution to 1280 features, mean over the image, dropout, dense layer (none for 0 classes)."""

    def __init__(self, inputs: int, num_classes: int, dropout: float, *, rngs: nnx.Rngs):
        self.conv = _convolution(inputs, HEAD_FEATURES, 1, rngs)
        self.bn = _batch_norm(HEAD_FEATURES, rngs=rngs)
        self.classifies = num_classes > 0
        if self.classifies:
            self.dropout = nnx.Dropout(dropout, deterministic=True, rngs=rngs)
            self.fc = nnx.Linear(HEAD_FEATURES, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        pooled = jnp.mean(relu6(self.bn(self.conv(x))), axis=(1, 2))
        return self.fc(self.dropout(pooled)) if self.classifies else pooled


class EfficientNetLite(nnx.Module):
    """EfficientNet-Lite: no squeeze-excitation, ReLU6, a stem and head that never scale.

    Built in inference mode: every BatchNorm uses its stored statistics and every dropout is off, until
    ``Model.apply(..., train=...)`` or ``nnx.view`` says otherwise.

    Args:
      variant: one of ``VARIANTS.values()``.
      num_classes: outputs of the last dense layer; 0 leaves it out.
      rngs: the streams of initialisation, ``params`` and ``dropout``.

    Source: Liu, "Higher accuracy on vision models with EfficientNet-Lite" (2020); Tan and Le, arXiv:1905.11946.
    """

    def __init__(self, variant: Variant, num_classes: int, *, rngs: nnx.Rngs):
        specs = block_specs(variant)
        self.stem = Stem(rngs=rngs)
        self.blocks = nnx.List([Block(spec, rngs=rngs) for spec in specs])
        self.head = Head(specs[-1].features, num_classes, variant.dropout, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Logits ``[B, num_classes]`` (or pooled features ``[B, 1280]``) of normalised images ``[B, H, W, 3]``."""
        channels = self.stem.conv.kernel.shape[2]
        if jnp.ndim(inputs) != 4 or inputs.shape[3] != channels:
            raise TransferError(
                f"EfficientNet-Lite expects images [B, H, W, {channels}], got {describe(inputs)}. Give a single image "
                "a batch axis, x[None]; transferjax.data.on_images(model, size) resizes, normalises and makes grey RGB."
            )
        _, height, width, _ = inputs.shape
        early, whole = (max(1, pixels // (height * width)) for pixels in (EARLY_PIXELS, PIXELS))
        return chunked(lambda images: self._late(chunked(self._early, images, early)), inputs, whole)

    def _early(self, inputs: jax.Array) -> jax.Array:
        x = self.stem(inputs)
        for block in self.blocks[:EARLY_BLOCKS]:
            x = block(x)
        return x

    def _late(self, x: jax.Array) -> jax.Array:
        for block in self.blocks[EARLY_BLOCKS:]:
            x = block(x)
        return self.head(x)


def build(variant: Variant, num_classes: int, image_size: int | None = None) -> EfficientNetLite:
    """The module, to be traced; it takes images of any size."""
    return EfficientNetLite(variant, num_classes, rngs=nnx.Rngs(0))


def std(path: str, shape: tuple[int, ...]) -> float | None:
    """Convolution kernels have variance ``2 / (k * k * features)`` (depthwise ``2 / (k * k)``), as the EfficientNet
    reference has them; the classifier's kernel a standard deviation of 0.01."""
    if not path.endswith("/kernel"):
        return None
    if len(shape) == 2:
        return CLASSIFIER_STD
    *window, inputs, features = shape
    return math.sqrt(2.0 / (math.prod(window) * (1 if inputs == 1 else features)))


def stages(variant: Variant) -> list[str]:
    """Globs from input to output."""
    return ["stem/**", *(f"blocks/{i}/**" for i in range(len(block_specs(variant)))), "head/**"]


def preprocess(variant: Variant, image_size: int | None, class_names: tuple[str, ...]) -> Preprocess:
    """Bicubic, with the mean and standard deviation of ImageNet."""
    size = variant.size if image_size is None else image_size
    return Preprocess((size, size), IMAGENET_MEAN, IMAGENET_STD, "bicubic", class_names)
