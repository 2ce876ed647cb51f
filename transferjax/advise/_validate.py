"""Whether the advice is any good: every task in turn is advised on by the evidence on the others."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

from transferjax._errors import DataError
from transferjax._report import Report
from transferjax.advise._advice import rank
from transferjax.advise._budget import Budget
from transferjax.advise._evidence import Evidence, Run

ADAPTIVE, SIMPLE = ("rmsprop", "adamw"), "sgd"
Choice = tuple[str, str, str, str, str]


@dataclasses.dataclass(frozen=True)
class Validation:
    """What advice loses against the best strategy in hindsight, in points of accuracy.

    Attributes:
      tasks: one row per task and budget: what was advised, what was best, and the loss.
      fixed: one row per modality, budget and strategy that was measured on all its tasks: its mean loss, least first.
      losses: the mean loss of the advice by steps; best_fixed: that of the best fixed strategy of each modality,
        chosen in hindsight; NaN where none was measured on all its tasks.
    """

    tasks: Report
    fixed: Report
    losses: Mapping[int, float]
    best_fixed: Mapping[int, float]


def leave_one_out(evidence: Evidence, budgets: Iterable[int] | None = None, *, by_data: bool = False) -> Validation:
    """Asks for advice on every task with the evidence on the others, and looks up what it would have given.

    For each draw of a task's examples the first line that was measured on it is taken (how often another one came
    before it, is in the metadata); its loss is the accuracy of the strategy that was best on average over the draws,
    less its own, on the same draw. A budget allows every run with no more steps.

    Args:
      evidence: at least two tasks.
      budgets: steps; ``None``: every number of steps that was measured.
      by_data: leave out all tasks of the same data set, whose images a task shares with them. A harder test.

    Raises:
      DataError: fewer than two tasks.

    >>> from transferjax.advise import evidence
    >>> found = leave_one_out(evidence(), [0])
    >>> found.losses[0] <= found.best_fixed[0]
    True
    """
    if len(evidence.targets) < 2:
        raise DataError(f"the evidence knows {len(evidence.targets)} tasks. Expected two or more, to leave one out.")
    limits = sorted({run.steps for run in evidence.runs}) if budgets is None else list(budgets)
    accuracy = {(run.target, run.steps, _choice(run), run.seed): run.accuracy for run in evidence.runs}
    modality = {task.target: task.modality for task in evidence.tasks}
    group = {task.target: (by_data and task.data) or task.target for task in evidence.tasks}
    if len(set(group.values())) < 2:
        raise DataError("all tasks of the evidence are of one data set. Expected two or more, to leave one out.")
    rows, fixed, losses, best_fixed, facts = [], [], {}, {}, {}
    for steps in limits:
        found, passed = [], []
        for target in evidence.targets:
            others = functools.reduce(Evidence.without, [t for t in group if group[t] == group[target]], evidence)
            row, over = _one(evidence, others, accuracy, target, steps)
            found.append(row)
            passed += over
        rows += found
        facts[f"mean at {steps}"] = sum(row[-1] for row in found) / len(found)
        facts[f"first lines not measured at {steps}"] = f"{sum(passed)} of {len(passed)}"
        losses[steps] = sum(row[-1] for row in found) / len(found)
        kept = _fixed(accuracy, modality, steps)
        fixed += kept
        first = {row[0]: row[3] for row in reversed(kept)}
        best_fixed[steps] = sum(first.get(modality[t], math.nan) for t in evidence.targets) / len(evidence.targets)
    columns = ("task", "steps", "advised", "its accuracy", "best", "its best accuracy", "points lost")
    return Validation(
        Report("Advice on each task by the others", columns, tuple(rows), facts),
        Report("Fixed strategies", ("modality", "steps", "strategy", "points lost"), tuple(fixed)),
        losses,
        best_fixed,
    )


def _choice(row: Run) -> Choice:
    return row.source, row.road, row.tuning, row.features, row.optimizer


def _named(choice: Choice) -> str:
    return " ".join(word for word in (choice[0], choice[2] or choice[3], choice[4]) if word)


def _one(
    evidence: Evidence, others: Evidence, accuracy: Mapping[tuple, float], target: str, steps: int
) -> tuple[tuple, list[bool]]:
    """The row of a task, and for each draw whether a line came first that was not measured."""
    advised, lost, passed, best = [], [], [], _best(accuracy, target, steps)
    draws = {task.seed for task in evidence.tasks if task.target == target}
    seeds = sorted(seed for seed in draws if (target, *best, seed) in accuracy)
    for seed in seeds:
        tasks = [task for task in evidence.tasks if (task.target, task.seed) == (target, seed)]
        lines = rank(tasks, Budget(steps), others)
        line = next((line for line in lines if (target, *_key(line), seed) in accuracy), None)
        if line is None:
            raise DataError(f"no run of task '{target}', draw {seed}, is of a strategy that was advised: measure more.")
        passed.append(line != lines[0])
        advised.append((_named(_key(line)[1]), accuracy[target, *_key(line), seed]))
        lost.append(100 * (accuracy[target, *best, seed] - advised[-1][1]))
    mean = lambda values: sum(values) / len(values)
    names = ", ".join(dict.fromkeys(name for name, _ in advised))
    top = mean([accuracy[target, *best, seed] for seed in seeds])
    return (target, steps, names, mean([value for _, value in advised]), _named(best[1]), top, mean(lost)), passed


def _key(line) -> tuple[int, Choice]:
    return line.steps, _choice(line)


def _best(accuracy: Mapping[tuple, float], target: str, steps: int) -> tuple[int, Choice]:
    """The steps and the strategy of the highest mean over the draws."""
    total: dict[tuple[int, Choice], list[float]] = {}
    for (task, taken, choice, _), value in accuracy.items():
        if task == target and taken <= steps:
            total.setdefault((taken, choice), []).append(value)
    return max(total, key=lambda key: sum(total[key]) / len(total[key]))


def _fixed(accuracy: Mapping[tuple, float], modality: Mapping[str, str], steps: int) -> list[tuple]:
    """The mean loss of every strategy that was measured on all tasks of a modality, with its most steps allowed."""
    rows = []
    for kind in dict.fromkeys(modality.values()):
        targets = [target for target in modality if modality[target] == kind]
        best = {target: _mean(accuracy, target, *_best(accuracy, target, steps)) for target in targets}
        for choice in dict.fromkeys(key[2] for key in accuracy):
            means = [_most(accuracy, target, steps, choice) for target in targets]
            if not any(map(math.isnan, means)):
                loss = sum(100 * (best[target] - mean) for target, mean in zip(targets, means)) / len(targets)
                rows.append((kind, steps, _named(choice), loss))
    return sorted(rows, key=lambda row: (row[0], row[3]))


def _most(accuracy: Mapping[tuple, float], target: str, steps: int, choice: Choice) -> float:
    """The mean with the most steps that are allowed; NaN where it was not measured."""
    taken = max((key[1] for key in accuracy if key[0] == target and key[2] == choice and key[1] <= steps), default=-1)
    return _mean(accuracy, target, taken, choice)


def _mean(accuracy: Mapping[tuple, float], target: str, steps: int, choice: Choice) -> float:
    """Over the draws; NaN where it was not measured."""
    values = [value for (task, *way, _), value in accuracy.items() if (task, *way) == (target, steps, choice)]
    return sum(values) / len(values) if values else math.nan


def optimizer_rule(evidence: Evidence) -> Report:
    """Whether a simple optimizer suits simple tasks and an adaptive one complex tasks, as is often said.

    One row per task, the easiest first: difficulty is the share of wrong answers of the source's own probe, and the
    last column says by how many points adaptive optimizers, on average over those tried, beat momentum SGD, all else
    equal. The rule holds if that gain grows with difficulty: the metadata has the rank correlation for each number of
    steps.

    Args:
      evidence: with runs of both kinds on the same task, source and tuning.

    Raises:
      DataError: there are none.

    >>> from transferjax.advise import evidence
    >>> optimizer_rule(evidence()).columns
    ('task', 'source', 'tuning', 'steps', 'difficulty', 'sgd', 'adaptive', 'adaptive gains')
    """
    groups: dict[tuple, dict[str, list[float]]] = {}
    for run in evidence.runs:
        if run.road == "finetune" and run.optimizer in (SIMPLE, *ADAPTIVE):
            key = (run.target, run.source, run.tuning, run.steps)
            groups.setdefault(key, {}).setdefault(run.optimizer, []).append(run.accuracy)
    probes: dict[tuple[str, str], list[float]] = {}
    for task in evidence.tasks:
        probes.setdefault((task.target, task.source), []).append(task.probe)
    mean = lambda values: sum(values) / len(values)
    rows = []
    for (target, source, tuning, steps), found in groups.items():
        adaptive = [mean(found[name]) for name in ADAPTIVE if name in found]
        if SIMPLE in found and adaptive and (target, source) in probes:
            simple, best = mean(found[SIMPLE]), mean(adaptive)
            hard = 1 - mean(probes[target, source])
            rows.append((target, source, tuning, steps, hard, simple, best, 100 * (best - simple)))
    if not rows:
        raise DataError(f"the evidence has no task on which both {SIMPLE} and {' or '.join(ADAPTIVE)} were tried.")
    rows.sort(key=lambda row: (row[3], row[4]))
    columns = ("task", "source", "tuning", "steps", "difficulty", "sgd", "adaptive", "adaptive gains")
    facts = {}
    for steps in dict.fromkeys(row[3] for row in rows):
        mine = [row for row in rows if row[3] == steps]
        facts[f"rank correlation at {steps} steps"] = _spearman([r[4] for r in mine], [r[7] for r in mine])
        facts[f"adaptive is better at {steps} steps"] = f"{sum(row[7] > 0 for row in mine)} of {len(mine)}"
    return Report("Simple optimizers for simple tasks?", columns, tuple(rows), facts)


def _spearman(a: list[float], b: list[float]) -> float | None:
    """Rank correlation; ``None`` where one side does not vary.

    >>> _spearman([1, 2, 3], [10, 30, 20])
    0.5
    """
    place = lambda values: [sum(x < y for x in values) + (sum(x == y for x in values) - 1) / 2 for y in values]
    x, y = place(a), place(b)
    middle = (len(a) - 1) / 2
    product = sum((p - middle) * (q - middle) for p, q in zip(x, y))
    scale = (sum((p - middle) ** 2 for p in x) * sum((q - middle) ** 2 for q in y)) ** 0.5
    return product / scale if scale else None
