"""The tables of ``evidence.py``, and the test of the advice that rests on them."""

from __future__ import annotations

import json
import pathlib

from evidence import BATCH, SEEDS, STRATEGIES, TARGETS, rate_of
from evidence_data import chosen, load

from transferjax import advise

FOLDER = pathlib.Path(advise.__file__).parent / "evidence"


def write(folder: pathlib.Path) -> None:
    """``tasks.csv`` and ``runs.csv`` of the package, from what was measured."""
    from evidence_runs import known

    by_name = {strategy.name: strategy for strategy in STRATEGIES}
    targets = {target.name: target for target in TARGETS}
    found = [json.loads(line) for file in sorted((folder / "kept").glob("runs-*.jsonl")) for line in file.open()]
    order = {name: number for number, name in enumerate((*targets, *by_name))}
    found.sort(key=lambda row: (order[row["target"]], order[row["strategy"]], row["steps"], row["seed"]))
    runs, tasks = [], []
    for row in found:
        strategy = by_name[row["strategy"]]
        batch = BATCH[targets[row["target"]].modality] if row["steps"] else 0
        what = (strategy.source, strategy.road, strategy.tuning, strategy.features, strategy.optimizer)
        spent = (rate_of(strategy), row["steps"], batch, row["accuracy"], row["seconds"])
        runs.append(advise.Run(row["target"], row["seed"], *what, *spent))
    for target in TARGETS:
        for seed in SEEDS:
            train, _, labels = chosen(load(folder, target.data), target, seed)
            candidates = known(folder, target, train)
            facts = {"target": target.name, "modality": target.modality, "seed": seed}
            tasks += advise.describe_task(candidates, labels[train], **facts)
            print(target.name, seed, flush=True)
    for name in ("runs.csv", "tasks.csv"):
        (FOLDER / name).unlink(missing_ok=True)
    advise.record(FOLDER, [*runs, *tasks])


def check() -> int:
    """Leaves each target out in turn and asks for advice: what the first line loses, and what fixed choices lose."""
    report, passed = advise.leave_one_out(advise.evidence())
    print(report)
    return 0 if passed else 1
