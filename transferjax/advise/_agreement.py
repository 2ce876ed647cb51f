"""How far the scores can be trusted: their order of the sources against that of the accuracies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from transferjax._errors import DataError
from transferjax._report import Report
from transferjax.advise._evidence import SCORES, Evidence, Task

Order = Sequence[float]


def ranks(tasks: Sequence[Task]) -> dict[str, list[float]]:
    """Per source its rank by each score that all sources have: 1 for the highest, what is equal shares its ranks.

    >>> task = lambda source, logme: Task("a", 0, source, "image", 10, 2, 0, 4, 0.5, logme=logme)
    >>> ranks([task("net", 0.5), task("raw", 0.1)])
    {'net': [1.0], 'raw': [2.0]}
    """
    found: dict[str, list[float]] = {task.source: [] for task in tasks}
    for name in SCORES:
        values = [getattr(task, name) for task in tasks]
        if None not in values:
            for task, value in zip(tasks, values):
                above, equal = sum(other > value for other in values), sum(other == value for other in values)
                found[task.source].append(above + (1 + equal) / 2)
    return found


def score_agreement(evidence: Evidence) -> Report:
    """Kendall's tau between each score and what the sources really gave, on average over tasks and draws.

    Args:
      evidence: runs and tasks of two or more sources each.

    Returns:
      One row per score, and one for the mean of the ranks: tau against the accuracy of the last features read out,
      and against the best that the source reached by fine-tuning all of it. The metadata says over how many draws.

    Raises:
      DataError: no task has two sources with scores.

    >>> from transferjax.advise import evidence
    >>> score_agreement(evidence()).columns
    ('score', 'features read out', 'fine-tuned')
    """
    reached: dict[str, dict[tuple[str, int, str], float]] = {"features": {}, "finetune": {}}
    for run in evidence.runs:
        if (run.road == "features" and run.features != "all layers") or (run.road, run.tuning) == ("finetune", "full"):
            key = (run.target, run.seed, run.source)
            reached[run.road][key] = max(run.accuracy, reached[run.road].get(key, 0.0))
    taus: dict[tuple[str, str], list[float]] = {}
    for tasks in _draws(evidence):
        found = ranks(tasks)
        values = {name: [getattr(task, name) for task in tasks] for name in SCORES}
        values["mean rank"] = [-sum(found[t.source]) / len(found[t.source]) if found[t.source] else None for t in tasks]
        for (name, scores), (road, accuracy) in itertools.product(values.items(), reached.items()):
            pairs = [
                (score, accuracy[task.target, task.seed, task.source])
                for score, task in zip(scores, tasks)
                if score is not None and (task.target, task.seed, task.source) in accuracy
            ]
            if len(pairs) > 1:
                taus.setdefault((name, road), []).append(_tau(pairs))
    if not taus:
        raise DataError("the evidence has no task on which two sources have a score and an accuracy.")
    mean = lambda key: sum(taus[key]) / len(taus[key]) if key in taus else None
    rows = [(name, *(mean((name, road)) for road in reached)) for name in (*SCORES, "mean rank")]
    counts = {f"draws, {road}": len(taus.get((SCORES[0], road), [])) for road in reached}
    return Report("Scores against accuracies", ("score", "features read out", "fine-tuned"), tuple(rows), counts)


def _draws(evidence: Evidence) -> list[list[Task]]:
    groups: dict[tuple[str, int], list[Task]] = {}
    for task in evidence.tasks:
        groups.setdefault((task.target, task.seed), []).append(task)
    return list(groups.values())


def _tau(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau-b; 0 where one side does not vary.

    >>> _tau([(1, 1), (2, 3), (3, 2)])
    0.3333333333333333
    """
    sign = lambda value: (value > 0) - (value < 0)
    signs = [(sign(a[0] - b[0]), sign(a[1] - b[1])) for a, b in itertools.combinations(pairs, 2)]
    scale = (sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs)) ** 0.5
    return sum(x * y for x, y in signs) / scale if scale else 0.0
