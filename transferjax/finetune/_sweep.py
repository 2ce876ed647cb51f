"""A sweep: many fine-tunings over one data pass, and the table of what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from transferjax._errors import DataError, NonFiniteError, TransferError, nearest_hint
from transferjax._report import Report
from transferjax._types import Batch, Model, Params
from transferjax.finetune._eval import _padded, make_eval
from transferjax.finetune._fit import is_highest
from transferjax.finetune._hyper import Recipe, row
from transferjax.finetune._match import check_batches
from transferjax.finetune._over_runs import over_runs
from transferjax.finetune._runs import Runs, joined, parted, start_runs, sweep_steps
from transferjax.finetune._state import FinetuneState
from transferjax.tree import Selector

Functions = Mapping[str, Callable[[Any, Batch], jax.Array]]
Batches = Callable[[], Iterable[Batch]] | Iterable[Batch]


class Swept(NamedTuple):
    """What a sweep found.

    Attributes:
      report: one row per run: its hyperparameters, the metrics of its last step, those of the validation, the number
        of steps that it took, and whether it stayed finite. A run that did not stopped at that step.
      hyper: the hyperparameters of the best run; ``recipe(hyper)`` is its objective, tuning and optimizer.
      state: the ``FinetuneState`` of the best run.
      frozen: the frozen weights.
      runs: all runs that were trained to the end, stacked.
    """

    report: Report
    hyper: dict[str, Any]
    state: FinetuneState
    frozen: Params
    runs: Runs


def sweep(
    recipe: Recipe,
    grid: Mapping[str, Any],
    model: Model,
    batches: Iterable[Batch],
    *,
    key: jax.Array | None = None,
    validation: Batches | None = None,
    metrics: Functions | None = None,
    rank_by: str = "loss",
    highest: bool | None = None,
    accumulate: int = 1,
    train: bool | Selector | str | None = None,
) -> Swept:
    """K fine-tunings that differ in hyperparameters and seeds: one program, one frozen base, one pass over the data.

    A GPU or TPU runs them side by side, a CPU one after another within each step; what none of their hyperparameters
    or weights reach (a frozen backbone in inference mode) is computed once for all. A run whose loss or gradient is
    not finite keeps its last finite state and is marked; the others go on.

    Args:
      recipe: ``(hyper) -> (objective, tuning, tx)``; ``hyper`` is ``{name: scalar}``, traced, so the recipe computes
        with it and never asks for its value.
      grid: ``{name: K numbers}``, one per run; ``transferjax.finetune.grid_search`` and ``random_search`` make it. A
        ``seed`` is the run's seed: its state begins as ``transferjax.init(jax.random.key(seed), ...)``.
      model: a ``Model``, whose frozen weights all runs share.
      batches: any iterable of batches.
      key: the key of all runs, where the grid has no ``seed``.
      validation: batches for ``metrics``: a list, or a function that gives a pass over them.
      metrics: ``{name: (outputs, batch) -> [B]}``, as for ``make_eval``; in the table as ``validation/<name>``.
      rank_by: the column that decides which run is best.
      highest: whether more of it is better; ``None``: of an accuracy yes, of a loss or an error no, by its name.
      accumulate: as for ``make_step``.
      train: as for ``make_step``.

    Returns:
      A :class:`Swept`: the table, the best run's hyperparameters and state, and all states.

    Raises:
      TransferError: the grid is no table of numbers, there is neither a ``seed`` in it nor a key, the recipe asks for
        what is not in it or needs the value of a hyperparameter, there is no column ``rank_by`` or its name does not
        say which way is better, or only one of ``validation`` and ``metrics`` is given.
      SelectionError: a hyperparameter changes shapes (it is named, with both shapes), or the frozen weights.
      DataError: there is no batch.
      NonFiniteError: no run stayed finite.

    >>> import jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(()), "stem": jnp.ones(())}, {})
    >>> recipe = lambda hyper: (tj.objectives.mean_squared_error(apply), tj.train("head"), optax.sgd(hyper["lr"]))
    >>> batch = {"inputs": jnp.ones(4), "labels": jnp.zeros(4)}
    >>> found = sweep(recipe, {"lr": [0.125, 0.25], "seed": [0, 0]}, model, [batch, batch])
    >>> found.report.column("loss"), found.hyper["lr"]
    ([0.5625, 0.25], 0.25)
    """
    check_validation(validation, metrics)
    highest = is_highest(rank_by, highest, "sweep")
    runs, last = start_runs(recipe, grid, model, key=key, accumulate=accumulate, train=train), {}
    for runs, last in sweep_steps(runs, batches):
        pass
    found = measured(runs, last, model, validation, metrics)
    best = ranked(found, rank_by, highest)[0]
    rows = {number: run_row(runs, found, number) for number in range(len(runs.finite))}
    return swept("Sweep", runs, rows, best, best, rank_by)


def check_validation(validation: Any, metrics: Any, name: str = "sweep") -> None:
    """Whether validation batches come with metrics."""
    if (validation is None) != (metrics is None):
        raise TransferError(
            f"{name}() expects both validation batches and metrics, or neither: write "
            "validation=batches, metrics={'accuracy': tj.objectives.accuracy}."
        )


def measured(
    runs: Runs, last: Mapping[str, Any], model: Model, validation: Batches | None, metrics: Functions | None
) -> dict[str, np.ndarray]:
    """The metrics of the last step and of the validation, ``[K]`` each, and which runs are finite."""
    found = {name: np.asarray(values, np.float64) for name, values in last.items()}
    found = {name: found[name] for name in ("loss", *sorted(set(found) - {"loss", "finite"}))}
    if validation is not None and metrics is not None:
        batches = validation() if callable(validation) else validation
        results = evaluate_runs(runs, model.apply, metrics, batches)
        found.update({f"validation/{name}": values for name, values in results.items()})
    return {**found, "finite": np.asarray(runs.finite)}


def evaluate_runs(runs: Runs, apply: Any, metrics: Functions, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """``make_eval`` of every run over one pass: the means over all examples, ``[K]`` each.

    >>> import jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(())}, {})
    >>> recipe = lambda hyper: (tj.objectives.mean_squared_error(apply), tj.full(), optax.sgd(hyper["lr"]))
    >>> runs = start_runs(recipe, {"lr": [0.1, 0.2], "seed": [0, 0]}, model)
    >>> batch = {"inputs": jnp.ones(4), "labels": jnp.zeros(4)}
    >>> evaluate_runs(runs, apply, {"error": tj.objectives.squared_error}, [batch])["error"].tolist()
    [1.0, 1.0]
    """
    check_batches(batches, "sweep")

    @jax.jit
    def sums(hyper, held, trainable, extra, frozen, batch):
        steady = runs.steady or (False,) * len(jax.tree.leaves(extra))
        varying, constant = parted(extra, steady)

        def one(_, inputs, shared):
            (hyper, trainable, varying), (held, constant, frozen, batch) = inputs, shared
            evaluate = make_eval(apply, metrics, runs.build(hyper, held).tuning)
            return (), evaluate._sums(trainable, joined(extra, steady, varying, constant), frozen, batch)

        shared = (held, [leaf[0] for leaf in constant], frozen, batch)
        return over_runs(one, (), (hyper, trainable, varying), shared)[1]

    totals, weight, size = dict.fromkeys(metrics, 0.0), 0.0, 0
    for batch in batches:
        batch, size = _padded(batch, size)
        state = runs.states
        found, counted = sums(runs.hyper, runs.held, state.trainable, state.extra, runs.frozen, batch)
        totals = {name: total + np.asarray(found[name], np.float64) for name, total in totals.items()}
        weight = weight + np.asarray(counted, np.float64)
    if np.any(np.asarray(weight) <= 0):
        raise DataError("sweep() got no validation example that counts. Expected a positive sum of weights.")
    return {name: np.asarray(total / weight) for name, total in totals.items()}


def ranked(found: Mapping[str, np.ndarray], rank_by: str, highest: bool) -> list[int]:
    """The numbers of the finite runs, best first; a metric that is NaN comes last."""
    if rank_by not in found or rank_by == "finite":
        raise TransferError(f"a sweep has no column '{rank_by}' to rank by.{nearest_hint(rank_by, sorted(found))}")
    values = np.where(np.isnan(found[rank_by]), np.inf, -found[rank_by] if highest else found[rank_by])
    order = [int(number) for number in np.argsort(values, kind="stable") if found["finite"][number]]
    if not order:
        raise NonFiniteError(
            f"none of {len(values)} runs stayed finite. Expected at least one: look for labels outside the classes, "
            "inputs that are not finite, or learning rates that are too high."
        )
    return order


def run_row(runs: Runs, found: Mapping[str, np.ndarray], number: int) -> dict[str, Any]:
    """What the table says of one run."""
    cell = lambda value: float(value) if np.isfinite(value) else None
    finite = bool(found["finite"][number])
    cells = {name: cell(values[number]) for name, values in found.items() if name != "finite"}
    if not finite:  # the last metrics are of a step that changed nothing
        cells = {name: value if name.startswith("validation/") else None for name, value in cells.items()}
    return {**row(runs.table, number), **cells, "steps": int(runs.states.step[number]), "finite": finite}


def swept(title: str, runs: Runs, rows: Mapping[int, Mapping[str, Any]], best: int, place: int, rank_by: str) -> Swept:
    """The table, and the run ``best`` of it, which is at ``place`` of the stacked ones."""
    names = ("run", *rows[best])
    facts = {"best run": best, "ranked by": rank_by, "runs": len(rows)}
    table = tuple((number, *rows[number].values()) for number in sorted(rows))
    state = jax.tree.map(lambda leaf: leaf[place], runs.states)
    return Swept(Report(title, names, table, facts), row(runs.table, place), state, runs.frozen, runs)
