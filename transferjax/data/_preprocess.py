"""From stored pixels to what the network was trained on: pure functions for the device, inside ``jax.jit``."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from transferjax import interop
from transferjax._errors import DataError, describe, nearest_hint
from transferjax._types import Array, Model, Preprocess
from transferjax.data._image import as_size

METHODS = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest"}


def preprocess(
    inputs: Array, spec: Preprocess, size: int | tuple[int, int] | None = None, *, channels: int = 3
) -> Array:
    """Scale to [0, 1], resize, make grey images coloured, normalise.

    Args:
      inputs: ``[B, H, W, C]`` (or ``[H, W, C]``); uint8 in 0 to 255, or floats in [0, 1] already. C is 1 or
        ``channels``.
      spec: the network's :class:`transferjax._types.Preprocess`, usually ``model.preprocess``.
      size: side length or ``(height, width)`` in pixels; by default ``spec.size``.
      channels: what the network takes; grey images are repeated.

    Returns:
      ``[B, h, w, channels] float32``: ``(pixels - mean) / std``.

    Raises:
      DataError: inputs of another shape or type, or an unknown interpolation.

    >>> import numpy as np
    >>> spec = Preprocess(size=(4, 4), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    >>> outputs = preprocess(np.full((2, 4, 4, 1), 255, np.uint8), spec)
    >>> outputs.shape, float(outputs.min())
    ((2, 4, 4, 3), 1.0)
    """
    pixels = unit(inputs)
    if pixels.shape[-1] not in (1, channels):
        raise DataError(f"images have {pixels.shape[-1]} channels: {describe(inputs)}; expected 1 or {channels}.")
    pixels = resized(pixels, spec.size if size is None else size, spec.interpolation)
    coloured = jnp.broadcast_to(pixels, (*pixels.shape[:-1], channels))
    return (coloured - jnp.asarray(spec.mean, jnp.float32)) / jnp.asarray(spec.std, jnp.float32)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """:func:`preprocess` with all but its images given: static, hashable, a pytree without leaves.

    Attributes:
      spec: the network's Preprocess.
      size: ``(height, width)`` in pixels.
      channels: what the network takes.
    """

    spec: Preprocess
    size: tuple[int, int]
    channels: int = 3

    def __call__(self, inputs: Array) -> Array:
        return preprocess(inputs, self.spec, self.size, channels=self.channels)


def preprocessor(spec: Preprocess, size: int | tuple[int, int] | None = None, *, channels: int = 3) -> Preprocessor:
    """:func:`preprocess` as a function of the images alone.

    Two with the same arguments are equal, so that building one anew does not compile anew.

    Args:
      spec: the network's Preprocess.
      size: side length or ``(height, width)`` in pixels; by default ``spec.size``.
      channels: what the network takes.

    Returns:
      ``inputs [B, H, W, C] -> [B, h, w, channels] float32``.

    >>> preprocessor(Preprocess((4, 4)), 8) == preprocessor(Preprocess((4, 4)), (8, 8))
    True
    """
    return Preprocessor(spec, as_size(spec.size if size is None else size), channels)  # pyright: ignore


def on_images(model: Model, size: int | tuple[int, int] | None = None) -> Model:
    """The Model with its own preprocessing in front, so that it takes images as they are stored.

    Scaling, resizing and normalising become part of every program that applies the Model, on its device.

    Args:
      model: a Model with a ``preprocess``.
      size: side length or ``(height, width)`` in pixels at which the network sees them; by default its own.

    Returns:
      A Model whose inputs are ``[B, H, W, C]`` uint8 (or floats in [0, 1]), grey or coloured; its ``preprocess`` has
      the size.

    Raises:
      DataError: the Model has no ``preprocess``, or takes images as they are stored already.

    >>> import numpy as np
    >>> from transferjax.interop import pure
    >>> model = pure(lambda params, x: x.mean((1, 2, 3)), {}, preprocess=Preprocess((8, 8)))
    >>> on_images(model, 4).apply({}, {}, np.full((1, 28, 28, 1), 255, np.uint8))[0].round(5).tolist()
    [1.0]
    """
    if model.preprocess is None:
        raise DataError("on_images() expects a Model with a preprocess; give it one: model._replace(preprocess=...).")
    if isinstance(getattr(getattr(model.apply, "forward", None), "function", None), Preprocessor):
        raise DataError(
            "on_images() got a Model that takes images as they are stored already; it would normalise them twice. "
            "Call it on the Model before: on_images(model, size)."
        )
    function = preprocessor(model.preprocess, size)
    spec = dataclasses.replace(model.preprocess, size=function.size)
    return interop.map_inputs(model, function)._replace(preprocess=spec)


def unit(inputs: Array) -> Array:
    """Images as float32 in [0, 1]; floats are taken to be there already.

    Raises:
      DataError: not ``[..., H, W, C]``, or integers other than uint8.
    """
    if not hasattr(inputs, "ndim") or inputs.ndim < 3:
        raise DataError(f"expected images [B, H, W, C] uint8 or float32; got {describe(inputs)}.")
    if inputs.dtype == jnp.uint8:
        return jnp.asarray(inputs, jnp.float32) / 255.0
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise DataError(f"expected images as uint8 (0 to 255) or floats in [0, 1]; got {describe(inputs)}.")
    return jnp.asarray(inputs, jnp.float32)


def resized(pixels: Array, size: int | tuple[int, int], interpolation: str) -> Array:
    """Float images ``[..., H, W, C]`` at another size, antialiased; unchanged when they have it."""
    target = (*pixels.shape[:-3], *as_size(size), pixels.shape[-1])  # pyright: ignore
    return pixels if target == pixels.shape else jax.image.resize(pixels, target, method(interpolation))


def method(interpolation: str) -> str:
    """The name by which ``jax.image`` knows an interpolation.

    Raises:
      DataError: an unknown interpolation.

    >>> method("bicubic")
    'cubic'
    """
    if interpolation not in METHODS:
        raise DataError(
            f"'{interpolation}' is no interpolation; expected one of {', '.join(METHODS)}."
            f"{nearest_hint(interpolation, METHODS, 1)}"
        )
    return METHODS[interpolation]
