"""Features of many examples by name, with the ids and labels they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from transferjax._errors import DataError, SelectionError, describe, listing, nearest_hint
from transferjax._report import Report


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureTable:
    """What networks make of examples: one array per layer, one row per example.

    Attributes:
      arrays: ``{name: [N, d] or [N, h, w, c]}``, numpy.
      ids: int64 ``[N]``, no two alike.
      labels: ``[N]`` or ``[N, ...]``, or ``None`` where the batches had none.

    >>> table = FeatureTable({"pooled": np.ones((2, 3), np.float32)}, np.array([4, 7]), np.array([0, 1]))
    >>> table, table["pooled"].shape
    (FeatureTable(2 examples: pooled (2, 3) float32), (2, 3))
    """

    arrays: Mapping[str, np.ndarray]
    ids: np.ndarray
    labels: np.ndarray | None = None

    def __post_init__(self):
        ids = np.asarray(self.ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"ids are {describe(ids)}; expected integers [N], one per example.")
        values, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise DataError(
                f"id {values[counts > 1][0]} stands in the table {counts.max()} times. Expected each example once: "
                "make the batches with epochs=1."
            )
        rows = {**self.arrays, **({} if self.labels is None else {"labels": self.labels})}
        for name, array in rows.items():
            if np.ndim(array) < 1 or len(array) != len(ids):
                raise DataError(f"'{name}' is {describe(array)}; expected {len(ids)} rows, one per id.")
        object.__setattr__(self, "ids", ids.astype(np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        held = listing([f"{name} {describe(array)}" for name, array in self.arrays.items()], 4)
        return f"FeatureTable({len(self):,} examples: {held})"

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise SelectionError(f"there are no features '{name}'.{nearest_hint(str(name), list(self.arrays))}")
        return self.arrays[name]

    def take(self, rows: Any) -> FeatureTable:
        """Some of the examples, by position or by a mask ``[N]``.

        >>> table = FeatureTable({"a": np.arange(3.0)}, np.arange(3))
        >>> table.take([2, 0])["a"].tolist()
        [2.0, 0.0]
        """
        rows = np.asarray(rows)
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return FeatureTable(arrays, self.ids[rows], None if self.labels is None else self.labels[rows])

    def concatenated(self, names: Sequence[str] | None = None) -> np.ndarray:
        """Several layers side by side, ``[N, sum of widths]``; maps are flattened.

        >>> FeatureTable({"a": np.ones((2, 3)), "b": np.ones((2, 1))}, np.arange(2)).concatenated().shape
        (2, 4)
        """
        chosen = [self[name] for name in (self.arrays if names is None else names)]
        if not chosen:
            raise SelectionError("concatenated() got no name of features. Expected at least one.")
        return np.concatenate([array.reshape(len(self), -1) for array in chosen], axis=1)

    def beside(self, other: FeatureTable) -> tuple[FeatureTable, FeatureTable]:
        """This table and another one with the examples that both have, in one order.

        Raises:
          DataError: no id is in both.

        >>> a, b = (FeatureTable({"x": np.array(ids)}, np.array(ids)) for ids in ([1, 2, 3], [3, 4, 1]))
        >>> [part["x"].tolist() for part in a.beside(b)]
        [[1, 3], [1, 3]]
        """
        both, mine, theirs = np.intersect1d(self.ids, other.ids, return_indices=True)
        if not both.size:
            raise DataError(
                f"no example is in both tables: ids {_span(self.ids)} and {_span(other.ids)}. Expected features of the "
                "same data set."
            )
        return self.take(mine), other.take(theirs)

    def report(self) -> Report:
        """One row per array."""
        rows = [
            (name, str(array.shape[1:]), array.dtype.name, array.nbytes // max(len(self), 1))
            for name, array in self.arrays.items()
        ]
        facts = {"examples": len(self), "bytes": sum(array.nbytes for array in self.arrays.values())}
        return Report("Features", ("layer", "shape", "dtype", "bytes per example"), tuple(rows), facts)


def _span(ids: np.ndarray) -> str:
    return f"{ids.min()} to {ids.max()}" if ids.size else "none"


def mean_pool(x: Any) -> Any:
    """The mean over all positions: ``[B, ..., d] -> [B, d]``; what is ``[B, d]`` stays.

    >>> mean_pool(np.ones((2, 4, 4, 3))).shape
    (2, 3)
    """
    return x.mean(axis=tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x


def max_pool(x: Any) -> Any:
    """The maximum over all positions: ``[B, ..., d] -> [B, d]``.

    >>> max_pool(np.ones((2, 5, 3))).shape
    (2, 3)
    """
    return x.max(axis=tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x


def class_token(x: Any) -> Any:
    """The first position of a sequence: ``[B, T, d] -> [B, d]``.

    >>> class_token(np.ones((2, 5, 3))).shape
    (2, 3)
    """
    return x[:, 0] if x.ndim == 3 else mean_pool(x)


def flatten(x: Any) -> Any:
    """All positions side by side: ``[B, ...] -> [B, d]``.

    >>> flatten(np.ones((2, 5, 3))).shape
    (2, 15)
    """
    return x.reshape(x.shape[0], -1)


def attention_pool(x: Any) -> Any:
    """The mean over positions, weighted by how much the first one attends to each: ``[B, T, d] -> [B, d]``.

    The weights are ``softmax(x @ x[:, 0] / sqrt(d))``: attention without projections, the class token its query.

    >>> import jax.numpy as jnp
    >>> attention_pool(jnp.ones((2, 5, 3))).shape
    (2, 3)
    """
    if x.ndim != 3:
        return mean_pool(x)
    import jax
    import jax.numpy as jnp

    weights = jax.nn.softmax(jnp.einsum("btd,bd->bt", x, x[:, 0]) / x.shape[-1] ** 0.5, axis=-1)
    return jnp.einsum("bt,btd->bd", weights, x)


Pool = Callable[[Any], Any]
