"""The evidence table: what was measured, on which task, and what others published."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources
import io
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transferjax._errors import DataError, listing
from transferjax._report import Report

ROADS = ("features", "finetune", "scratch")
SCORES = ("logme", "gbc", "knn_accuracy")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is known of a source on a task before anything is fine-tuned: one row of ``tasks.csv``.

    Attributes:
      target: the task's name; seed: which draw of its training examples.
      source: whose features; ``raw``: the inputs themselves.
      modality: ``image``, ``text``, or a word of your own.
      labels: training examples; classes: of them.
      parameters: of the source, 0 for the inputs and where it is unknown.
      width: of its features.
      probe: share of right answers of ridge regression on left-out examples, for its last features.
      layers: the same for the most relevant features of all layers (Head2Toe); ``None``: not looked at.
      quarter, half: ``probe`` of a quarter and of half of the examples.
      data: the data set that the task is drawn from, where several are; empty: its own.
      logme, gbc, knn_accuracy: scores of the last features; ``None``: cannot be computed.
    """

    target: str
    seed: int
    source: str
    modality: str
    labels: int
    classes: int
    parameters: int
    width: int
    probe: float
    layers: float | None = None
    quarter: float | None = None
    half: float | None = None
    logme: float | None = None
    gbc: float | None = None
    knn_accuracy: float | None = None
    data: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a strategy gave on a task: one row of ``runs.csv``.

    Attributes:
      target, seed, source: the task, as in :class:`Task`; the source ``none`` is a fresh network.
      road: ``features``, ``finetune`` or ``scratch``.
      tuning: ``full``, ``last 4``, or empty where nothing but a read-out learns.
      features: ``inputs``, ``last``, ``all layers``, or empty.
      optimizer: ``closed form``, ``sgd``, ``rmsprop``, ``adamw``, or a word of your own.
      rate: the highest learning rate; 0 for a closed form.
      steps: optimizer steps; batch: examples in a step.
      accuracy: share of right answers on test examples.
      seconds: what it took.
      name: how it is cited: ``E12`` is the twelfth run of the package's table, ``evidence().runs[11]``.

    Raises:
      DataError: another road, or an accuracy that is no share.
    """

    target: str
    seed: int
    source: str
    road: str
    tuning: str
    features: str
    optimizer: str
    rate: float
    steps: int
    batch: int
    accuracy: float
    seconds: float
    name: str = "unnamed"

    def __post_init__(self):
        if self.road not in ROADS:
            raise DataError(f"a run's road is '{self.road}'; expected {', '.join(ROADS)}.")
        if not 0 <= self.accuracy <= 1:
            raise DataError(f"a run's accuracy is {self.accuracy}; expected a share of right answers from 0 to 1.")


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure that others published; it was not measured here.

    Attributes:
      name: how it is cited, ``P3``.
      topic: ``regularised fine-tuning``, ``scores``, ``adapters``, ``optimizer`` or ``distillation``.
      setting: on what.
      finding: what was found.
      repository: where it stands.
    """

    name: str
    topic: str
    setting: str
    finding: str
    repository: str


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What advice rests on.

    Attributes:
      runs: what was measured.
      tasks: what was known before each run.
      published: what others found.

    >>> found = evidence()
    >>> len(found.targets) >= 12, found.without(found.targets[0]).targets == found.targets[1:]
    (True, True)
    """

    runs: tuple[Run, ...]
    tasks: tuple[Task, ...]
    published: tuple[Published, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the tasks, in the table's order."""
        return tuple(dict.fromkeys(task.target for task in self.tasks))

    def without(self, target: str) -> Evidence:
        """The evidence that does not know a task.

        Raises:
          DataError: it never knew it.
        """
        if target not in self.targets:
            raise DataError(f"there is no evidence of a task '{target}'. Tasks: {listing(self.targets, 20)}.")
        keep = lambda rows: tuple(row for row in rows if row.target != target)
        return Evidence(keep(self.runs), keep(self.tasks), self.published)

    def __add__(self, other: Evidence) -> Evidence:
        """Both together; nothing is dropped."""
        return Evidence(self.runs + other.runs, self.tasks + other.tasks, self.published + other.published)

    def report(self) -> Report:
        """One row per task and strategy: the mean accuracy over the seeds at each number of steps."""
        groups: dict[tuple[str, str], dict[int, list[float]]] = {}
        for run in self.runs:
            strategy = " ".join(word for word in (run.source, run.tuning or run.features, run.optimizer) if word)
            groups.setdefault((run.target, strategy), {}).setdefault(run.steps, []).append(run.accuracy)
        steps = sorted({run.steps for run in self.runs})
        mean = lambda values: sum(values) / len(values) if values else None
        rows = [(*key, *(mean(found.get(number, [])) for number in steps)) for key, found in groups.items()]
        columns = ("task", "strategy", *(f"{number} steps" for number in steps))
        return Report("Evidence", columns, tuple(rows), {"runs": len(self.runs), "tasks": len(self.targets)})


@functools.cache
def evidence() -> Evidence:
    """The table of the package: runs on real tasks, and published figures.

    ``benchmarks/evidence.py`` has the list of what was measured, and measures it again.

    >>> sorted({run.road for run in evidence().runs})
    ['features', 'finetune', 'scratch']
    """
    folder = importlib.resources.files("transferjax.advise") / "tables"
    read = lambda name, kind: _rows((folder / name).read_text(encoding="utf-8").splitlines(), kind, name)
    runs = [dataclasses.replace(run, name=f"E{n}") for n, run in enumerate(read("runs.csv", Run), 1)]
    return Evidence(tuple(runs), tuple(read("tasks.csv", Task)), tuple(read("published.csv", Published)))


def open_local(path: str | os.PathLike[str]) -> Evidence:
    """Your own runs, as :func:`record` keeps them.

    Args:
      path: a folder with ``runs.csv`` and ``tasks.csv``; either may be missing.

    Raises:
      DataError: there is no such folder, or a line cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     record(folder, [Run("birds", 0, "raw", "features", "", "inputs", "closed form", 0, 0, 0, 0.5, 1.0)])
    ...     open_local(folder).runs[0].name
    'local 1'
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise DataError(
            f"there is no folder '{folder}' of your own runs. Expected one that finetune --evidence or probe "
            "--evidence has written."
        )

    def read(kind: type) -> list[Any]:
        file = folder / FILES[kind]
        return _rows(file.read_text(encoding="utf-8").splitlines(), kind, str(file)) if file.exists() else []

    runs = [dataclasses.replace(run, name=f"local {n}") for n, run in enumerate(read(Run), 1)]
    return Evidence(tuple(runs), tuple(read(Task)))


FILES: Mapping[type, str] = {Run: "runs.csv", Task: "tasks.csv"}


def record(path: str | os.PathLike[str], rows: Sequence[Run | Task]) -> None:
    """Appends runs and tasks to your own table: a line each, in the form of the package's.

    Args:
      path: a folder; it is made where there is none.
      rows: what was found.

    Raises:
      DataError: something is no Run and no Task, or the file there has other columns.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     record(folder, [Task("birds", 0, "raw", "image", 100, 4, 0, 784, 0.6)])
    ...     open_local(folder).targets
    ('birds',)
    """
    folder = pathlib.Path(path)
    for row in rows:
        if type(row) not in FILES:
            raise DataError(f"record() got {row!r}. Expected Run or Task, as transferjax.advise has them.")
    folder.mkdir(parents=True, exist_ok=True)
    own = {kind: [row for row in rows if type(row) is kind] for kind in FILES}
    grown = {folder / FILES[kind]: _grown(folder / FILES[kind], kind, mine) for kind, mine in own.items() if mine}
    for file, text in grown.items():  # all of them can be read, so that either both tables grow or none does
        beside = file.with_name(f".{file.name}.new")
        beside.write_text(text, encoding="utf-8", newline="")
        beside.replace(file)


def _grown(file: pathlib.Path, kind: type, rows: Iterable[Any]) -> str:
    """The text of a table with more lines."""
    columns = _columns(kind)
    before = file.read_text(encoding="utf-8") if file.exists() else ",".join(columns) + "\n"
    if before.splitlines()[:1] != [",".join(columns)]:
        raise DataError(f"'{file}' has other columns. Expected {', '.join(columns)}: give another folder.")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([_cell(getattr(row, column)) for column in columns] for row in rows)
    return before + out.getvalue()


def _columns(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if not (kind is Run and field.name == "name")]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _rows(lines: Sequence[str], kind: type, name: str) -> list[Any]:
    columns = _columns(kind)
    if not lines or lines[0].split(",") != columns:
        raise DataError(f"'{name}' has other columns. Expected {', '.join(columns)}.")
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    found = []
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            found.append(kind(**{column: _value(row[column], types[column]) for column in columns}))
        except DataError as error:
            raise DataError(f"line {number} of '{name}' cannot be used: {error}") from None
        except (TypeError, ValueError):
            raise DataError(f"line {number} of '{name}' cannot be read. Expected {', '.join(columns)}.") from None
    return found


def _value(text: str, kind: str) -> Any:
    if "None" in kind and text == "":
        return None
    return int(text) if kind == "int" else float(text) if kind.startswith("float") else text
