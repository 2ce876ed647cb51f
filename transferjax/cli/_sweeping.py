"""``transferjax finetune --sweep``: several runs that differ in learning rate or seed, as one program."""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from transferjax.cli._console import progress

EVERY = 10
"""Steps between two lines of progress."""
SWEEP_HELP = (
    "several runs at once, of which the best by --validation (else by the last batch) is kept: "
    "lr=1e-4..1e-2:16 (that many, evenly spread in their logarithm), "
    "lr.GROUP=1e-3,1e-2 for one group; given twice: every combination; cannot be resumed"
)


def parse_sweep(text: str) -> tuple[str, list[float]]:
    """The name and the values of one axis of a sweep.

    >>> parse_sweep("lr=1e-4..1e-2:3")
    ('lr', [0.0001, 0.001, 0.01])
    """
    name, _, values = text.partition("=")
    name = name.strip()
    if name != "lr" and not (name.startswith("lr.") and name != "lr."):
        raise argparse.ArgumentTypeError(f"'{text}' sweeps over '{name}'; expected lr=... or lr.GROUP=...")
    try:
        found = _range(values) if ".." in values else [float(value) for value in values.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < float("inf") for value in found):
        expected = (
            f"numbers above 0, {name}=1e-3,1e-2, or a range from low to high with how many (2 or more): "
            f"{name}=1e-4..1e-2:16"
        )
        raise argparse.ArgumentTypeError(f"'{text}' is no axis of a sweep; expected {expected}")
    return name, found


def _range(text: str) -> list[float]:
    """Values from one number to another, in equal steps of their logarithm."""
    import numpy as np

    ends, _, count = text.partition(":")
    low, high = (float(end) for end in ends.split(".."))
    if not 0 < low < high < float("inf") or int(count) < 2:
        raise ValueError
    return [float(f"{value:.6g}") for value in np.geomspace(low, high, int(count))]


def sweep_text(text: str) -> str:
    """The text itself, once it is known to be an axis of a sweep."""
    parse_sweep(text)
    return text


def make_grid(texts: Sequence[str], groups: Sequence[str]) -> dict[str, list[float]]:
    """Every combination of the axes, one list per name.

    >>> make_grid(["lr=1e-3,1e-2", "lr.head=0.1"], ["head", "lora"])
    {'lr': [0.001, 0.01], 'lr.head': [0.1, 0.1]}

    Raises:
      TransferError: an axis is given twice.
      SelectionError: an axis is of a group that the tuning does not have.
    """
    import transferjax as tj

    axes: dict[str, list[float]] = {}
    for name, values in map(parse_sweep, texts):
        if name in axes:
            raise tj.TransferError(f"--sweep is given twice for '{name}'. Write all its values into one.")
        if name.startswith("lr.") and name[3:] not in groups:
            raise tj.SelectionError(f"--sweep names the group '{name[3:]}', but the tuning has: {', '.join(groups)}.")
        axes[name] = values
    return tj.finetune.grid_search(**axes)


def sweep(recipe: Any, batches: Any, texts: Sequence[str], output: str) -> Any:
    """Trains all runs, keeps the best one as a run directory, and returns the table of all.

    Args:
      recipe: of the settings.
      batches: of the training images, for all epochs.
      texts: the axes.
      output: directory, for ``tj.io.Run``.
    """
    import jax

    import transferjax as tj
    from transferjax.cli._recipe import open_split

    begin, config, rates = time.perf_counter(), recipe.config, recipe.rates()
    grid = make_grid(texts, list(rates))

    def of_run(hyper: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        own = {group: hyper.get(f"lr.{group}", hyper.get("lr", rate)) for group, rate in rates.items()}
        return recipe.objective(), recipe.tuning, recipe.optimizer(len(batches), own)

    _check_output(output)
    key = jax.random.key(config["seed"])
    trained, model, through, facts = _shared(of_run, recipe, batches, key)
    held_out = recipe.batches(open_split(config, config["validation"]), train=False) if config["validation"] else None
    metrics = {"accuracy": tj.objectives.accuracy, "loss": tj.objectives.negative_log_likelihood}
    found = tj.sweep(
        trained,
        grid,
        model,
        _watched(through(batches), len(batches), len(next(iter(grid.values())))),
        key=key,
        validation=held_out,
        metrics=None if held_out is None else metrics,
        rank_by="loss" if held_out is None else "validation/accuracy",
        highest=held_out is not None,
    )
    best = {group: found.hyper.get(f"lr.{group}", found.hyper.get("lr", rate)) for group, rate in rates.items()}
    kept = {"learning_rate": ",".join(f"{group}={rate!r}" for group, rate in best.items())}
    run = tj.io.Run.create(output, {**config, **kept, "steps": len(batches), "sweep": list(texts)}, recipe.plan)
    run.save(found.state, recipe.base, batches.get_state())
    facts = {"seconds": time.perf_counter() - begin, "kept": str(run.path), **recipe.quantisation(), **facts}
    title = f"Sweep of {config['model']}: {len(found.report.rows)} runs"
    report = tj.Report(title, found.report.columns, found.report.rows, {**found.report.metadata, **facts})
    run.write_report(report)
    return report


def _check_output(output: str) -> None:
    """Raises at once where the best run could not be kept at the end."""
    import transferjax as tj

    path = pathlib.Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise tj.CheckpointError(f"--output '{output}' holds something already. Expected a new or empty directory.")


def _shared(
    of_run: Any, recipe: Any, batches: Any, key: Any
) -> tuple[Any, Any, Callable[[Any], Any], Mapping[str, Any]]:
    """What the sweep trains: the runs, or their second part on what is computed once for all of them."""
    import transferjax as tj
    from transferjax.cli._hoisting import running

    objective, tuning, tx = of_run({})
    state, frozen = tj.init(key, recipe.model, tuning, tx)
    how = running(tj.make_step(objective, tuning, tx), state, frozen, batches, wanted=recipe.config["hoist"])
    if how.hoisted is None:
        return of_run, recipe.model, how.through, how.facts
    return *tj.finetune.hoisted_recipe(of_run, how.hoisted, recipe.model), how.through, how.facts


def _watched(batches: Iterable[Any], total: int, runs: int) -> Iterator[Any]:
    """The batches, with progress."""
    shown = progress("finetune")
    shown.start(f"{runs} runs", total)
    for done, batch in enumerate(batches, 1):
        yield batch
        if done % EVERY == 0 or done == total:
            shown.advance(done, {})
    shown.finish()
