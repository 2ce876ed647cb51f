import io

import jax
import numpy as np
import pytest
from PIL import Image

from transferjax import _errors
from transferjax.data._image import as_size, check_interpolation, decode, header_shape, resize


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_becomes_uint8(mode, channels):
    data = encoded(Image.new(mode, (6, 4)), "TIFF" if mode == "CMYK" else "PNG")
    image = decode(data, channels)
    assert image.shape == (4, 6, channels)
    assert image.dtype == np.uint8


def test_sixteen_bits_become_eight():
    data = encoded(Image.fromarray(np.full((2, 2), 257 * 77, np.uint16)))
    assert decode(data, 1).ravel().tolist() == [77] * 4


def test_a_palette_with_transparency_decodes_without_a_warning():
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30] * 256)
    assert decode(encoded(image, transparency=bytes([0, 255])), 3)[0, 0].tolist() == [10, 20, 30]


def test_orientation_is_applied_only_when_asked():
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif)
    assert decode(data).shape == (4, 6, 3)
    assert decode(data, orient=True).shape == (6, 4, 3)


def test_the_header_tells_the_shape(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.new("L", (6, 4))))
    assert header_shape(tmp_path / "a.png") == (4, 6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_agrees_with_the_device(interpolation):
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    expected = jax.image.resize(image.astype(np.float32), (5, 7, 3), interpolation).clip(0, 255)
    assert np.abs(resize(image, (5, 7), interpolation) - expected).max() <= 1.01


def test_resize_to_the_same_size_is_the_image_itself():
    image = np.zeros((4, 4, 1), np.uint8)
    assert resize(image, (4, 4)) is image


def test_an_unknown_interpolation_names_the_nearest():
    with pytest.raises(_errors.DataError, match=r"'bicubix' is no interpolation.*Nearest: bicubic\."):
        check_interpolation("bicubix")


def test_sizes():
    assert as_size(None) is None
    assert as_size(3) == (3, 3)
    assert as_size((3, 4)) == (3, 4)
    assert as_size((0, 4), 0) == (0, 4)


@pytest.mark.parametrize("size", ["64", -3, 0, 2.5, (3,), (3, 4, 5), (3, "4"), True])
def test_a_size_is_a_whole_number_of_pixels_or_two(size):
    with pytest.raises(
        _errors.DataError, match=r"padding is .*; expected pixels as a whole number of at least 1, or a p"
    ):
        as_size(size, 1, "padding")
