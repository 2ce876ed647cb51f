"""A small plain convolutional network in Flax NNX: a student, or what to compare a pretrained network with."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from transferjax import surgery
from transferjax._errors import TransferError, describe
from transferjax._types import Preprocess
from transferjax.models._efficientnet_lite import BatchNorm
from transferjax.models._initialise import shape_rngs
from transferjax.numerics import conv_general_dilated

CLASSIFIER_STD = 0.01

_batch_norm = partial(BatchNorm, use_running_average=True, momentum=0.9, epsilon=1e-5)


@dataclasses.dataclass(frozen=True)
class Variant:
    """The sizes of one network.

    Attributes:
      widths: features of each 3x3 convolution; behind each but the last the image is halved.
      size: pixels of a side of the image that it is made for; it takes any from ``2 ** len(widths) / 2`` on.
    """

    widths: tuple[int, ...] = (32, 64, 128, 192)
    size: int = 32


VARIANTS = {"convnet_small": Variant()}


class Block(nnx.Module):
    """3x3 convolution, BatchNorm, ReLU, and where the image is halved the maximum of 2x2."""

    def __init__(self, inputs: int, features: int, halves: bool, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            inputs, features, (3, 3), use_bias=False, conv_general_dilated=conv_general_dilated, rngs=rngs
        )
        self.bn = _batch_norm(features, rngs=rngs)
        self.halves = halves

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.bn(self.conv(x)))
        return nnx.max_pool(x, (2, 2), (2, 2)) if self.halves else x


class Head(nnx.Module):
    """Mean over the image, dense layer (none for 0 classes)."""

    def __init__(self, features: int, num_classes: int, *, rngs: nnx.Rngs):
        self.classifies = num_classes > 0
        if self.classifies:
            self.fc = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        pooled = jnp.mean(x, axis=(1, 2))
        return self.fc(pooled) if self.classifies else pooled


class ConvNet(nnx.Module):
    """Plain 3x3 convolutions, each with BatchNorm and ReLU, the image halved between them, and a mean over the image.

    Args:
      variant: one of ``VARIANTS.values()``, or any other.
      num_classes: outputs of the last dense layer; 0 leaves it out.
      rngs: the stream of initialisation, ``params``.

    >>> module = nnx.eval_shape(lambda: ConvNet(Variant((8, 16)), 10, rngs=nnx.Rngs(0)))
    >>> module.blocks[1].conv.kernel.shape, module.head.fc.kernel.shape
    ((3, 3, 8, 16), (16, 10))
    """

    def __init__(self, variant: Variant, num_classes: int, *, rngs: nnx.Rngs):
        widths = (3, *variant.widths)
        last = len(variant.widths) - 1
        self.blocks = nnx.List([Block(widths[n], widths[n + 1], n < last, rngs=rngs) for n in range(last + 1)])
        self.head = Head(widths[-1], num_classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Logits ``[B, num_classes]`` (or pooled features) of normalised images ``[B, H, W, 3]``."""
        least = 2 ** (len(self.blocks) - 1)
        if jnp.ndim(inputs) != 4 or inputs.shape[3] != 3 or min(inputs.shape[1:3]) < least:
            raise TransferError(
                f"ConvNet expects images [B, H, W, 3] of {least} pixels or more, got {describe(inputs)}. Give a single "
                "image a batch axis, x[None]; transferjax.data.on_images(model, size) resizes and makes grey RGB."
            )
        x = inputs
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(variant: Variant, num_classes: int, image_size: int | None = None) -> ConvNet:
    """The module, to be traced for its shapes; it takes images of any size."""
    return ConvNet(variant, num_classes, rngs=shape_rngs())


def std(path: str, shape: tuple[int, ...]) -> float | None:
    """Convolution kernels have variance ``2 / (9 * features in)``; the classifier's kernel a deviation of 0.01."""
    if not path.endswith("/kernel"):
        return None
    return CLASSIFIER_STD if len(shape) == 2 else math.sqrt(2.0 / (shape[0] * shape[1] * shape[2]))


def stages(variant: Variant) -> list[str]:
    """Globs from input to output, one per convolution.

    >>> stages(Variant((8, 16)))
    ['blocks/0/**', 'blocks/1/**', 'head/**']
    """
    return [*(f"blocks/{n}/**" for n in range(len(variant.widths))), "head/**"]


def preprocess(variant: Variant, image_size: int | None, class_names: tuple[str, ...]) -> Preprocess:
    """Pixels from -1 to 1."""
    size = variant.size if image_size is None else image_size
    return Preprocess((size, size), (0.5,) * 3, (0.5,) * 3, "bilinear", class_names)


def own(variant: Variant, file_classes: int, num_classes: int) -> tuple[surgery.Rule, ...]:
    """Files of this library have the names of its models, and here the same head; without one theirs is waived."""
    return () if num_classes else (surgery.waive("head/fc/*", optional=True),)
