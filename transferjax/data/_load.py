"""Rows of a source as one batch: decoded, brought to one size, stacked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from transferjax._errors import DataError, describe, nearest_hint
from transferjax.data._image import resize
from transferjax.data._source import Example, Source, check_labels

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Load:
    """Rows of a source to a batch: decode, bring to one size, stack; what is decoded once is kept when it is small."""

    source: Source
    size: tuple[int, int] | None
    interpolation: str
    keep: tuple[str, ...]
    num_classes: int | None
    cached: bool
    held: Callable[[np.ndarray], bool] | None = None

    def example(self, row: int) -> Example:
        """One example, its image already at the common size."""
        place = (self.size, self.interpolation, int(self.source.indices[row]))
        found = self.source.decoded.get(place)
        if found is not None:
            return found
        example = self.source[row]
        if "image" in example and self.size is not None:
            example["image"] = resize(example["image"], self.size, self.interpolation)
        if self.cached:
            self.source.decoded[place] = example
        return example

    def __call__(self, rows: np.ndarray) -> Batch:
        if self.held is not None:
            ids = np.asarray(self.source.records.ids(self.source.indices[rows]), np.int64)
            if self.held(ids):
                return {"id": ids}
        examples = [self.example(int(row)) for row in rows]
        ids = np.asarray([e["id"] for e in examples], np.int64)
        labels = _labels([e["label"] for e in examples])
        check_labels(self.source, labels, ids, self.num_classes)
        batch = {"inputs": _inputs(self.source, examples, self.keep), "labels": labels, "id": ids}
        extra = (*self.keep, *(("weight",) if "weight" in examples[0] else ()))
        return {**batch, **{name: _stack(self.source, examples, name) for name in extra}}


def _labels(labels: list[Any]) -> np.ndarray:
    stacked = np.asarray(labels)
    return stacked.astype(np.int32 if np.issubdtype(stacked.dtype, np.integer) else np.float32)


def _inputs(source: Source, examples: list[Example], keep: tuple[str, ...]) -> Any:
    if "image" in examples[0]:
        return _stack(source, examples, "image")
    if "inputs" not in examples[0]:
        names = [name for name in examples[0] if name not in ("label", "id", "weight", *keep)]
        return {name: _stack(source, examples, name) for name in names}
    if isinstance(examples[0]["inputs"], Mapping):
        rows = [e["inputs"] for e in examples]
        return {name: _stack(source, rows, name) for name in rows[0]}
    return _stack(source, examples, "inputs")


def _stack(source: Source, examples: list[Example], name: str) -> np.ndarray:
    if name not in examples[0]:
        raise DataError(f"{source.name} has no feature '{name}'.{nearest_hint(name, examples[0])}")
    values = [np.asarray(e[name]) for e in examples]
    other = next((v for v in values if v.shape != values[0].shape), None)
    if other is not None:
        raise DataError(
            f"{source.name}: '{name}' differs in shape between examples: {describe(values[0])} and {describe(other)}. "
            "Pass size=(height, width) for images; bring other features to one shape first."
        )
    if values[0].dtype.kind not in "biufc":
        raise DataError(f"{source.name}: '{name}' holds text ({values[0].dtype}); expected numbers. Encode it first.")
    return np.stack(values)
