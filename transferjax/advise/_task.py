"""What can be known of a task and a source before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from transferjax import features, scores
from transferjax._errors import DataError, describe
from transferjax._report import Report
from transferjax.advise._candidate import Candidate
from transferjax.advise._evidence import SCORES, Task

RAW = "raw"
MOST = 2000
"""Examples on which all layers are looked at; more of them would take minutes and hardly say more."""
LEAST = 4
"""Examples below which nothing can be read out of a part of the data set."""


def describe_task(
    candidates: Mapping[str, Candidate],
    labels: Any,
    *,
    target: str = "",
    modality: str = "image",
    seed: int = 0,
    data: str = "",
) -> tuple[Task, ...]:
    """What is known of each source before anything is fine-tuned: one row per source.

    The probe is ridge regression with exact leave-one-out, on all examples, on half and on a quarter of them (its
    learning curve); of several layers, Head2Toe on left-out folds of at most 2,000 examples. Advice rests on these;
    the scores are shown beside them.

    Args:
      candidates: by name; ``raw`` are the inputs themselves.
      labels: classes, integers ``[N]``.
      target: the task's name; modality: ``image`` or ``text``; seed: of the draw; data: the data set it is drawn from.

    Raises:
      DataError: features and labels do not fit, a feature is not finite, or there are fewer than two classes
        or eight examples.

    >>> x = np.random.default_rng(0).normal(size=(40, 3))
    >>> table = features.FeatureTable({"outputs": x}, np.arange(40))
    >>> [task] = describe_task({"net": Candidate(table)}, (x[:, 0] > 0).astype(int))
    >>> task.labels, task.classes, task.probe > 0.8
    (40, 2, True)
    """
    codes = _codes(labels)
    return tuple(
        _one(name, candidate, codes, target=target, modality=modality, seed=seed, data=data)
        for name, candidate in candidates.items()
    )


def statistics(raw: features.FeatureTable, modality: str) -> Report:
    """What a data set is like: examples, classes and their balance; pixels, or tokens of texts.

    Args:
      raw: of ``features.raw_inputs`` or, of texts, ``features.bag_of_tokens``; with labels.
      modality: ``text``, or anything else for numbers.

    >>> table = features.FeatureTable({"inputs": np.array([[0.0], [4.0]])}, np.arange(2), np.array([0, 1]))
    >>> dict(statistics(table, "image").rows)["mean of the inputs"]
    2.0
    """
    x = raw.arrays[next(iter(raw.arrays))].reshape(len(raw), -1)
    _, counts = np.unique(np.asarray(raw.labels), return_counts=True)
    rows: list[tuple[str, float]] = [("examples", len(raw)), ("classes", len(counts))]
    rows += [("examples of the smallest class", int(counts.min())), ("of the largest", int(counts.max()))]
    if modality == "text":
        tokens = np.expm1(x.astype(np.float64))
        rows += [("tokens per text", float(tokens.sum(axis=1).mean()))]
        rows += [("distinct tokens per text", float((tokens > 0.5).sum(axis=1).mean()))]
    else:
        rows += [("numbers per input", x.shape[1]), ("mean of the inputs", float(x.mean(dtype=np.float64)))]
        rows += [("deviation of the inputs", float(x.std(dtype=np.float64)))]
    return Report("Data set", ("quantity", "value"), tuple(rows))


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
    for layer, array in table.arrays.items():
        if not np.isfinite(array).all():
            row = np.flatnonzero(~np.isfinite(array).reshape(len(codes), -1).all(axis=1))[0]
            raise DataError(f"'{name}' has features '{layer}' that are not finite, of the example {table.ids[row]}.")
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
    """The share of right answers on left-out examples, that of the largest class at least; ``None`` where a part has
    too little to learn from."""
    counts = np.bincount(codes[rows])
    counts = counts[counts > 0]
    if len(rows) < len(codes) and (len(rows) < LEAST or len(counts) < 2 or counts.min() < 2):
        return None
    found = features.ridge(x[rows], np.unique(codes[rows], return_inverse=True)[1])
    # Left out, an example makes its own class the rarer one: noise is told worse than by chance, but is not worth less.
    return max(next(float(row[-2]) for row in found.report.rows if row[-1]), float(counts.max() / len(rows)))


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
