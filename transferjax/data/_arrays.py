"""Arrays in memory as a Source."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transferjax._errors import DataError, describe
from transferjax.data._source import Example, Source, check_labels, whole

_SAMPLED_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayRecords:
    """Features by name, each ``[N, ...]``."""

    features: Mapping[str, Any]
    all_labels: np.ndarray
    all_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.all_labels)

    def __getitem__(self, index: int) -> Example:
        label = self.all_labels[index]
        features = {name: _row(value, index) for name, value in self.features.items()}
        return {
            **features,
            "label": int(label) if _is_class(self.all_labels) else label,
            "id": int(self.all_ids[index]),
        }

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self.all_labels[indices]

    def ids(self, indices: np.ndarray) -> np.ndarray:
        return self.all_ids[indices]

    def where(self, index: int) -> str:
        return f"the example with id {self.all_ids[index]}"

    def shape(self) -> tuple[int, ...] | None:
        return self.features["image"].shape[1:] if "image" in self.features else ()

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(_leaves(self.features).items()):
            digest.update(f"{name} {describe(value)}".encode())
            digest.update(np.ascontiguousarray(_sample(value)).data)
        digest.update(np.ascontiguousarray(self.all_labels).data)
        digest.update(np.ascontiguousarray(self.all_ids).data)
        return digest.hexdigest()


def arrays(
    images: Any,
    labels: Any,
    ids: Any = None,
    class_names: Sequence[str] = (),
    *,
    name: str = "arrays",
) -> Source:
    """Arrays in memory as a Source.

    Args:
      images: ``[N, H, W] uint8`` or ``[N, H, W, C] uint8``. Arrays of another shape or type, and dicts of arrays
        (passed to the model as keywords), are taken as ``inputs`` as they are.
      labels: ``[N]`` integers (classes), or ``[N, ...]`` of any type (targets).
      ids: ``[N]`` integers that name the examples; by default their positions.
      class_names: the name of each label, in order.
      name: what errors call it.

    Returns:
      A Source whose examples have ``image`` (or ``inputs``), ``label`` and ``id``.

    Raises:
      DataError: the arrays differ in length, are empty, ids repeat, or an integer label has no class name.

    >>> source = arrays(np.zeros((2, 28, 28), np.uint8), [3, 1], class_names="abcd")
    >>> source[0]["image"].shape, source[0]["label"], source.class_names[3]
    ((28, 28, 1), 3, 'd')
    """
    features = _features(images)
    targets = np.asarray(labels)
    if np.issubdtype(targets.dtype, np.integer) and targets.ndim == 1:
        targets = targets.astype(np.int32)
    names = np.arange(len(targets), dtype=np.int64) if ids is None else np.asarray(ids, np.int64)
    _check_lengths({**_leaves(features), "labels": targets, "ids": names}, name)
    if len(np.unique(names)) != len(names):
        raise DataError(f"{name}: ids repeat ({len(np.unique(names)):,} different ones for {len(names):,} examples).")
    source = whole(ArrayRecords(features, targets, names), class_names, name)
    check_labels(source, targets, names)
    return source


def from_mapping(data: Mapping[str, Any]) -> Source:
    """``{"image": ..., "label": ..., "id": ..., "class_names": ...}`` as a Source.

    Raises:
      DataError: there is no label, or nothing to learn it from.
    """
    plural = {"images": "image", "labels": "label", "ids": "id"}
    fields = {plural.get(key, key): value for key, value in data.items()}
    labels, ids, names = fields.pop("label", None), fields.pop("id", None), fields.pop("class_names", ())
    if labels is None or not fields:
        found = ", ".join(map(repr, data)) or "nothing"
        raise DataError(f"a dict of arrays needs 'label' and 'image' (or 'inputs'); it has {found}.")
    inputs = next(iter(fields.values())) if set(fields) in ({"image"}, {"inputs"}) else fields
    return arrays(inputs, labels, ids, names)


def _features(images: Any) -> dict[str, Any]:
    if isinstance(images, Mapping):
        return {"inputs": {key: np.asarray(value) for key, value in images.items()}}
    value = np.asarray(images)
    if value.dtype == np.uint8 and value.ndim in (3, 4):
        return {"image": value[..., None] if value.ndim == 3 else value}
    return {"inputs": value}


def _leaves(features: Mapping[str, Any]) -> dict[str, np.ndarray]:
    inputs = features.get("inputs")
    return dict(inputs) if isinstance(inputs, Mapping) else dict(features)


def _check_lengths(leaves: Mapping[str, np.ndarray], name: str) -> None:
    scalar = [key for key, value in leaves.items() if value.ndim == 0]
    if scalar:
        raise DataError(f"{name}: '{scalar[0]}' is a single value; expected an array with one entry per example.")
    lengths = {key: len(value) for key, value in leaves.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{name}: arrays differ in length: {', '.join(f'{k} {n:,}' for k, n in lengths.items())}.")
    if not lengths["labels"]:
        raise DataError(f"{name} is empty: expected at least one example.")


def _row(value: Any, index: int) -> Any:
    return {key: leaf[index] for key, leaf in value.items()} if isinstance(value, Mapping) else value[index]


def _is_class(labels: np.ndarray) -> bool:
    return labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)


def _sample(value: np.ndarray) -> np.ndarray:
    """The whole array, or when it is large every k-th example of it: 64 MiB are hashed at most."""
    return value[:: max(1, -(-value.nbytes // _SAMPLED_BYTES))]
