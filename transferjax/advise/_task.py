"""What can be known of a task and a source before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from transferjax import features, scores
from transferjax._errors import DataError, describe
from transferjax.advise._candidate import Candidate
from transferjax.advise._evidence import SCORES, Task

RAW = "raw"
MOST = 2000
"""Examples on which all layers are looked at; more of them would take minutes and hardly say more."""
LEAST = 4
"""Examples below which nothing can be read out of a part of the data set."""


def describe_task(
    candidates: Mapping[str, Candidate], labels: Any, *, target: str = "", modality: str = "image", seed: int = 0
) -> tuple[Task, ...]:
    """The facts that advice rests on: one row per source.

    The probe is ridge regression with exact leave-one-out, on all examples, on half and on a quarter of them (its
    learning curve); of several layers, Head2Toe on left-out folds of at most 2,000 examples; and an ensemble of scores.

    Args:
      candidates: by name; ``raw`` are the inputs themselves.
      labels: classes, integers ``[N]``.
      target: the task's name; modality: ``image`` or ``text``; seed: of the draw.

    Raises:
      DataError: features and labels do not fit, or there are fewer than two classes, or fewer than eight examples.

    >>> x = np.random.default_rng(0).normal(size=(40, 3))
    >>> table = features.FeatureTable({"outputs": x}, np.arange(40))
    >>> [task] = describe_task({"net": Candidate(table)}, (x[:, 0] > 0).astype(int))
    >>> task.labels, task.classes, task.probe > 0.8
    (40, 2, True)
    """
    codes = _codes(labels)
    return tuple(
        _one(name, candidate, codes, target=target, modality=modality, seed=seed)
        for name, candidate in candidates.items()
    )


def _codes(labels: Any) -> np.ndarray:
    values = np.asarray(labels)
    if labels is None or values.ndim != 1 or values.dtype.kind not in "iu":
        raise DataError(
            f"labels are {describe(labels)}; expected classes, integers [N]: advice compares shares of right answers. "
            "For several labels or numbers, compare read-outs of transferjax.features."
        )
    names, codes = np.unique(values, return_inverse=True)
    if len(names) < 2 or len(values) < 2 * LEAST:
        raise DataError(
            f"the data set has {len(values)} examples of {len(names)} classes. Expected at least {2 * LEAST} examples "
            "and two classes to learn from."
        )
    return codes


def _one(name: str, candidate: Candidate, codes: np.ndarray, **facts: Any) -> Task:
    table = candidate.features
    if len(table) != len(codes):
        raise DataError(f"'{name}' has features of {len(table)} examples, and there are {len(codes)} labels.")
    last = table.arrays[list(table.arrays)[-1]].reshape(len(codes), -1)
    order = _in_turn(codes)
    part = lambda share: _probe(last, codes, order[: round(share * len(codes))])
    measured = {score: _score(score, last, codes) for score in SCORES}
    return Task(
        source=name,
        labels=len(codes),
        classes=int(codes.max()) + 1,
        parameters=candidate.parameters or 0,
        width=last.shape[1],
        probe=_probe(last, codes, order) or 0.0,
        layers=_layers(table, codes),
        quarter=part(0.25),
        half=part(0.5),
        **measured,
        **facts,
    )


def _in_turn(codes: np.ndarray) -> np.ndarray:
    """Rows such that every beginning of them has its share of each class."""
    place = np.zeros(len(codes))
    for code in np.unique(codes):
        mine = np.flatnonzero(codes == code)
        place[mine] = (np.random.default_rng(0).permutation(len(mine)) + 0.5) / len(mine)
    return np.argsort(place, kind="stable")


def _probe(x: np.ndarray, codes: np.ndarray, rows: np.ndarray) -> float | None:
    """The share of right answers on left-out examples; ``None`` where there is too little to learn from."""
    if len(rows) < LEAST or len(np.unique(codes[rows])) < 2:
        return None
    found = features.ridge(x[rows], np.unique(codes[rows], return_inverse=True)[1])
    return next(float(row[-2]) for row in found.report.rows if row[-1])


def _layers(table: features.FeatureTable, codes: np.ndarray) -> float | None:
    if len(table.arrays) < 2 or np.bincount(codes[_in_turn(codes)[:MOST]]).min() < 2:
        return None
    rows = np.sort(_in_turn(codes)[:MOST])
    part, folds = table.take(rows), int(min(5, np.bincount(codes[rows]).min()))
    return float(features.head2toe(part, codes[rows], folds=folds).report.metadata["left-out accuracy"])


def _score(name: str, x: np.ndarray, codes: np.ndarray) -> float | None:
    try:
        return getattr(scores, name)(x, codes)
    except DataError:  # a class with one example: the others still tell something
        return None
