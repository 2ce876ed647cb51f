"""Images on the host: bytes or files to uint8 arrays, and arrays of many sizes to one."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np

from transferjax._errors import DataError, is_whole, nearest_hint

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(data: bytes | str | os.PathLike, channels: int = 3, *, orient: bool = False) -> np.ndarray:
    """An encoded image as an array.

    Args:
      data: the bytes of a PNG, JPEG or other file that Pillow reads, or the path of one.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA); images of another kind are converted, 16-bit ones to 8 bit.
      orient: turn the picture upright as its EXIF entry says.

    Returns:
      ``[H, W, channels] uint8``.

    Raises:
      OSError, SyntaxError, ValueError, EOFError: whatever Pillow raises for damaged data.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        upright = ImageOps.exif_transpose(image) if orient else image
        array = np.asarray(_convert(upright, _MODES[channels]))
    return array.reshape(*array.shape[:2], channels)


def _convert(image: Any, mode: str) -> Any:
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def header_shape(path: str | os.PathLike) -> tuple[int, int]:
    """``(H, W)`` of an image file as its header states them."""
    from PIL import Image

    with Image.open(path) as image:
        return image.height, image.width


def resize(image: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> np.ndarray:
    """Resize on the host, antialiased.

    Args:
      image: ``[H, W, C] uint8``.
      size: ``(height, width)`` of the result, pixels.
      interpolation: ``"bilinear"``, ``"bicubic"`` or ``"nearest"``.

    Returns:
      ``[height, width, C] uint8``.

    Raises:
      DataError: an interpolation of another name.

    >>> resize(np.zeros((8, 6, 1), np.uint8), (4, 4)).shape
    (4, 4, 1)
    """
    from PIL import Image

    check_interpolation(interpolation)
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    method = Image.Resampling[interpolation.upper()]
    channels = [np.asarray(Image.fromarray(c).resize((width, height), method)) for c in np.moveaxis(image, -1, 0)]
    return np.stack(channels, axis=-1)


def check_interpolation(name: str) -> None:
    """Raise unless the library knows the interpolation.

    Raises:
      DataError: an interpolation of another name.
    """
    if name not in INTERPOLATIONS:
        raise DataError(
            f"'{name}' is no interpolation; expected one of {', '.join(INTERPOLATIONS)}."
            f"{nearest_hint(name, INTERPOLATIONS, 1)}"
        )


def as_size(size: Any, least: int = 1, name: str = "size") -> tuple[int, int] | None:
    """A side length or ``(height, width)`` as ``(height, width)``; ``None`` stays.

    Raises:
      DataError: another form, or a number below ``least``.

    >>> as_size(96), as_size((64, 96)), as_size(None)
    ((96, 96), (64, 96), None)
    """
    if size is None:
        return None
    given = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(given) != 2 or not all(is_whole(n, least) for n in given):
        raise DataError(
            f"{name} is {size!r}; expected pixels as a whole number of at least {least}, or a pair (height, width)."
        )
    return int(given[0]), int(given[1])
