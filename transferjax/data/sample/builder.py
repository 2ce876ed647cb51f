"""The TFDS builder of the bundled sample: Fashion-MNIST's own files in, a few of its images as ArrayRecord out."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
TRAIN_PER_CLASS = 100
TEST_COUNT = 2000
TEST_OFFSET = 60000

_DESCRIPTION = """The first 100 training images of each class and the first 2,000 test images of Fashion-MNIST.
The feature "id" is the image's index in the original training file; for test images 60,000 plus its index in the
original test file. MIT licence, Copyright 2017 Zalando SE."""

_CITATION = """@article{xiao2017fashion,
  title={Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  author={Xiao, Han and Rasul, Kashif and Vollgraf, Roland},
  journal={arXiv:1708.07747},
  year={2017}
}"""


class FashionMnistSample(tfds.core.GeneratorBasedBuilder):
    """1,000 training and 2,000 test images of Fashion-MNIST.

    Args:
      source: the directory with the four ``*-ubyte.gz`` files of Fashion-MNIST.
      **kwargs: as of any TFDS builder; ``file_format="array_record"`` needs no TensorFlow.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source: str = "", **kwargs):
        self._source = Path(source)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Scalar(np.int64),
                "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=list(CLASS_NAMES)),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=features,
            supervised_keys=("image", "label"),
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            citation=_CITATION,
            license=(Path(__file__).parent / "LICENSE").read_text(),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("train"), "test": self._generate_examples("t10k")}

    def _generate_examples(self, prefix: str) -> Iterator[tuple[int, dict]]:
        images, labels = read_idx(self._source, prefix)
        train = prefix == "train"
        chosen = first_of_each_class(labels, TRAIN_PER_CLASS) if train else np.arange(TEST_COUNT)
        for index in chosen.tolist():
            key = index if train else TEST_OFFSET + index
            yield key, {"id": key, "image": encode_png(images[index]), "label": int(labels[index])}


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first ``count`` examples of every class, in file order.

    >>> first_of_each_class(np.array([1, 0, 0, 1, 0]), 1).tolist()
    [0, 1]
    """
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in np.unique(labels)]))


def encode_png(image: np.ndarray) -> io.BytesIO:
    """A grey image ``[H, W] uint8`` as a small PNG: the best row filter, deflated as far as it goes.

    >>> encode_png(np.zeros((28, 28), np.uint8)).getvalue()[1:4]
    b'PNG'
    """
    height = len(image)
    filtered = [b"".join(bytes([n]) + row.tobytes() for row in rows) for n, rows in enumerate(_filtered(image))]
    best = sorted(filtered, key=lambda body: min(len(_deflate(body, strategy)) for strategy in range(5)))
    data = min((squeeze(body) for body in best[:2]), key=len)
    header = struct.pack(">IIBBBBB", image.shape[1], height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks))


def _filtered(image: np.ndarray) -> list[np.ndarray]:
    """The image under PNG's filters none, sub, up, average and Paeth."""
    x = np.pad(image.astype(np.int16), ((1, 0), (1, 0)))
    left, up, corner = x[1:, :-1], x[:-1, 1:], x[:-1, :-1]
    by_left, by_up, by_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    nearest = np.where(by_up <= by_corner, up, corner)
    paeth = np.where((by_left <= by_up) & (by_left <= by_corner), left, nearest)
    return [(x[1:, 1:] - guess).astype(np.uint8) for guess in (0 * left, left, up, (left + up) // 2, paeth)]


def _deflate(data: bytes, strategy: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 15, 9, strategy)
    return packer.compress(data) + packer.flush()


def squeeze(data: bytes) -> bytes:
    """Deflated as small as possible: by the package ``zopfli`` where it is installed (4 % smaller), else by zlib.

    >>> zlib.decompress(squeeze(b"aaaa"))
    b'aaaa'
    """
    candidates = [_deflate(data, strategy) for strategy in range(5)]
    if importlib.util.find_spec("zopfli"):
        candidates.append(importlib.import_module("zopfli.zlib").compress(data, numiterations=5))
    return min(candidates, key=len)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def read_idx(source: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """The images ``[N, 28, 28] uint8`` and labels ``[N] uint8`` of one of Fashion-MNIST's two file pairs."""
    images = _idx(source / f"{prefix}-images-idx3-ubyte.gz", 3)
    return images, _idx(source / f"{prefix}-labels-idx1-ubyte.gz", 1)


def _idx(path: Path, rank: int) -> np.ndarray:
    data = gzip.decompress(path.read_bytes())
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
