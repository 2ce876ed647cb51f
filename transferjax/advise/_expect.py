"""What a strategy can be expected to give: the evidence on tasks like this one."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from transferjax.advise._evidence import Evidence, Run, Task

FLOOR = 0.005
"""Shares of wrong answers are compared above this, about one in two hundred."""
DESCRIPTORS = {"labels": 1.0, "error": 2.0, "layers": 0.35}
"""What a task is described by, and how unlike it may be before the weight of its evidence falls to .6: decades of
labels, the logarithm of the error of the source's best read-out, and of how much all layers gain over the last."""
PARAMETERS, STEPS = 0.5, 0.5
"""The same for decades of a network's size and doublings of steps."""
PRIOR = 0.5
"""Slopes are held to zero as if by so many runs at a width's distance."""
SPREAD = 0.3
"""Of the logarithm of an error, where nothing is known: it counts as one run."""
LEAST = 1e-3
"""Evidence of less weight than this, in all, is none.

Which descriptors there are, and the numbers above, were chosen by the error of what was expected on the first draw of
the package's tasks, each left out in turn.
"""


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What can be done with a source."""

    road: str
    tuning: str
    features: str
    optimizer: str


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the evidence says of a strategy.

    Attributes:
      accuracy: expected share of right answers; low, high: one standard deviation around it, of the evidence and of
        what was counted on the task itself.
      rate: the learning rate of the runs that weigh most.
      weight: of all runs that speak for it.
      runs: those that weigh most.
    """

    accuracy: float
    low: float
    high: float
    rate: float
    weight: float
    runs: tuple[Run, ...]


def strategies(evidence: Evidence) -> tuple[Strategy, ...]:
    """Every strategy that was ever tried."""
    return tuple(dict.fromkeys(_of(run) for run in evidence.runs))


def _of(run: Run) -> Strategy:
    return Strategy(run.road, run.tuning, run.features, run.optimizer)


def reference(task: Task, strategy: Strategy) -> float | None:
    """The left-out accuracy that a strategy is compared with.

    That of the features it reads, or for fine-tuning the best that the source's features give unchanged.
    """
    if strategy.road == "features":
        return task.layers if strategy.features == "all layers" else task.probe
    return max(task.probe, task.layers or 0.0)


class Table:
    """The evidence, ready to be asked; one row per run whose task is known.

    Of several runs that differ in the rate only, the best one counts: that is the rate that is recommended.
    """

    def __init__(self, evidence: Evidence):
        tasks = {(task.target, task.source): task for task in reversed(evidence.tasks)}
        tasks |= {(task.target, task.seed, task.source): task for task in evidence.tasks}
        best: dict[Strategy, dict[Any, tuple[Run, Task]]] = {}
        self.unknown = 0
        for run in evidence.runs:
            source = "raw" if run.source == "none" else run.source
            task = tasks.get((run.target, run.seed, source), tasks.get((run.target, source)))
            if task is None:
                self.unknown += 1
                continue
            found, key = best.setdefault(_of(run), {}), (run.target, run.seed, run.source, run.steps)
            if key not in found or run.accuracy > found[key][0].accuracy:
                found[key] = run, task
        self.rows = {strategy: list(found.values()) for strategy, found in best.items()}
        self.sizes = [math.log10(task.parameters) for task in evidence.tasks if task.parameters]
        self.modalities = {task.modality for task in evidence.tasks}

    @functools.cache  # noqa: B019  (a table lives as long as one advice)
    def _arrays(self, strategy: Strategy, modality: str, layers: bool) -> _Rows | None:
        """The runs of a strategy; on the asker's modality where there is evidence of it."""
        rows = self.rows.get(strategy, [])
        if modality in self.modalities:
            rows = [row for row in rows if row[1].modality == modality]
        kept = rows if layers else [(run, dataclasses.replace(task, layers=None)) for run, task in rows]
        kept = [(run, task) for run, task in kept if reference(task, strategy) is not None]
        return _Rows.of(strategy, kept) if kept else None

    def expect(self, task: Task, strategy: Strategy, steps: int, cited: int = 4) -> Expected | None:
        """What a strategy can be expected to give, or ``None`` where nothing like it was measured in so few steps.

        The logarithm of the strategy's error over its reference's is regressed on the descriptors, linearly, each run
        weighing the more the more alike its task is: local ridge regression. Where all layers of the source were not
        looked at, they are left out of the evidence too. More steps, and a larger or smaller network, than any of the
        evidence count as the nearest there is.
        """
        start, rows = reference(task, strategy), self._arrays(strategy, task.modality, task.layers is not None)
        if start is None or rows is None or steps < rows.steps.min():
            return None
        place = _place(task)
        away = (rows.places - place) / list(DESCRIPTORS.values())
        weights = np.exp(-0.5 * (away**2).sum(axis=1))
        taken = min(steps, rows.steps.max())
        weights = weights * np.exp(-0.5 * ((np.log2(rows.steps + 1) - np.log2(taken + 1)) / STEPS) ** 2)
        if task.parameters and strategy.road != "scratch":
            size = np.clip(math.log10(task.parameters), min(self.sizes, default=0), max(self.sizes, default=0))
            weights = weights * np.exp(-0.5 * ((rows.sizes - size) / PARAMETERS) ** 2)
        total = float(weights.sum())
        if total < LEAST:
            return None
        middle, mean = np.average(away, axis=0, weights=weights), np.average(rows.ratios, weights=weights)
        centred = away - middle
        moments = (weights[:, None] * centred).T @ centred + PRIOR * np.eye(len(place))
        slopes = np.linalg.solve(moments, (weights[:, None] * centred).T @ (rows.ratios - mean))
        ratio = float(mean - middle @ slopes)
        left = float(weights @ (rows.ratios - mean - centred @ slopes) ** 2)
        spread = math.sqrt((left + SPREAD**2) / (total + 1) + _doubt(1 - start, task.labels))
        right = lambda ratio: 1 - min(1.0, max(0.0, (1 - start + FLOOR) * math.exp(ratio) - FLOOR))
        order = np.argsort(-weights, kind="stable")
        runs = [rows.runs[number] for number in order]
        rate = _rate(runs, weights[order])
        return Expected(right(ratio), right(ratio + spread), right(ratio - spread), rate, total, tuple(runs[:cited]))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The runs of one strategy as arrays ``[R]``, and their tasks' places ``[R, descriptors]``."""

    runs: tuple[Run, ...]
    places: np.ndarray
    ratios: np.ndarray
    sizes: np.ndarray
    steps: np.ndarray

    @staticmethod
    def of(strategy: Strategy, rows: Sequence[tuple[Run, Task]]) -> _Rows:
        return _Rows(
            tuple(run for run, _ in rows),
            np.array([_place(task) for _, task in rows]),
            np.array([_log(1 - run.accuracy) - _log(1 - (reference(task, strategy) or 0)) for run, task in rows]),
            np.array([math.log10(max(task.parameters, 1)) for _, task in rows]),
            np.array([run.steps for run, _ in rows]),
        )


def _doubt(error: float, labels: int) -> float:
    """The variance of the logarithm of an error that was counted on so many examples."""
    error = max(error, 1 / labels)
    return (1 - error) / (error * labels)


def _log(error: float) -> float:
    return math.log(error + FLOOR)


def _place(task: Task) -> np.ndarray:
    """A task's descriptors, in the order of ``DESCRIPTORS``."""
    best = max(task.probe, task.layers or 0.0)
    return np.array([math.log10(task.labels), _log(1 - best), _log(1 - task.probe) - _log(1 - best)])


def _rate(runs: Sequence[Run], weights: np.ndarray) -> float:
    """The rate that has the most weight."""
    total: dict[float, float] = {}
    for run, weight in zip(runs, weights):
        total[run.rate] = total.get(run.rate, 0.0) + float(weight)
    return max(total, key=lambda rate: total[rate])
