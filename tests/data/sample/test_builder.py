import io
import zlib

import numpy as np
import pytest
from PIL import Image

from transferjax.data.sample.builder import encode_png, first_of_each_class, read_idx, squeeze


def test_the_first_of_each_class_in_file_order():
    labels = np.array([2, 0, 2, 1, 2, 0, 1, 1])
    assert first_of_each_class(labels, 2).tolist() == [0, 1, 2, 3, 5, 6]


@pytest.mark.parametrize("shape", [(28, 28), (5, 9), (1, 1)])
@pytest.mark.parametrize("high", [1, 4, 256])
def test_png_is_lossless(shape, high):
    image = np.random.default_rng(0).integers(0, high, shape).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(image).getvalue()))), image)


def test_squeezed_data_come_back():
    assert zlib.decompress(squeeze(b"transfer" * 50)) == b"transfer" * 50


def test_idx_files_are_read(idx_files):
    source, images, labels = idx_files
    read = read_idx(source, "t10k")
    np.testing.assert_array_equal(read[0], images)
    np.testing.assert_array_equal(read[1], labels)
