"""Source: labelled examples with random access, and what every kind of data set has to offer for that."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from transferjax._errors import DataError, describe, listing
from transferjax._report import Report

Example = dict[str, Any]
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
)  # what Pillow and ArrayRecord raise for damaged data


class CorruptExampleError(DataError):
    """One example cannot be decoded.

    Attributes:
      index: its position in the data set.
      where: the file or the id that names it.
    """

    def __init__(self, message: str, *, index: int, where: str):
        super().__init__(message)
        self.index = index
        self.where = where


def corrupt(index: int, where: str, cause: BaseException) -> CorruptExampleError:
    """The error for an example that cannot be decoded."""
    return CorruptExampleError(
        f"{where} cannot be decoded ({type(cause).__name__}: {cause}). Replace or remove it, "
        f"or pass on_error='skip' to batches to go on without such examples.",
        index=index,
        where=where,
    )


class Records(Protocol):
    """A whole data set (all its splits, one after the other) with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def labels(self, indices: np.ndarray) -> np.ndarray: ...

    def ids(self, indices: np.ndarray) -> np.ndarray: ...

    def where(self, index: int) -> str: ...

    def shape(self) -> tuple[int, ...] | None: ...

    def fingerprint(self) -> str: ...


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Source:
    """Labelled examples with random access: ``source[i]`` is ``{"image": uint8 [H, W, C], "label": int, "id": int}``.

    Data without images has its own features in the place of ``image``. An ``id`` belongs to the example, not to its
    position: it is the same in every slice of the data set, so a cache by id stays valid.

    Attributes:
      records: the whole data set that this is a part of.
      indices: positions in ``records``.
      class_names: the name of each label, in order; empty when unknown.
      name: what errors call it.

    >>> import numpy as np
    >>> source = arrays_for_doctest(np.zeros((4, 8, 8), np.uint8), [0, 1, 0, 1])
    >>> len(source), source[1]["image"].shape, source[1]["label"], source.take(2).labels().tolist()
    (4, (8, 8, 1), 1, [0, 1])
    """

    records: Records
    indices: np.ndarray
    class_names: tuple[str, ...] = ()
    name: str = "source"
    decoded: dict = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self):,} examples; there is none at {index}.")
        return self.records[int(self.indices[index])]

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Source({self.name}: {len(self):,} examples, {len(self.class_names)} class names)"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "decoded": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    def labels(self) -> np.ndarray:
        """All labels ``[N]`` (int32 for classes), without decoding an image."""
        return self.records.labels(self.indices)

    def ids(self) -> np.ndarray:
        """All ids ``[N] int64``, without decoding an image."""
        return self.records.ids(self.indices)

    def image_shape(self) -> tuple[int, ...] | None:
        """``(H, W, C)`` when all images of the data set are known to have it, else ``None``; ``()`` without images."""
        return self.records.shape()

    def where(self, index: int) -> str:
        """The file or id by which a person finds example ``index``."""
        return self.records.where(int(self.indices[index]))

    def take(self, count: int) -> Source:
        """The first ``count`` examples (all, when there are fewer)."""
        return self.subset(range(min(count, len(self))))

    def subset(self, indices: Sequence[int] | np.ndarray) -> Source:
        """The examples at these positions, in this order.

        Raises:
          DataError: a position lies outside the source.
        """
        chosen = np.asarray(indices, np.int64).reshape(-1)
        outside = chosen[(chosen < 0) | (chosen >= len(self))]
        if outside.size:
            raise DataError(f"{self.name} has {len(self):,} examples; there is none at {outside[0]}.")
        return dataclasses.replace(self, indices=self.indices[chosen])

    def fingerprint(self) -> str:
        """A short text that is the same as long as the content is; cheap, and independent of where the data lie."""
        digest = hashlib.sha256(self.records.fingerprint().encode())
        digest.update(np.ascontiguousarray(self.indices, np.int64).tobytes())
        return digest.hexdigest()[:16]


def whole(records: Records, class_names: Sequence[str], name: str) -> Source:
    """All examples of ``records``."""
    return Source(records, np.arange(len(records)), tuple(class_names), name)


def arrays_for_doctest(images: np.ndarray, labels: Sequence[int]) -> Source:
    """A source for examples in docstrings of this file."""
    from transferjax.data._arrays import arrays

    return arrays(images, np.asarray(labels))


def check_labels(source: Source, labels: np.ndarray, ids: np.ndarray, num_classes: int | None = None) -> None:
    """Raise when an integer label is negative or not below the number of classes; the id is named.

    Raises:
      DataError: a label lies outside the classes.
    """
    count = num_classes if num_classes is not None else len(source.class_names)
    if not count or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        return
    outside = np.flatnonzero((labels < 0) | (labels >= count))
    if outside.size:
        first = outside[0]
        raise DataError(
            f"{source.name}: the example with id {ids[first]} has label {labels[first]}; expected 0 to {count - 1} "
            f"({count} classes). {outside.size} of {labels.size} labels lie outside."
        )


def check_classes(source: Source, num_classes: int | None = None) -> Report:
    """Count the examples of each class; a data set that cannot teach a classifier raises.

    Args:
      source: a source with integer labels; no image is decoded.
      num_classes: the number of classes, when ``source.class_names`` is empty or does not say it.

    Returns:
      A Report with one row per class: its label, name and number of examples.

    Raises:
      DataError: no example, labels that are no integers, fewer than two classes with examples, or a label outside
        the classes.

    >>> import numpy as np
    >>> print(check_classes(arrays_for_doctest(np.zeros((3, 8, 8), np.uint8), [0, 1, 1])))
    Classes of arrays
    label  name  examples
    -----  ----  --------
        0               1
        1               2
    """
    check_empty(source)
    labels = source.labels()
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{source.name} has labels that are no integers but {describe(labels)}. Expected one class number per "
            "example; targets of a regression have no classes to count."
        )
    check_labels(source, labels, source.ids(), num_classes)
    found = np.unique(labels)
    if found.size < 2:
        raise DataError(
            f"{source.name} has one class only: all {len(source):,} examples have label {found[0]}"
            f"{_called(source, found)}. Expected at least two classes; "
            "a slice of a data set sorted by class looks like this."
        )
    total = max(num_classes or 0, len(source.class_names), int(found.max()) + 1)
    counts = np.bincount(labels, minlength=total)
    names = (*source.class_names, *[""] * (total - len(source.class_names)))
    rows = tuple((label, name, int(count)) for label, (name, count) in enumerate(zip(names, counts)))
    return Report(f"Classes of {source.name}", ("label", "name", "examples"), rows)


def check_empty(source: Source) -> None:
    """Raise when there is no example.

    Raises:
      DataError: the source is empty.
    """
    if not len(source):
        raise DataError(f"{source.name} is empty: expected at least one example.")


def _called(source: Source, found: np.ndarray) -> str:
    names = [source.class_names[label] for label in found if label < len(source.class_names)]
    return f" ({listing(names)})" if names else ""
