"""The tables of ``evidence.py``, and the test of the advice that rests on them."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
from evidence import BATCH, SEEDS, STRATEGIES, TARGETS, rate_of
from evidence_data import chosen, load
from evidence_runs import features, network

from transferjax import advise

TABLES = pathlib.Path(advise.__file__).parent / "tables"
LOSS = 1.0
"""Points of accuracy that the first advice may lose on average, at each budget."""


def known(folder: pathlib.Path, target, train) -> dict[str, advise.Candidate]:
    """Every source of a target as a candidate: its features of the training rows, and its size."""
    found = {}
    for strategy in STRATEGIES:
        source = strategy.source
        if source != "none" and strategy.on(target) and source not in found:
            leaves = [] if source == "raw" else jax.tree.leaves(network(folder, source, 0).params)
            table = features(folder, target.data, source).take(train)
            found[source] = advise.Candidate(table, sum(leaf.size for leaf in leaves))
    return found


def describe(folder: pathlib.Path, part: tuple[int, int]) -> None:
    """What is known of every target's sources before anything is trained, each draw a line of ``tasks-K.jsonl``."""
    path = folder / "kept" / f"tasks-{part[0]}.jsonl"
    done = {(row["target"], row["seed"]) for row in _lines(folder, "tasks")}
    for seed in SEEDS:
        for target in TARGETS[part[0] :: part[1]]:
            if (target.name, seed) not in done:
                train, _, labels = chosen(load(folder, target.data), target, seed)
                facts = {"target": target.name, "modality": target.modality, "seed": seed, "data": target.data}
                tasks = advise.describe_task(known(folder, target, train), labels[train], **facts)
                with path.open("a") as file:
                    file.writelines(json.dumps(dataclasses.asdict(task)) + "\n" for task in tasks)
                print(target.name, seed, flush=True)


def _lines(folder: pathlib.Path, stem: str) -> list[dict]:
    return [json.loads(line) for file in sorted((folder / "kept").glob(f"{stem}-*.jsonl")) for line in file.open()]


def write(folder: pathlib.Path) -> None:
    """``tasks.csv`` and ``runs.csv`` of the package, from what was measured."""
    by_name = {strategy.name: strategy for strategy in STRATEGIES}
    targets = {target.name: target for target in TARGETS}
    place = {name: number for number, name in enumerate((*targets, "raw", *by_name))}
    rows = _lines(folder, "runs")
    rows.sort(key=lambda row: (place[row["target"]], place[row["strategy"]], row["steps"], row["seed"]))
    runs = []
    for row in rows:
        strategy = by_name[row["strategy"]]
        batch = BATCH[targets[row["target"]].modality] if row["steps"] else 0
        what = (strategy.source, strategy.road, strategy.tuning, strategy.features, strategy.optimizer)
        spent = (rate_of(strategy), row["steps"], batch, row["accuracy"], row["seconds"])
        runs.append(advise.Run(row["target"], row["seed"], *what, *spent))
    tasks = [advise.Task(**row) for row in _lines(folder, "tasks")]
    tasks.sort(key=lambda task: (place[task.target], task.seed))
    for name in ("runs.csv", "tasks.csv"):
        (TABLES / name).unlink(missing_ok=True)
    advise.record(TABLES, [*runs, *tasks])
    print(f"{len(runs):,} runs, {len(tasks)} rows of tasks")


def check() -> int:
    """Leaves each target out in turn and asks for advice: what the first line loses, and what fixed choices lose."""
    found = advise.leave_one_out(advise.evidence())
    print(found.tasks, found.fixed, advise.optimizer_rule(advise.evidence()), sep="\n\n")
    print(f"\n{advise.score_agreement(advise.evidence())}\n")
    harder = advise.leave_one_out(advise.evidence(), by_data=True)
    print(f"With all tasks of the same data set left out: {dict(harder.tasks.metadata)}\n")
    missed = False
    for steps, loss in found.losses.items():
        bound = min(LOSS, found.best_fixed[steps])
        missed |= loss > bound
        print(f"{steps} steps: advice loses {loss:.2f} points on average; the best fixed strategies, chosen in")
        print(f"  hindsight for images and for texts, {found.best_fixed[steps]:.2f}; bound {bound:.2f}")
    return int(missed)
