"""The best pairing of two lists, and how far behind it the next best lies."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

MARGIN = 0.05
"""A pairing whose best rival is nearer than this is a tie."""

_FITS = 100.0  # what a pair that fits is worth beside its score
_MOST = 5  # rows of a tie whose pairings are all tried


class Assignment(NamedTuple):
    """Columns by row (``-1``: none), the margin of each row, and the pairings that tie, the best among them.

    ``ties`` is empty when there are too many rows to try them all.
    """

    columns: tuple[int, ...]
    margins: tuple[float, ...]
    ties: tuple[tuple[int, ...], ...]

    @property
    def tied(self) -> tuple[int, ...]:
        """Rows that could as well have another column."""
        return tuple(row for row, margin in enumerate(self.margins) if margin < MARGIN)


def assign(scores: np.ndarray) -> Assignment:
    """Pairs as many rows and columns as fit, with the largest sum of scores.

    Args:
      scores: ``[rows, columns]``, at most 10 in size; ``-inf`` where a pair does not fit.

    Returns:
      An :class:`Assignment`. The margin of a row is the loss of the best pairing in which it has another column.

    >>> import numpy as np
    >>> found = assign(np.array([[1.0, 0.5], [0.5, 0.0]]))
    >>> found.columns, found.tied
    ((0, 1), (0, 1))
    """
    rows, columns = scores.shape
    size = max(16, 1 << (max(rows, columns) - 1).bit_length())  # few sizes, so that few programs are compiled
    # What does not fit is worth as much as a row or a column left alone: such pairs are none.
    full = np.zeros((size, size))
    full[:rows, :columns] = np.where(np.isfinite(scores), scores + _FITS, 0.0)
    chosen = _solve(full)
    real = full[np.arange(size), chosen] > 0
    loss = full[np.arange(size), chosen][:, None] - full[:, chosen]  # row i takes the column of row j
    far = _shortest(loss)
    margins = []
    for row in range(rows):
        others = np.arange(size) != row
        ways = others if real[row] else others & (full[row, chosen] > 0)
        back = np.where(ways, loss[row] + far[:, row], np.inf)
        margins.append(float(max(back.min(), 0.0)))
    picked = tuple(int(c) if one else -1 for c, one in zip(chosen[:rows], real[:rows], strict=True))
    return Assignment(picked, tuple(margins), _ties(scores, picked, margins))


def _ties(scores: np.ndarray, picked: tuple[int, ...], margins: list[float]) -> tuple[tuple[int, ...], ...]:
    rows = [row for row, margin in enumerate(margins) if margin < MARGIN]
    if len(rows) > _MOST:
        return ()
    value = lambda columns: sum(scores[r, c] + _FITS for r, c in enumerate(columns) if c >= 0)
    best, found = value(picked), []
    for order in dict.fromkeys(itertools.permutations([picked[row] for row in rows])):
        columns = list(picked)
        for row, column in zip(rows, order, strict=True):
            columns[row] = column
        if value(columns) > best - MARGIN:
            found.append(tuple(columns))
    return tuple(found)


def _solve(full: np.ndarray) -> np.ndarray:
    rows, columns = _hungarian()(jnp.asarray(-full, jnp.float32))
    out = np.zeros(len(full), int)
    out[np.asarray(rows)] = np.asarray(columns)
    return out


@functools.cache
def _hungarian() -> Any:
    return jax.jit(optax.assignment.hungarian_algorithm)


def _shortest(loss: np.ndarray) -> np.ndarray:
    """The least loss of a chain from each row to each other; none is negative around, the pairing being the best."""
    far = loss.copy()
    np.fill_diagonal(far, 0.0)
    for middle in range(len(far)):
        far = np.minimum(far, far[:, middle, None] + far[None, middle])
    return far
