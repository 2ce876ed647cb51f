"""What ``probe`` and ``score`` share: features of images from one pass of a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transferjax.cli._arguments import count
from transferjax.cli._console import progress
from transferjax.cli._model import _imported, _parameters, load_model

BATCH = 100
"""Images in one forward pass."""
RAW = 32
"""Larger images are brought to so many pixels before their values are taken as features."""


def add_source(group: Any) -> None:
    """The options that say which images are looked at."""
    group.add_argument(
        "--data", metavar="SPEC", required=True, help="'sample', 'folder:PATH' (one sub-folder per class), or TFDS"
    )
    group.add_argument("--data-dir", metavar="DIR", help="where TFDS keeps its data sets")
    group.add_argument("--split", default="train", help="part of the data to learn from (train)")
    group.add_argument("--size", type=count, metavar="PIXELS", help="side of the images (the model's own)")


def features_of(name: str, weights: str, size: int | None, source: Any, layers: str | None = None) -> Any:
    """A ``FeatureTable`` of a network without its classifier, and of its layers where they are asked for.

    Args:
      name: of the zoo, or ``module:function``.
      weights: a path, ``"auto"`` or ``"none"``.
      size: pixels of a side; ``None``: the model's own.
      source: the images.
      layers: a glob of module paths.
    """
    model, _ = load_model(name, weights, num_classes=0, size=size)
    return _extracted(model, size, source, name, layers)


def class_probabilities(name: str, size: int | None, source: Any) -> Any:
    """A ``FeatureTable`` whose ``outputs`` are what a network's own classes are of every image, ``[N, Z]`` float32.

    Args:
      name: of the zoo, or ``module:function``.
      size: pixels of a side; ``None``: the model's own.
      source: the images.

    Returns:
      ``None`` where the network has no classes of its own: its outputs are features.
    """
    import jax
    import numpy as np

    import transferjax as tj

    model = _classifier(name, size)
    if model is None:
        return None
    found = _extracted(model, size, source, name)
    outputs = jax.nn.softmax(found["outputs"].astype(np.float32), axis=-1)
    return tj.features.FeatureTable({"outputs": np.asarray(outputs)}, found.ids, found.labels)


def _classifier(name: str, size: int | None) -> Any:
    """A network with the classes it comes with. A function has some where ``num_classes=0`` leaves them out."""
    import numpy as np

    import transferjax as tj

    if ":" in name:
        classes = _parameters(_imported(name)).get("num_classes")
        if classes is None or classes.default is classes.empty:
            return None
    model, _ = load_model(name, "auto", size=size)
    if ":" not in name:
        return model
    bare, _ = load_model(name, "auto", num_classes=0, size=size)
    shapes = [{path: np.shape(leaf) for path, leaf in tj.paths(one.params).items()} for one in (model, bare)]
    return None if shapes[0] == shapes[1] else model


def raw_features(source: Any) -> Any:
    """The pixels themselves, which every network has to beat."""
    import transferjax as tj

    shape = source.image_shape()
    size = RAW if shape is None or shape[0] * shape[1] > RAW * RAW else None
    return tj.features.raw_inputs(tj.data.batches(source, BATCH, shuffle=False, drop_remainder=False, size=size))


def _extracted(model: Any, size: int | None, source: Any, name: str, layers: str | None = None) -> Any:
    import transferjax as tj

    model = model if model.preprocess is None else tj.data.on_images(model, size)
    batches = tj.data.batches(source, BATCH, shuffle=False, drop_remainder=False, preprocess=model.preprocess)
    return tj.features.extract(model, _shown(batches, name), at=layers)


def _shown(batches: Any, name: str) -> Iterator[Any]:
    shown = progress("features")
    shown.start(name, len(batches))
    for done, batch in enumerate(batches, 1):
        yield batch
        shown.advance(done, {})
    shown.finish()
