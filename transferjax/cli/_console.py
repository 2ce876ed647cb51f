"""What the verbs say: results on stdout (a table, or JSON), progress on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from transferjax._report import Report, format_cell


def show(report: Report, as_json: bool) -> None:
    """A report on stdout: JSON when asked for, a drawn table on a terminal, aligned plain text elsewhere."""
    if as_json:
        print(report.to_json())
    elif on_terminal(sys.stdout):
        _draw(report)
    else:
        print(report)


def note(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def on_terminal(stream: Any) -> bool:
    """Whether a person watches this stream."""
    return stream.isatty()


def _draw(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(report.title), title_justify="left", title_style="bold", header_style="bold")
    for name in report.columns:
        numbers = all(isinstance(value, (int, float)) or value is None for value in report.column(name))
        table.add_column(Text(name), justify="right" if numbers else "left")
    for row in report.rows:
        table.add_row(*(Text(format_cell(cell)) for cell in row))
    console = Console()
    console.print(table)
    for key, value in report.metadata.items():
        console.print(Text(f"{key}: {format_cell(value)}"))


def progress(name: str) -> Any:
    """A progress display on stderr: a bar on a terminal, about ten plain lines elsewhere."""
    return _Bar(name) if on_terminal(sys.stderr) else _Lines(name)


class _Lines:
    def __init__(self, name: str):
        self._name = name

    def start(self, text: str, total: int) -> None:
        self._text, self._total, self._begin, self._next = text, total, time.monotonic(), 0
        note(f"{self._name}: {text}, {total} steps (the first one compiles)")

    def advance(self, done: int, facts: dict[str, float]) -> None:
        if done >= self._next or done == self._total:
            self._next = done + max(1, self._total // 10)
            seconds = time.monotonic() - self._begin
            note(f"{self._name}: step {done} of {self._total}{_listed(facts)}, {seconds:.0f} s")

    def finish(self) -> None:
        pass


class _Bar:
    def __init__(self, name: str):
        self._name = name

    def start(self, text: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(f"{self._name}: {text}", total=total, facts="compiling")
        self._bar.start()

    def advance(self, done: int, facts: dict[str, float]) -> None:
        self._bar.update(self._task, completed=done, facts=_listed(facts).lstrip(", "))

    def finish(self) -> None:
        self._bar.stop()


def _listed(facts: dict[str, float]) -> str:
    return "".join(f", {name} {value:.3g}" for name, value in facts.items())
