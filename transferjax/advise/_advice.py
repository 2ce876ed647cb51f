"""A ranked list of what to do, each line with what it rests on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from transferjax import features
from transferjax._errors import DataError, describe, listing
from transferjax._report import Report
from transferjax._types import Batch, Cache, Model
from transferjax.advise._agreement import ranks
from transferjax.advise._budget import Budget, as_budget
from transferjax.advise._candidate import Candidate, check_again, measure
from transferjax.advise._evidence import SCORES, Evidence, Run, Task
from transferjax.advise._evidence import evidence as packaged
from transferjax.advise._expect import Expected, Strategy, Table, strategies
from transferjax.advise._line import NONE, Line
from transferjax.advise._notes import notes
from transferjax.advise._task import RAW, describe_task, statistics
from transferjax.features import FeatureTable
from transferjax.tree import Selector

COLUMNS = (
    "source", "road", "tuning", "features", "optimizer", "rate", "epochs", "expected", "from", "to", "seconds",
    "weight", "evidence",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to do, best first.

    Attributes:
      lines: every strategy that fits the budget.
      tasks: what was found out about every source.
      notes: what a reader should know besides.
      data: statistics of the data set: examples, classes, their balance, and what its images or texts are like.
      budget: what it was asked for.
      runs: those that the lines cite.
    """

    lines: tuple[Line, ...]
    tasks: tuple[Task, ...]
    notes: tuple[str, ...]
    data: Report
    budget: Budget
    runs: tuple[Run, ...] = ()

    @property
    def transfer_helps(self) -> bool:
        """Whether the first line uses a pretrained network."""
        return self.lines[0].source not in (RAW, NONE)

    def report(self) -> Report:
        """One row per line, and the notes."""
        rows = [
            (
                line.source, line.road, line.tuning, line.features, line.optimizer, line.learning_rate or None,
                line.epochs, line.expected, line.low, line.high, line.seconds, line.weight, ", ".join(line.evidence),
            )
            for line in self.lines
        ]  # fmt: skip
        facts = {
            "from, to": "one standard deviation around what is expected",
            "weight": "1 is a run on just such a task",
        }
        facts |= {f"note {number}": note for number, note in enumerate(self.notes, 1)}
        return Report(f"Advice for {self.budget.steps:,} steps", COLUMNS, tuple(rows), facts)

    def sources(self) -> Report:
        """One row per source: the scores, their ranks and how far these differ, and the probe."""
        found = ranks(self.tasks)
        rows = [
            (
                task.source,
                *(getattr(task, name) for name in SCORES),
                *_spread(found[task.source]),
                task.probe,
                task.layers,
            )
            for task in self.tasks
        ]
        rows.sort(key=lambda row: (row[len(SCORES) + 1] is None, row[len(SCORES) + 1] or 0))
        columns = ("source", *SCORES, "mean rank", "ranks differ by", "probe", "all layers")
        return Report("Sources", columns, tuple(rows), {"probe": "share of right answers on left-out examples"})

    def cited(self) -> Report:
        """One row per run that a line cites."""
        left_out = ("seconds", "name")
        columns = ("name", *(field.name for field in dataclasses.fields(Run) if field.name not in left_out))
        rows = [tuple(getattr(run, column) for column in columns) for run in self.runs]
        return Report("Cited runs", columns, tuple(rows))

    def curves(self) -> Report:
        """One row per source: the probe on a quarter, on half and on all of the examples."""
        rows = [(task.source, task.quarter, task.half, task.probe) for task in self.tasks]
        count = self.tasks[0].labels
        return Report(
            "Learning curves", ("source", *(f"{round(count * share)}" for share in (0.25, 0.5, 1))), tuple(rows)
        )

    def __str__(self) -> str:
        return str(self.report())


def advise(
    candidates: Mapping[str, Model | Candidate | FeatureTable],
    dataset: Iterable[Batch] | FeatureTable,
    budget: Budget | int,
    *,
    at: Mapping[str, Selector | str] | None = None,
    caches: Mapping[str, Cache] | None = None,
    evidence: Evidence | None = None,
    modality: str | None = None,
) -> Advice:
    """Which source, road, tuning, features, optimizer, learning rate and number of epochs to take.

    Every candidate is looked at in one pass; nothing is trained but read-outs. What a strategy can be expected to give
    is the left-out accuracy of the features it starts from, moved by what the strategy did to such features on similar
    tasks: evidence weighs more the closer its number of labels, difficulty, size of network and steps are. The size of
    a batch is not looked at. The inputs themselves with a linear model are always among the lines, and so is a fresh
    network where there is evidence of one.

    Args:
      candidates: by name: a Model whose outputs are features, what :func:`measure` makes of it, or its features of
        ``dataset``, in the same order.
      dataset: training examples as batches with ``inputs``, ``labels`` and ``id``, gone over more than once; or, where
        no candidate is a Model, a table of the inputs themselves (``features.raw_inputs``) with labels.
      budget: what training may cost; a number is optimizer steps, 0 for features only. Where it has seconds, what is
        not known to fit them is left out.
      at: module paths by candidate, whose outputs are features too.
      caches: a ``transferjax.io.FeatureCache`` by candidate.
      evidence: what to rest on; ``None``: the package's. Add your own: ``evidence() + open_local(folder)``.
      modality: ``image``, ``text``, or a word of your own; ``None``: text where the inputs are a dict, else image.

    Returns:
      :class:`Advice`; ``print`` it, or take ``.lines[0]``.

    Raises:
      DataError: no candidate, a name that stands for something else, a data set that cannot be used, or nothing fits
        the budget.
      SelectionError: as ``features.extract``.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(np.arange(4), 25)
    >>> table = lambda x: FeatureTable({"outputs": x.astype(np.float32)}, np.arange(100), labels)
    >>> inputs, good = table(rng.normal(size=(100, 5))), table(np.eye(4)[labels] + 0.3 * rng.normal(size=(100, 4)))
    >>> found = advise({"net": Candidate(good, 4_000_000)}, inputs, budget=0)
    >>> found.lines[0].source, found.lines[0].road, found.transfer_helps
    ('net', 'features', True)
    """
    limit = as_budget(budget)
    known = packaged() if evidence is None else evidence
    if not isinstance(known, Evidence):
        raise DataError(f"evidence is {describe(known)}; expected Evidence, as evidence() and open_local(folder) give.")
    _check(candidates, dataset, at, caches)
    looked = _looked(candidates, dataset, at or {}, caches or {})
    kind = modality or ("text" if _is_text(dataset) else "image")
    tasks = describe_task(looked, looked[RAW].features.labels, modality=kind)
    lines = rank(tasks, limit, known, {name: one.step_seconds for name, one in looked.items()})
    data = statistics(looked[RAW].features, kind)
    cited = {name for line in lines for name in line.evidence}
    runs = tuple(run for run in known.runs if run.name in cited)
    return Advice(lines, tasks, notes(lines, tasks, known, limit), data, limit, runs)


def rank(
    tasks: Iterable[Task],
    budget: Budget,
    evidence: Evidence,
    step_seconds: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[Line, ...]:
    """The lines of an advice from what is known of each source: :func:`advise` without looking at anything.

    Args:
      tasks: of :func:`describe_task`, one per source, ``raw`` among them.
      budget: what training may cost.
      evidence: what to rest on.
      step_seconds: per example, by source and tuning.

    Raises:
      DataError: nothing fits the budget.

    >>> from transferjax.advise import evidence
    >>> known = evidence()
    >>> tasks = [task for task in known.tasks if task.target == known.targets[0] and task.seed == 0]
    >>> rank(tasks, Budget(0), known.without(known.targets[0]))[0].road
    'features'
    """
    tasks, table, lines = tuple(tasks), Table(evidence), []
    for task, strategy in itertools.product(tasks, strategies(evidence)):
        if _fits(task, strategy, budget):
            found = table.expect(task, strategy, 0 if strategy.road == "features" else budget.steps)
            if found is not None:
                lines.append(_line(task, strategy, found, budget, (step_seconds or {}).get(task.source, {})))
    raw = [task for task in tasks if task.source == RAW]
    if raw and not any(line.source == RAW for line in lines):  # no evidence, but what was counted stands
        found = Expected(raw[0].probe, 0.0, 1.0, 0.0, 0.0, ())
        lines.append(_line(raw[0], Strategy("features", "", "inputs", "closed form"), found, budget, {}))
    affordable = [line for line in lines if budget.seconds is None or _least(line.seconds) <= budget.seconds]
    if not affordable:
        raise DataError(
            "the evidence says nothing of such a task within the budget. Expected tasks like those of evidence(), or "
            "your own runs: evidence() + open_local(folder)."
        )
    return tuple(sorted(affordable, key=lambda line: -line.expected))


def _least(seconds: float | None) -> float:
    return float("inf") if seconds is None else seconds


def _fits(task: Task, strategy: Strategy, budget: Budget) -> bool:
    """Whether a strategy is one for this source, and costs no more than is there."""
    if strategy.road != "features" and budget.steps == 0:
        return False
    raw = strategy.road == "scratch" or strategy.features == "inputs"
    return (task.source == RAW) == raw


def _line(task: Task, strategy: Strategy, found: Expected, budget: Budget, seconds: Mapping[str, float]) -> Line:
    steps = 0 if strategy.road == "features" else budget.steps
    each = seconds.get(strategy.tuning)
    return Line(
        NONE if strategy.road == "scratch" else task.source,
        strategy.road,
        strategy.tuning,
        strategy.features,
        strategy.optimizer,
        found.rate,
        steps * budget.batch_size / task.labels,
        steps,
        found.accuracy,
        found.low,
        found.high,
        0.0 if steps == 0 else None if each is None else each * budget.batch_size * steps,
        found.weight,
        tuple(run.name for run in found.runs),
    )


def _check(candidates: Any, dataset: Any, at: Any, caches: Any) -> None:
    if not isinstance(candidates, Mapping) or not candidates:
        raise DataError(f"candidates are {describe(candidates)}; expected {{name: Model, Candidate or FeatureTable}}.")
    for name in candidates:
        if name in (RAW, NONE):
            raise DataError(
                f"a candidate is called '{name}', which stands for the inputs themselves. Give another name."
            )
        if not isinstance(candidates[name], Model | Candidate | FeatureTable):
            raise DataError(
                f"candidate '{name}' is {describe(candidates[name])}; expected Model, Candidate or FeatureTable."
            )
    for name, given in (("at", at), ("caches", caches)):
        if given is not None and not isinstance(given, Mapping):
            raise DataError(
                f"{name} is {describe(given)}; expected a dict by candidate, {{'{next(iter(candidates))}': ...}}."
            )
    unknown = sorted({*(at or {}), *(caches or {})} - {*candidates})
    if unknown:
        raise DataError(
            f"at or caches name {listing(unknown)}, which is no candidate: {listing(list(candidates), 10)}."
        )
    models = [name for name in candidates if isinstance(candidates[name], Model)]
    if isinstance(dataset, FeatureTable):
        if models:
            raise DataError(
                f"candidate '{models[0]}' is a Model, and the data set is a table of features. Expected batches, or "
                "for each Model what transferjax.advise.measure makes of it."
            )
    else:
        check_again(dataset)


def _looked(candidates: Any, dataset: Any, at: Any, caches: Any) -> dict[str, Candidate]:
    """Every candidate's features, the inputs themselves before them, all of the same examples in one order."""
    if isinstance(dataset, FeatureTable):
        raw = dataset
    else:
        raw = features.bag_of_tokens(dataset) if _is_text(dataset) else features.raw_inputs(dataset)
    found = {RAW: Candidate(raw, 0)}
    for name, given in candidates.items():
        if isinstance(given, Model):
            assert not isinstance(dataset, FeatureTable)  # _check has refused it
            given = measure(given, dataset, at=at.get(name), cache=caches.get(name))
        one = given if isinstance(given, Candidate) else Candidate(given)
        theirs, mine = one.features.beside(raw)
        if len(theirs) != len(raw):
            raise DataError(
                f"'{name}' has {len(mine)} of the data set's {len(raw)} examples. Expected features of all."
            )
        if theirs.labels is not None and mine.labels is not None and not np.array_equal(theirs.labels, mine.labels):
            raise DataError(f"'{name}' has other labels than the data set. Expected features of the same examples.")
        position = {int(number): row for row, number in enumerate(one.features.ids)}
        rows = [position[int(number)] for number in raw.ids]
        found[name] = dataclasses.replace(one, features=one.features.take(rows))
    return found


def _is_text(dataset: Any) -> bool:
    return not isinstance(dataset, FeatureTable) and isinstance(next(iter(dataset), {}).get("inputs"), Mapping)


def _spread(found: list[float]) -> tuple[float | None, float | None]:
    return (sum(found) / len(found), max(found) - min(found)) if found else (None, None)
