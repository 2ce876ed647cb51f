"""Small data sets on disk and in memory."""

import gzip
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from transferjax.data import arrays, open
from transferjax.data._open import SAMPLE


def write_image(path, value=0, size=(8, 6), mode="RGB"):
    """An image of one colour; ``size`` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)


@pytest.fixture(name="write_image")
def write_image_fixture():
    return write_image


@pytest.fixture
def folder(tmp_path):
    """Twelve images of two classes and of two sizes: ``cat`` is dark red, ``dog`` bright red."""
    for number in range(6):
        write_image(tmp_path / "pets" / "cat" / f"{number}.png", 10 + number)
        write_image(tmp_path / "pets" / "dog" / f"{number}.png", 200 + number, size=(10, 4))
    return tmp_path / "pets"


@pytest.fixture
def split_folder(tmp_path):
    """Three training and one test image, the test folder without one of the classes."""
    for name in ("train/cat/1.png", "train/dog/1.png", "train/dog/2.png", "test/dog/3.png"):
        write_image(tmp_path / "split" / name)
    return tmp_path / "split"


@pytest.fixture
def ten():
    """Ten images of 4 x 4 pixels, each filled with its own number; three classes."""
    images = np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    return arrays(images, np.arange(10) % 3, class_names=("a", "b", "c"))


@pytest.fixture(scope="session")
def sample_train():
    return open("sample", "train")


@pytest.fixture
def prepared_copy(tmp_path):
    """A copy of the prepared sample that a test may damage."""
    return shutil.copytree(SAMPLE, tmp_path / "prepared")


@pytest.fixture
def idx_files(tmp_path):
    """Files of Fashion-MNIST's form: 150 random images each, labels counting 0 to 9."""
    rng = np.random.default_rng(0)
    labels = (np.arange(150) % 10).astype(np.uint8)
    images = rng.integers(0, 2, (150, 28, 28), np.uint8)
    for prefix in ("train", "t10k"):
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + data.ndim}I", 2048 + data.ndim, *data.shape)
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + data.tobytes(), 1))
    return tmp_path, images, labels
