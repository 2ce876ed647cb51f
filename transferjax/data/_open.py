"""One verb for every kind of data set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transferjax._errors import DataError, describe, listing
from transferjax.data._arrays import arrays, from_mapping
from transferjax.data._folder import image_folder
from transferjax.data._source import Source
from transferjax.data._splits import select
from transferjax.data._tfds import named, prepared

SAMPLE = Path(__file__).resolve().parent / "sample" / "prepared"


def open(spec: Any, split: str = "train", data_dir: str | os.PathLike | None = None) -> Source:
    """Open a data set.

    Args:
      spec: one of
        ``"sample"``: 1,000 training and 2,000 test images of Fashion-MNIST, which come with the library;
        ``"folder:PATH"``: images in one sub-folder per class (see :func:`image_folder`);
        a directory that TFDS has prepared as ArrayRecord, or the name of a data set of TFDS that is prepared in
        ``data_dir`` (nothing is downloaded, and TensorFlow is not needed);
        ``(images, labels)`` or ``{"image": ..., "label": ...}`` of arrays, or a dict with one of these per split.
      split: the split, with slices as in TFDS: ``train``, ``train[:80%]``, ``train[100:200]+test``, ``all``.
      data_dir: where TFDS keeps its data sets; by default where TFDS says.

    Returns:
      A Source.

    Raises:
      DataError: an unknown spec or split (the nearest is named), or data in another form.

    >>> source = open("sample", "train[:80%]")
    >>> source
    Source(sample: 800 examples, 10 class names)
    >>> source[0]["image"].shape, source.class_names[source[0]["label"]]
    ((28, 28, 1), 'Shirt')
    """
    if isinstance(spec, Source):
        raise DataError("open was given a Source already; use its take or subset.")
    if isinstance(spec, (tuple, list, Mapping)):
        return _arrays(spec, split)
    if not isinstance(spec, (str, os.PathLike)):
        raise DataError(f"a data set is a text or arrays (images, labels); got {describe(spec)}.")
    text = os.fspath(spec)
    if text == "sample":
        return prepared(SAMPLE, split, "sample")
    if text.startswith("folder:"):
        return image_folder(text.removeprefix("folder:"), split)
    path = Path(text).expanduser()
    if path.is_dir():
        return prepared(_prepared_directory(path), split)
    if isinstance(spec, os.PathLike) or text.startswith((".", "/", "~")):
        raise DataError(f"there is no directory {path}.")
    return named(text, split, None if data_dir is None else os.fspath(data_dir))


def _arrays(spec: Any, split: str) -> Source:
    if isinstance(spec, Mapping) and spec and all(isinstance(part, (tuple, Mapping)) for part in spec.values()):
        return _arrays_by_split(spec, split)
    if isinstance(spec, Mapping):
        source = from_mapping(spec)
    elif len(spec) in (2, 3):
        source = arrays(*spec)
    else:
        raise DataError(f"arrays are given as (images, labels) or (images, labels, ids); got {len(spec)} values.")
    return source.subset(select(split, {"train": len(source)}, source.name))


def _arrays_by_split(spec: Mapping[str, Any], split: str) -> Source:
    name, bracket, rest = split.partition("[")
    if name not in spec:
        select(name, dict.fromkeys(spec, 1), "arrays")
        raise DataError(f"split '{split}' joins arrays of several splits; open each and join the arrays yourself.")
    return _arrays(spec[name], f"train{bracket}{rest}")


def _prepared_directory(path: Path) -> Path:
    """The directory itself, or the one prepared data set below it (``NAME/VERSION``)."""
    if (path / "dataset_info.json").exists():
        return path
    below = sorted(p.parent for depth in ("*", "*/*", "*/*/*") for p in path.glob(f"{depth}/dataset_info.json"))
    if len(below) == 1:
        return below[0]
    if below:
        raise DataError(f"{path} holds {len(below)} prepared data sets; name one: {listing(list(map(str, below)))}.")
    raise DataError(
        f"{path} is no data set prepared by TFDS (no dataset_info.json). "
        f"For images in class folders write 'folder:{path}'."
    )
