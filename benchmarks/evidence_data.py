"""The data sets and the small networks of ``evidence.py``."""

from __future__ import annotations

import csv
import functools
import gzip
import itertools
import pathlib

import numpy as np
from flax import nnx

POOL, TEST = {"fashion": 10000, "mnist": 3000, "digits": 1100}, 1500
TOKENS = 32
GROUPS = {
    "newsgroups": ("rec.autos", "sci.space", "talk.politics.guns", "comp.graphics", "soc.religion.christian"),
    "groups": ("rec.motorcycles", "sci.med", "talk.politics.mideast", "comp.windows.x"),
}
"""The second, other groups, is for choosing rates."""


@functools.cache
def load(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """A data set: ``inputs``, ``labels`` (from 0) and ``test``, which marks the rows to be right on."""
    if name in ("fashion", "mnist"):
        train, labels = _idx(folder / {"fashion": "fashion-mnist"}.get(name, name), "train")
        test, wanted = _idx(folder / {"fashion": "fashion-mnist"}.get(name, name), "t10k")
        pool = POOL[name]
        return _joined(train[:pool], labels[:pool], test[:TEST], wanted[:TEST])
    if name == "digits":
        images, labels = digits()
        return _joined(images[: POOL[name]], labels[: POOL[name]], images[POOL[name] :], labels[POOL[name] :])
    return _texts(folder / "texts", name)


def _joined(train, labels, test, wanted) -> dict[str, np.ndarray]:
    mark = np.arange(len(train) + len(test)) >= len(train)
    return {
        "inputs": np.concatenate([train, test]),
        "labels": np.concatenate([labels, wanted]).astype(np.int32),
        "test": mark,
    }


def _idx(folder: pathlib.Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    def read(name: str, header: int) -> np.ndarray:
        plain = folder / f"{part}-{name}-ubyte"
        data = (
            plain.read_bytes() if plain.exists() else gzip.decompress(plain.with_name(f"{plain.name}.gz").read_bytes())
        )
        return np.frombuffer(data, np.uint8, offset=header)

    return read("images-idx3", 16).reshape(-1, 28, 28, 1), read("labels-idx1", 8)


def half(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Images of Fashion-MNIST's classes 0 to 4, none of which is in a target's pool."""
    images, labels = (part[POOL["fashion"] :] for part in _idx(folder / "fashion-mnist", "train"))
    return images[labels < 5], labels[labels < 5].astype(np.int32)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, brought from 8 to 28 pixels, in a fixed order of their own."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    bytes_ = np.round(images[order].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC)) for image in bytes_]
    return np.stack(large)[..., None], labels[order].astype(np.int32)


def _rows(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of one of Orange's tables, whose second and third lines describe the columns."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))[2:]


def _texts(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    if name == "tweets":
        rows = [(row["Author"], row["Content"]) for row in _rows(folder / "election-tweets-2016.tab")]
        order = np.random.default_rng(0).permutation(len(rows))
        rows = [rows[n] for n in order]
        train, test = rows[:3000], rows[3000 : 3000 + TEST]
    else:
        stem = "reuters-r8" if name == "reuters" else "20newsgroups"
        train, test = (
            [(r["Category"], r["Text"]) for r in _rows(folder / f"{stem}-{p}.tab")] for p in ("train", "test")
        )
        kept = GROUPS.get(name, ("earn", "acq", "crude", "trade", "money-fx", "interest", "ship"))
        train, test = ([row for row in rows if row[0] in kept] for rows in (train, test))
        rng = np.random.default_rng(0)
        train, test = ([rows[n] for n in rng.permutation(len(rows))] for rows in (train, test))
        train, test = train[:3000], test[: TEST - 500]
    return _tokens(train, test)


def _tokens(train, test) -> dict[str, np.ndarray]:
    import transferjax as tj

    names = sorted({label for label, _ in train})
    tokenizer = tj.data.tokenizer(tj.models.default_weights("minilm_l6"), max_length=TOKENS, pad_to=TOKENS)
    found = tokenizer([" ".join(text.split()[: 2 * TOKENS]) for _, text in [*train, *test]])
    inputs = np.stack([found[name] for name in ("input_ids", "attention_mask")], axis=1)
    labels = np.array([names.index(label) for label, _ in [*train, *test]], np.int32)
    return {"inputs": inputs, "labels": labels, "test": np.arange(len(labels)) >= len(train)}


def as_inputs(rows: np.ndarray, modality: str):
    """Rows of a data set as a network takes them: three channels, or tokens by name."""
    if modality == "image":
        return np.repeat(rows, 3, axis=-1)
    return {"input_ids": rows[:, 0], "attention_mask": rows[:, 1]}


def chosen(data: dict[str, np.ndarray], target, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows (as many of each class as there are, evenly), test rows, and every row's class from 0."""
    classes = np.unique(data["labels"]) if target.classes is None else np.array(target.classes)
    renamed = np.full(data["labels"].max() + 1, -1)
    renamed[classes] = np.arange(len(classes))
    labels = renamed[data["labels"]]
    rng = np.random.default_rng([seed, 2026])
    pool = rng.permutation(np.flatnonzero(~data["test"] & (labels >= 0)))
    rank = np.zeros(len(pool), int)
    for code in range(len(classes)):
        mine = labels[pool] == code
        rank[mine] = np.arange(mine.sum())
    train = pool[np.argsort(rank, kind="stable")][: target.labels]
    return train, np.flatnonzero(data["test"] & (labels >= 0)), labels


class Small(nnx.Module):
    """Three convolutions and a dense layer: the network of the two small sources and of learning from scratch."""

    def __init__(self, outputs: int, rngs: nnx.Rngs):
        widths = (3, 32, 64, 128)
        pairs = list(itertools.pairwise(widths))
        self.convolutions = nnx.List([nnx.Conv(a, b, (3, 3), use_bias=False, rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([nnx.BatchNorm(b, rngs=rngs) for _, b in pairs])
        self.body = nnx.Linear(3 * 3 * 128, 128, rngs=rngs)
        self.head = nnx.Linear(128, outputs, rngs=rngs) if outputs else None

    def features(self, x):
        x = x.astype("float32") / 127.5 - 1
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.max_pool(nnx.relu(norm(convolution(x))), (2, 2), (2, 2))
        return nnx.relu(self.body(x.reshape(len(x), -1)))

    def __call__(self, x):
        return self.features(x) if self.head is None else self.head(self.features(x))
