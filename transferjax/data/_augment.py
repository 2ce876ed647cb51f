"""Augmentation on the device: pure functions ``(batch, key) -> batch`` for use inside ``jax.jit``.

Images are uint8 (0 to 255) or float32 in [0, 1], before or after :func:`preprocess`. What happens to an example
depends on the key and the example's ``id`` (its position, in a batch without ids), not on the rest of the batch;
``mixup`` and ``cutmix`` mix examples, so they depend on the batch by nature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import DataError, describe
from transferjax._types import Array, Batch
from transferjax.data._image import as_size
from transferjax.data._preprocess import method, unit

_TRIES = 10


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A function ``(batch, key) -> batch`` and its options: static, hashable, a pytree without leaves.

    Two that are built alike are equal, so that building one anew does not compile anew.

    Attributes:
      function: ``(batch, key, **options) -> batch``.
      options: names and hashable values.
    """

    function: Callable[..., Any]
    options: tuple[tuple[str, Hashable], ...] = ()

    def __call__(self, batch: Batch, key: Array) -> dict[str, Any]:
        return self.function(batch, key, **dict(self.options))

    def __repr__(self) -> str:
        return f"{self.function.__name__.lstrip('_')}({', '.join(f'{k}={v!r}' for k, v in self.options)})"


def _augmentation(function: Callable[..., Any], /, **options: Hashable) -> Augmentation:
    return Augmentation(function, tuple(options.items()))


def compose(*functions: Callable[[Batch, Array], Batch]) -> Augmentation:
    """One augmentation after the other, each with a key of its own.

    Args:
      *functions: ``(batch, key) -> batch``; none leaves the batch as it is.

    Returns:
      An Augmentation; the key is consumed.

    >>> compose(random_flip(), random_crop(2))
    compose(functions=(random_flip(probability=0.5), random_crop(padding=2)))
    """
    return _augmentation(_compose, functions=functions)


def _compose(batch: Batch, key: Array, functions: tuple[Callable[[Batch, Array], Batch], ...]) -> Batch:
    for number, function in enumerate(functions):
        batch = function(batch, jax.random.fold_in(key, number))
    return dict(batch)


def on_inputs(function: Callable[[Array], Array]) -> Augmentation:
    """A function of the inputs alone (such as a ``preprocessor``) as a step for :func:`compose`.

    >>> batch = on_inputs(jnp.negative)({"inputs": jnp.ones(2), "labels": jnp.zeros(2)}, jax.random.key(0))
    >>> batch["inputs"].tolist()
    [-1.0, -1.0]
    """
    return _augmentation(_on_inputs, function=function)


def _on_inputs(batch: Batch, key: Array, function: Callable[[Array], Array]) -> Batch:
    return {**batch, "inputs": function(batch["inputs"])}


def example_keys(batch: Batch, key: Array) -> Array:
    """A key for each example, from the key and the example's id (its position, in a batch without ids).

    Args:
      batch: with ``id [B]`` or ``inputs [B, ...]``.
      key: a typed key.

    Returns:
      ``[B]`` keys.

    >>> batch = {"inputs": jnp.zeros((2, 4, 4, 1)), "id": jnp.array([7, 9])}
    >>> example_keys(batch, jax.random.key(0)).shape
    (2,)
    """
    ids = batch["id"] if "id" in batch else jnp.arange(len(_images(batch)))
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.asarray(ids).astype(jnp.uint32))


def random_flip(probability: float = 0.5) -> Augmentation:
    """Mirror images left to right.

    Args:
      probability: of each image to be mirrored.

    Returns:
      An Augmentation; the key is consumed.

    >>> batch = {"inputs": jnp.arange(3.0).reshape(1, 1, 3, 1), "id": jnp.array([5])}
    >>> random_flip(1.0)(batch, jax.random.key(0))["inputs"].ravel().tolist()
    [2.0, 1.0, 0.0]
    """
    _check_range("probability", probability, 0.0, 1.0)
    return _augmentation(_random_flip, probability=probability)


def _random_flip(batch: Batch, key: Array, probability: float) -> Batch:
    images = _images(batch)
    chosen = jax.vmap(lambda k: jax.random.bernoulli(k, probability))(example_keys(batch, key))
    return {**batch, "inputs": jnp.where(chosen[:, None, None, None], images[:, :, ::-1], images)}


def random_crop(padding: int | tuple[int, int]) -> Augmentation:
    """Shift images by up to ``padding`` pixels: pad with zeros (black, before normalisation) and cut out at random.

    Args:
      padding: pixels on each side, or ``(vertical, horizontal)``.

    Returns:
      An Augmentation that keeps the images' size; the key is consumed.

    >>> batch = {"inputs": jnp.ones((2, 8, 8, 3)), "id": jnp.arange(2)}
    >>> random_crop(2)(batch, jax.random.key(0))["inputs"].shape
    (2, 8, 8, 3)
    """
    as_size(padding, 0, "padding")
    return _augmentation(_random_crop, padding=padding)


def _random_crop(batch: Batch, key: Array, padding: int | tuple[int, int]) -> Batch:
    images = _images(batch)
    vertical, horizontal = as_size(padding, 0, "padding")  # pyright: ignore
    padded = jnp.pad(images, ((0, 0), (vertical, vertical), (horizontal, horizontal), (0, 0)))
    limits = jnp.array([2 * vertical + 1, 2 * horizontal + 1])

    def crop(image, k):
        top, left = jax.random.randint(k, (2,), 0, limits)
        return jax.lax.dynamic_slice(image, (top, left, 0), images.shape[1:])

    return {**batch, "inputs": jax.vmap(crop)(padded, example_keys(batch, key))}


def random_resized_crop(
    size: int | tuple[int, int] | None = None,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bilinear",
) -> Augmentation:
    """Cut out a random rectangle and bring it to one size (Szegedy et al. 2015, arXiv:1409.4842).

    As in torchvision ten rectangles are drawn and the first that fits is taken, else the largest central one; here
    their edges lie between pixels, and one resampling does both crop and resize.

    Args:
      size: side length or ``(height, width)`` of the result in pixels; by default that of the images.
      scale: least and greatest area of the rectangle, as parts of the image's.
      ratio: least and greatest width over height; drawn uniformly in the logarithm.
      interpolation: ``"bilinear"``, ``"bicubic"`` or ``"nearest"``; antialiased.

    Returns:
      An Augmentation whose images are float32 in [0, 1] (uint8 ones are scaled); the key is consumed.

    >>> batch = {"inputs": jnp.zeros((2, 8, 6, 1), jnp.uint8), "id": jnp.arange(2)}
    >>> jax.jit(random_resized_crop(4))(batch, jax.random.key(0))["inputs"].shape
    (2, 4, 4, 1)
    """
    _check_interval("scale", scale, 1.0)
    _check_interval("ratio", ratio, float("inf"))
    method(interpolation)
    target = as_size(size)
    return _augmentation(
        _random_resized_crop, size=target, scale=tuple(scale), ratio=tuple(ratio), interpolation=interpolation
    )


def _random_resized_crop(batch: Batch, key: Array, size, scale, ratio, interpolation) -> Batch:
    images = unit(_images(batch))
    sides = (images.shape[1], images.shape[2])
    target = jnp.array(size or sides, jnp.float32)
    shape = (*(size or sides), images.shape[-1])

    def crop(image, k):
        box, corner = _rectangle(k, sides, scale, ratio)
        zoom = target / box
        if interpolation == "nearest":
            return _nearest(image, corner, box, shape)
        return jax.image.scale_and_translate(image, shape, (0, 1), zoom, -corner * zoom, method(interpolation))

    return {**batch, "inputs": jax.vmap(crop)(images, example_keys(batch, key))}


def _rectangle(key: Array, sides: tuple[int, int], scale, ratio) -> tuple[Array, Array]:
    """Height and width, and top and left edge, of one random rectangle; in pixels."""
    height, width = sides
    draws = jax.random.uniform(key, (2, _TRIES + 1))
    area = (scale[0] + draws[0, 1:] * (scale[1] - scale[0])) * height * width
    drawn = ratio[0] * (ratio[1] / ratio[0]) ** draws[1, 1:]
    boxes = jnp.stack([jnp.sqrt(area / drawn), jnp.sqrt(area * drawn)], axis=-1)
    limit = jnp.array(sides, jnp.float32)
    fits = jnp.all(boxes <= limit * (1 + 1e-6), axis=-1)
    aspect = jnp.clip(width / height, ratio[0], ratio[1])
    largest = jnp.stack([jnp.minimum(height, width / aspect), jnp.minimum(width, height * aspect)])
    box = jnp.minimum(jnp.where(fits.any(), boxes[jnp.argmax(fits)], largest), limit)
    place = jnp.where(fits.any(), draws[:, 0], 0.5)
    return box, place * (limit - box)


def _nearest(image: Array, corner: Array, box: Array, shape: tuple[int, ...]) -> Array:
    index = [
        jnp.clip(jnp.floor(corner[a] + (jnp.arange(shape[a]) + 0.5) * box[a] / shape[a]), 0, image.shape[a] - 1)
        for a in (0, 1)
    ]
    return image[index[0].astype(int)][:, index[1].astype(int)]


def mixup(alpha: float = 0.2, *, num_classes: int) -> Augmentation:
    """Blend each example with another one of the batch, images and labels alike (Zhang et al. 2018, arXiv:1710.09412).

    Args:
      alpha: the share of the example is drawn from Beta(alpha, alpha), once per batch.
      num_classes: C.

    Returns:
      An Augmentation: images become float32 (uint8 ones in [0, 1]), labels soft targets ``[B, C] float32`` that
      sum to 1; the key is consumed.

    >>> batch = {"inputs": jnp.zeros((4, 8, 8, 1)), "labels": jnp.array([0, 1, 2, 0])}
    >>> jax.jit(mixup(num_classes=3))(batch, jax.random.key(0))["labels"].sum(1).round(5).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    _check_range("alpha", alpha, 1e-6, float("inf"))
    return _augmentation(_mixup, alpha=alpha, num_classes=num_classes)


def _mixup(batch: Batch, key: Array, alpha: float, num_classes: int) -> Batch:
    for_share, for_partner = jax.random.split(key)
    images = unit(_images(batch))
    share = jax.random.beta(for_share, alpha, alpha)
    partner = jax.random.permutation(for_partner, len(images))
    return {
        **batch,
        "inputs": share * images + (1 - share) * images[partner],
        "labels": _blend(batch["labels"], share, partner, num_classes),
    }


def cutmix(alpha: float = 1.0, *, num_classes: int) -> Augmentation:
    """Paste a rectangle of another example into each one (Yun et al. 2019, arXiv:1905.04899).

    Args:
      alpha: the area that stays is drawn from Beta(alpha, alpha), once per batch; the rectangle's centre is uniform,
        and what lies outside the image is cut off.
      num_classes: C.

    Returns:
      An Augmentation: images keep their type, labels become soft targets ``[B, C] float32`` by area, which sum to 1;
      the key is consumed.

    >>> batch = {"inputs": jnp.zeros((2, 8, 8, 1), jnp.uint8), "labels": jnp.array([0, 1])}
    >>> jax.jit(cutmix(num_classes=2))(batch, jax.random.key(0))["labels"].shape
    (2, 2)
    """
    _check_range("alpha", alpha, 1e-6, float("inf"))
    return _augmentation(_cutmix, alpha=alpha, num_classes=num_classes)


def _cutmix(batch: Batch, key: Array, alpha: float, num_classes: int) -> Batch:
    for_share, for_partner, for_centre = jax.random.split(key, 3)
    images = _images(batch)
    sides = jnp.array(images.shape[1:3])
    box = sides * jnp.sqrt(1 - jax.random.beta(for_share, alpha, alpha))
    centre = jax.random.uniform(for_centre, (2,)) * sides
    low, high = jnp.round(centre - box / 2), jnp.round(centre + box / 2)
    rows, columns = (jnp.arange(n) for n in images.shape[1:3])
    inside = ((rows >= low[0]) & (rows < high[0]))[:, None] & ((columns >= low[1]) & (columns < high[1]))[None]
    partner = jax.random.permutation(for_partner, len(images))
    return {
        **batch,
        "inputs": jnp.where(inside[None, :, :, None], images[partner], images),
        "labels": _blend(batch["labels"], 1 - inside.mean(), partner, num_classes),
    }


def soft_targets(labels: Array, num_classes: int) -> Array:
    """Classes ``[B] int`` as one-hot targets ``[B, C] float32``; targets of that shape are returned as they are.

    Raises:
      DataError: targets with another number of classes.

    >>> soft_targets(jnp.array([1]), 3).tolist()
    [[0.0, 1.0, 0.0]]
    """
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes)
    if labels.ndim != 2 or labels.shape[-1] != num_classes:
        raise DataError(f"expected labels [B] or soft targets [B, {num_classes}]; got {describe(labels)}.")
    return jnp.asarray(labels, jnp.float32)


def _blend(labels: Array, share: Array, partner: Array, num_classes: int) -> Array:
    targets = soft_targets(jnp.asarray(labels), num_classes)
    return share * targets + (1 - share) * targets[partner]


def _images(batch: Batch) -> Array:
    images = batch["inputs"]
    if getattr(images, "ndim", 0) != 4:
        raise DataError(f"augmentation expects images [B, H, W, C] as inputs; got {describe(images)}.")
    return jnp.asarray(images)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise DataError(f"{name} is {value}; expected {low} to {high}.")


def _check_interval(name: str, pair: tuple[float, float], most: float) -> None:
    if not 0 < pair[0] <= pair[1] <= most:
        raise DataError(f"{name} is {tuple(pair)}; expected 0 < least <= greatest <= {most}.")
