"""ResNet 18, 34, 50, 101 and 152 (version 1.5) in Flax NNX."""

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
from transferjax.models._efficientnet_lite import IMAGENET_MEAN, IMAGENET_STD, BatchNorm
from transferjax.models._initialise import shape_rngs
from transferjax.numerics import conv_general_dilated

EPSILON = 1e-5
MOMENTUM = 0.9
EXPANSION = 4
CLASSIFIER_STD = 0.01

_batch_norm = partial(BatchNorm, use_running_average=True, momentum=MOMENTUM, epsilon=EPSILON)


@dataclasses.dataclass(frozen=True)
class Variant:
    """The sizes of one ResNet.

    Attributes:
      layers: number of blocks of each stage.
      bottleneck: whether a block is 1x1, 3x3, 1x1 (four times the stage's channels come out) rather than 3x3, 3x3.
      channels: of the 3x3 convolutions of each stage; every stage but the first halves the image.
      stem: features of the 7x7 convolution.
      size: pixels of a side of the image at which the weights were trained.
    """

    layers: tuple[int, ...]
    bottleneck: bool
    channels: tuple[int, ...] = (64, 128, 256, 512)
    stem: int = 64
    size: int = 224


VARIANTS = {
    "resnet18": Variant((2, 2, 2, 2), bottleneck=False),
    "resnet34": Variant((3, 4, 6, 3), bottleneck=False),
    "resnet50": Variant((3, 4, 6, 3), bottleneck=True),
    "resnet101": Variant((3, 4, 23, 3), bottleneck=True),
    "resnet152": Variant((3, 8, 36, 3), bottleneck=True),
}


def _convolution(inputs: int, features: int, kernel: int, rngs: nnx.Rngs, stride: int = 1) -> nnx.Conv:
    # torch pads both sides alike; 'SAME' would pad a strided convolution on the far side only.
    around = (kernel // 2, kernel // 2)
    return nnx.Conv(
        inputs,
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=(around, around),
        use_bias=False,
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
    )


class Stem(nnx.Module):
    """7x7 convolution of stride 2, BatchNorm, ReLU, 3x3 maximum of stride 2: ``[B, H, W, 3] -> [B, H/4, W/4, 64]``."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.conv = _convolution(3, features, 7, rngs, stride=2)
        self.bn = _batch_norm(features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.bn(self.conv(x)))
        around = ((0, 0), (1, 1), (1, 1), (0, 0))
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)


class Downsample(nnx.Module):
    """The shortcut of a block that changes size or features: 1x1 convolution, BatchNorm."""

    def __init__(self, inputs: int, features: int, stride: int, *, rngs: nnx.Rngs):
        self.conv = _convolution(inputs, features, 1, rngs, stride)
        self.bn = _batch_norm(features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x))


class Block(nnx.Module):
    """Residual block; the stride lies in the (first) 3x3 convolution."""

    def __init__(self, inputs: int, channels: int, stride: int, bottleneck: bool, *, rngs: nnx.Rngs):
        features = channels * EXPANSION if bottleneck else channels
        first, second = ((1, 1), (3, stride)) if bottleneck else ((3, stride), (3, 1))
        self.conv1 = _convolution(inputs, channels, first[0], rngs, first[1])
        self.bn1 = _batch_norm(channels, rngs=rngs)
        self.conv2 = _convolution(channels, channels, second[0], rngs, second[1])
        self.bn2 = _batch_norm(channels, rngs=rngs)
        self.bottleneck = bottleneck
        if bottleneck:
            self.conv3 = _convolution(channels, features, 1, rngs)
            self.bn3 = _batch_norm(features, rngs=rngs)
        self.downsamples = stride != 1 or inputs != features
        if self.downsamples:
            self.downsample = Downsample(inputs, features, stride, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        x = self.bn2(self.conv2(jax.nn.relu(self.bn1(self.conv1(inputs)))))
        if self.bottleneck:
            x = self.bn3(self.conv3(jax.nn.relu(x)))
        return jax.nn.relu(x + (self.downsample(inputs) if self.downsamples else inputs))


class Head(nnx.Module):
    """Mean over the image, dense layer (none for 0 classes)."""

    def __init__(self, features: int, num_classes: int, *, rngs: nnx.Rngs):
        self.classifies = num_classes > 0
        if self.classifies:
            self.fc = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        pooled = jnp.mean(x, axis=(1, 2))
        return self.fc(pooled) if self.classifies else pooled


class ResNet(nnx.Module):
    """Residual network, version 1.5 (the stride of a bottleneck lies in its 3x3 convolution), as torchvision has it.

    Built in inference mode: every BatchNorm uses its stored statistics, until ``Model.apply(..., train=...)`` or
    ``nnx.view`` says otherwise. Torch stores the unbiased variance when it trains, Flax the biased one.

    Every BatchNorm's scale starts at one, as torchvision's does by default. To train from scratch with residual
    branches that start at zero (its ``zero_init_residual``), zero the last scale of each block, ``bn2`` or, of a
    bottleneck, ``bn3``:
    ``jax.tree.map(lambda leaf, zero: leaf * (not zero), params, tj.mask(params, "stages/*/*/bn3/scale"))``.

    Args:
      variant: one of ``VARIANTS.values()``, or any other.
      num_classes: outputs of the last dense layer; 0 leaves it out.
      rngs: the stream of initialisation, ``params``.

    >>> module = nnx.eval_shape(lambda: ResNet(Variant((1, 2), bottleneck=True), 10, rngs=nnx.Rngs(0)))
    >>> module.stages[1][0].conv2.strides, module.head.fc.kernel.shape
    ((2, 2), (512, 10))

    Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385; torchvision's ``resnet``.
    """

    def __init__(self, variant: Variant, num_classes: int, *, rngs: nnx.Rngs):
        self.stem = Stem(variant.stem, rngs=rngs)
        inputs, stages = variant.stem, []
        for stage, (count, channels) in enumerate(zip(variant.layers, variant.channels)):
            blocks = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(inputs, channels, stride, variant.bottleneck, rngs=rngs))
                inputs = channels * EXPANSION if variant.bottleneck else channels
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.head = Head(inputs, num_classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Logits ``[B, num_classes]`` (or pooled features) of normalised images ``[B, H, W, 3]``."""
        channels = self.stem.conv.kernel.shape[2]
        if jnp.ndim(inputs) != 4 or inputs.shape[3] != channels:
            raise TransferError(
                f"ResNet expects images [B, H, W, {channels}], got {describe(inputs)}. Give a single image a batch "
                "axis, x[None]; transferjax.data.on_images(model, size) resizes, normalises and makes grey RGB."
            )
        x = self.stem(inputs)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x)


def build(variant: Variant, num_classes: int, image_size: int | None = None) -> ResNet:
    """The module, to be traced for its shapes; it takes images of any size."""
    return ResNet(variant, num_classes, rngs=shape_rngs())


def std(path: str, shape: tuple[int, ...]) -> float | None:
    """Convolution kernels have variance ``2 / (k * k * features)``, as in torchvision; the classifier's kernel a
    standard deviation of 0.01."""
    if not path.endswith("/kernel"):
        return None
    return CLASSIFIER_STD if len(shape) == 2 else math.sqrt(2.0 / (shape[0] * shape[1] * shape[3]))


def stages(variant: Variant) -> list[str]:
    """Globs from input to output, one per block.

    >>> stages(Variant((1, 2), bottleneck=False))
    ['stem/**', 'stages/0/0/**', 'stages/1/0/**', 'stages/1/1/**', 'head/**']
    """
    blocks = [f"stages/{stage}/{i}/**" for stage, count in enumerate(variant.layers) for i in range(count)]
    return ["stem/**", *blocks, "head/**"]


def preprocess(variant: Variant, image_size: int | None, class_names: tuple[str, ...]) -> Preprocess:
    """Bilinear, with the mean and standard deviation of ImageNet, as torchvision's weights have it."""
    size = variant.size if image_size is None else image_size
    return Preprocess((size, size), IMAGENET_MEAN, IMAGENET_STD, "bilinear", class_names)
