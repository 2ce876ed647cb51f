"""Data sets that TFDS has prepared, read as ArrayRecord without TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transferjax._errors import DataError, nearest_hint
from transferjax.data._image import decode
from transferjax.data._source import DAMAGE, Example, Source, corrupt, whole
from transferjax.data._splits import select


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsRecords:
    """All splits of a prepared data set, one after the other; its image is decoded here, by Pillow."""

    builder: Any
    sizes: Mapping[str, int]
    image: str | None
    label: str
    channels: int
    id_feature: str | None

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def __getitem__(self, index: int) -> Example:
        row = dict(self._raw(index))
        label = row.pop(self.label)
        number = int(row.pop(self.id_feature)) if self.id_feature else index
        try:
            image = {"image": decode(row.pop(self.image), self.channels)} if self.image else {}
        except DAMAGE as cause:
            raise corrupt(index, f"id {number}: {self.where(index)}", cause) from cause
        return {**image, **row, "label": int(label) if np.ndim(label) == 0 else np.asarray(label), "id": number}

    def labels(self, indices: np.ndarray) -> np.ndarray:
        values = np.asarray([self._raw(int(i))[self.label] for i in indices])
        return values.astype(np.int32) if np.issubdtype(values.dtype, np.integer) else values

    def ids(self, indices: np.ndarray) -> np.ndarray:
        if self.id_feature is None:
            return np.asarray(indices, np.int64)
        return np.asarray([self._raw(int(i))[self.id_feature] for i in indices], np.int64)

    def where(self, index: int) -> str:
        split, offset = self._split_of(index)
        return f"example {offset} of split '{split}' of {self.builder.info.full_name}"

    def shape(self) -> tuple[int, ...] | None:
        shape = tuple(self.builder.info.features[self.image].shape) if self.image else ()
        return shape if all(shape) else None

    def fingerprint(self) -> str:
        directory = Path(self.builder.data_dir)
        digest = hashlib.sha256(self.builder.info.full_name.encode())
        for file in sorted(directory.glob("*.array_record*")):
            digest.update(f"{file.name}\0{file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(1 << 20))
        return digest.hexdigest()

    def _split_of(self, index: int) -> tuple[str, int]:
        offset = index
        for split, size in self.sizes.items():
            if offset < size:
                return split, offset
            offset -= size
        raise IndexError(f"{self.builder.info.full_name} has {len(self):,} examples; there is none at {index}.")

    def _raw(self, index: int) -> Mapping[str, Any]:
        split, offset = self._split_of(index)
        try:
            return self._open[split][offset]
        except DAMAGE as cause:
            raise corrupt(index, self.where(index), cause) from cause

    @functools.cached_property
    def _open(self) -> dict[str, Any]:
        import tensorflow_datasets as tfds

        skip = {self.image: tfds.decode.SkipDecoding()} if self.image else None
        return {split: self.builder.as_data_source(split=split, decoders=skip) for split in self.sizes}

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_open"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


def prepared(directory: Path, split: str, name: str | None = None) -> Source:
    """A directory that TFDS has prepared (the one with ``dataset_info.json``) as a Source.

    Raises:
      DataError: the directory is not prepared, not as ArrayRecord, or has no such split.
    """
    import tensorflow_datasets as tfds

    _check_format(directory)
    return from_builder(tfds.builder_from_directory(str(directory)), split, name)


def named(name: str, split: str, data_dir: str | None) -> Source:
    """A data set of TFDS by its name, prepared before as ArrayRecord; nothing is downloaded.

    Raises:
      DataError: no such data set, or it is not prepared (the message says how to).
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except DatasetNotFoundError as cause:
        raise DataError(_unknown(name, tfds)) from cause
    directory = Path(builder.data_dir)
    if not (directory / "dataset_info.json").exists():
        place = "" if data_dir is None else f", data_dir={str(data_dir)!r}"
        raise DataError(
            f"data set '{name}' is not prepared in {directory.parent.parent}. Prepare it once with\n"
            f"  tfds.builder('{name}'{place}, file_format='array_record').download_and_prepare()"
        )
    _check_format(directory)
    return from_builder(builder, split, name)


def from_builder(builder: Any, split: str, name: str | None = None) -> Source:
    """All of a prepared builder's splits, and the slice of them that ``split`` names."""
    info = builder.info
    sizes = {key: value.num_examples for key, value in info.splits.items()}
    name = name or str(info.full_name)
    positions = select(split, sizes, name)
    image, label = _keys(info, name)
    channels = (info.features[image].shape[-1] or 3) if image else 0
    records = TfdsRecords(builder, sizes, image, label, channels, _id_feature(info))
    return whole(records, getattr(info.features[label], "names", None) or (), name).subset(positions)


def _keys(info: Any, name: str) -> tuple[str | None, str]:
    """The features that hold the image (``None`` when there is none) and the label."""
    import tensorflow_datasets as tfds

    pair = info.supervised_keys if info.supervised_keys and len(info.supervised_keys) == 2 else (None, "label")
    label = pair[1] if isinstance(pair[1], str) else "label"
    if label not in info.features:
        raise DataError(f"{name} has no feature 'label'. Its features: {', '.join(sorted(info.features))}.")
    candidates = [pair[0] if isinstance(pair[0], str) else "image", "image"]
    images = [k for k in candidates if k in info.features and isinstance(info.features[k], tfds.features.Image)]
    return next((key for key in images if info.features[key].np_dtype == np.uint8), None), label


def _id_feature(info: Any) -> str | None:
    if "id" not in info.features:
        return None
    feature = info.features["id"]
    return "id" if feature.shape == () and np.issubdtype(feature.np_dtype, np.integer) else None


def _check_format(directory: Path) -> None:
    try:
        info = json.loads((directory / "dataset_info.json").read_text())
    except (OSError, ValueError) as cause:
        raise DataError(f"{directory} is no prepared data set: its dataset_info.json cannot be read.") from cause
    kind = info.get("fileFormat", "tfrecord")
    if kind != "array_record":
        raise DataError(
            f"{directory} is prepared as {kind}, which only TensorFlow reads; expected array_record. "
            "Convert it, once, where TensorFlow is installed, with\n"
            f"  tfds convert_format --dataset_dir={directory} --out_file_format=array_record --out_path=NEW_DIRECTORY\n"
            f"or prepare it again: tfds.builder('{info.get('name', 'NAME')}', file_format='array_record')"
            ".download_and_prepare()"
        )


def _unknown(name: str, tfds: Any) -> str:
    builders = tfds.list_builders(with_community_datasets=False)
    return (
        f"'{name}' is no data set. Expected 'sample', 'folder:PATH', a directory that TFDS has prepared, "
        f"or a name of TFDS.{nearest_hint(name, ['sample', *builders])}"
    )
