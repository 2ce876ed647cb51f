"""What a reader of an advice should know besides its lines."""

from __future__ import annotations

from collections.abc import Iterator

from transferjax.advise._budget import Budget
from transferjax.advise._evidence import SCORES, Evidence, Task
from transferjax.advise._expect import Table
from transferjax.advise._line import NONE, Line
from transferjax.advise._task import RAW

FEW = 0.5
"""Evidence of less weight than half a run on the very same task is called thin."""


def notes(lines: tuple[Line, ...], tasks: tuple[Task, ...], evidence: Evidence, budget: Budget) -> tuple[str, ...]:
    """Sentences on whether transfer helps, on the evidence, and on the task.

    Args:
      lines: of the advice, best first.
      tasks: what is known of each source.
      evidence: what the advice rests on.
      budget: what it was asked for.
    """
    return (*_on_transfer(lines, tasks), *_on_evidence(lines, tasks, evidence, budget), *_on_the_task(tasks))


def _on_transfer(lines: tuple[Line, ...], tasks: tuple[Task, ...]) -> Iterator[str]:
    best, silent = lines[0], sorted({task.source for task in tasks} - {line.source for line in lines} - {RAW})
    for task in tasks:
        if task.source in silent:
            yield f"No evidence speaks of '{task.source}': its probe alone tells {task.probe:.3f} of the examples."
    plain = next((line for line in lines if line.source in (RAW, NONE)), None)
    other = next((line for line in lines if line.source not in (RAW, NONE)), None)
    if plain is None or other is None:
        return
    gain, close = 100 * (other.expected - plain.expected), "" if _apart(plain, other) else ", less than is known"
    if best is plain and not silent:
        yield f"Transfer is not expected to help: {_named(best)} comes first, {-gain:.1f} points ahead{close}."
    elif best is other:
        yield f"Transfer is expected to gain {gain:.1f} points over {_named(plain)}{close}."


def _apart(one: Line, other: Line) -> bool:
    """Whether neither lies in the other's spread."""
    return abs(one.expected - other.expected) > max(one.high - one.low, other.high - other.low) / 2


def _on_evidence(lines: tuple[Line, ...], tasks: tuple[Task, ...], evidence: Evidence, budget: Budget) -> Iterator[str]:
    best, stepped = lines[0], [run.steps for run in evidence.runs if run.steps]
    if stepped and budget.steps > max(stepped):
        yield f"No run in the evidence has more than {max(stepped):,} steps: with yours, fine-tuning may gain more."
    if stepped and 0 < budget.steps < min(stepped):
        yield f"No run in the evidence has fewer than {min(stepped):,} steps: of yours nothing is known."
    if best.weight < FEW:
        yield f"Thin evidence: the first line's weighs {best.weight:.2g} of one run on just such a task. Measure it."
    if (unknown := Table(evidence).unknown) > 0:
        yield f"{unknown} runs are of data that `transferjax probe --evidence` has not looked at: they do not count."
    if tasks[0].modality not in {task.modality for task in evidence.tasks}:
        yield f"There is no evidence of the modality '{tasks[0].modality}': that on others is used."
    others = [row for row in evidence.published if row.topic == "regularised fine-tuning"]
    if best.road == "finetune" and tasks[0].modality == "image":
        yield from (f"Published, not measured here ({row.name}): {row.setting}, {row.finding}" for row in others[:1])


def _on_the_task(tasks: tuple[Task, ...]) -> Iterator[str]:
    firsts = {name: max(tasks, key=lambda task: getattr(task, name)).source for name in SCORES if _scored(tasks, name)}
    if len(set(firsts.values())) > 1:
        named = ", ".join(f"{name}: {source}" for name, source in firsts.items())
        yield f"The scores do not agree on the best source ({named})."
    task = max(tasks, key=lambda task: task.probe)
    if task.half is not None and task.probe - task.half > 0.01:
        gain = 100 * (task.probe - task.half)
        yield f"More labels would help: the second half of yours gave the probe of {task.source} {gain:.1f} points."


def _scored(tasks: tuple[Task, ...], name: str) -> bool:
    return all(getattr(task, name) is not None for task in tasks)


def _named(line: Line) -> str:
    return "a linear model on the inputs" if line.source == RAW else "a small network from scratch"
