"""Which hyperparameters to try: every combination, random draws, or many at first and fewer with every rung."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from transferjax._errors import DataError, TransferError, describe, is_whole
from transferjax._types import Batch, Model
from transferjax.finetune._fit import is_highest
from transferjax.finetune._hyper import Recipe
from transferjax.finetune._match import check_batches
from transferjax.finetune._runs import start_runs, sweep_steps
from transferjax.finetune._sweep import Batches, Functions, Swept, check_validation, measured, ranked, run_row, swept
from transferjax.tree import Selector

Distribution = Callable[[jax.Array, int], np.ndarray]


def grid_search(**values: Sequence[float]) -> dict[str, list[float]]:
    """Every combination of the values; the last name varies fastest.

    Args:
      **values: a list of numbers per hyperparameter.

    Returns:
      The grid of ``transferjax.sweep``: one list per name, one entry per run.

    Raises:
      TransferError: a value is no list, or an empty one.

    >>> grid_search(lr=[0.1, 0.2], seed=[0, 1])
    {'lr': [0.1, 0.1, 0.2, 0.2], 'seed': [0, 1, 0, 1]}
    """
    for name, column in values.items():
        if isinstance(column, str) or not hasattr(column, "__len__") or len(column) == 0:
            raise TransferError(
                f"grid_search() expects a list of numbers for '{name}', got {describe(column)}: write {name}=[1e-3]."
            )
    combinations = list(itertools.product(*values.values()))
    return {name: [combination[at] for combination in combinations] for at, name in enumerate(values)}


def uniform(low: float, high: float) -> Distribution:
    """The uniform distribution on ``[low, high)``, for ``random_search``.

    Raises:
      TransferError: ``low`` is not below ``high``.

    >>> import jax
    >>> draws = uniform(0.5, 1.0)(jax.random.key(0), 4)
    >>> bool(draws.min() >= 0.5 and draws.max() < 1.0)
    True
    """
    if not low < high:
        raise TransferError(f"uniform() expects low below high, got {low} and {high}.")
    return lambda key, count: low + (high - low) * np.asarray(jax.random.uniform(key, (count,)), np.float64)


def log_uniform(low: float, high: float) -> Distribution:
    """The distribution on ``[low, high)`` whose logarithm is uniform, for ``random_search``: for learning rates.

    Raises:
      TransferError: ``low`` is not positive, or not below ``high``.

    >>> import jax
    >>> draws = log_uniform(1e-4, 1e-2)(jax.random.key(0), 4)
    >>> bool(draws.min() >= 1e-4 and draws.max() < 1e-2)
    True
    """
    if not 0 < low < high:
        raise TransferError(f"log_uniform() expects 0 < low < high, got {low} and {high}.")
    exponent = uniform(math.log(low), math.log(high))
    return lambda key, count: np.exp(exponent(key, count))


def random_search(key: jax.Array, runs: int, **values: Distribution | float) -> dict[str, list[float]]:
    """Random draws of each hyperparameter.

    Args:
      key: typed PRNG key, consumed; a name's draws do not depend on the other names.
      runs: how many.
      **values: a distribution (``log_uniform(1e-4, 1e-2)``, or any ``(key, count) -> [count]``), or one number for all.

    Returns:
      The grid of ``transferjax.sweep``; ``seed`` counts the runs unless it is given.

    Raises:
      TransferError: ``runs`` is below 1, or a distribution gives another number of values.

    Source: Bergstra and Bengio, "Random Search for Hyper-Parameter Optimization", 2012.

    >>> import jax
    >>> grid = random_search(jax.random.key(0), 3, lr=log_uniform(1e-4, 1e-2), weight_decay=0.1)
    >>> len(grid["lr"]), grid["weight_decay"], grid["seed"]
    (3, [0.1, 0.1, 0.1], [0, 1, 2])
    """
    if not is_whole(runs):
        raise TransferError(f"random_search() expects a whole number of at least 1 as runs, got {runs!r}.")
    grid: dict[str, list[float]] = {}
    for name, value in values.items():
        drawn = value(jax.random.fold_in(key, zlib.crc32(name.encode())), runs) if callable(value) else [value] * runs
        grid[name] = np.asarray(drawn).tolist()
        if np.shape(drawn) != (runs,):
            raise TransferError(
                f"random_search() expects ({runs},) values of '{name}', its distribution gave {np.shape(drawn)}: "
                "write tj.finetune.log_uniform(1e-4, 1e-2)."
            )
    return grid if "seed" in grid else {**grid, "seed": list(range(runs))}


def successive_halving(
    recipe: Recipe,
    grid: Mapping[str, Any],
    model: Model,
    batches: Iterable[Batch],
    *,
    rungs: Sequence[int],
    keep: float = 0.5,
    key: jax.Array | None = None,
    validation: Batches | None = None,
    metrics: Functions | None = None,
    rank_by: str = "loss",
    highest: bool | None = None,
    accumulate: int = 1,
    train: bool | Selector | str | None = None,
) -> Swept:
    """A ``sweep`` that gives up the worse runs after every rung; those that stay go on from where they are.

    Schedules see the whole run: let the recipe's decay over ``sum(rungs)`` steps. The program is compiled once for
    every rung, as the number of runs falls.

    Args:
      recipe: as for ``sweep``.
      grid: as for ``sweep``.
      model: as for ``sweep``.
      batches: at least ``sum(rungs)`` batches, in one pass.
      rungs: how many steps each rung has.
      keep: the fraction of the runs that goes on, rounded up; those that are not finite never do.
      key: as for ``sweep``.
      validation: as for ``sweep``; it is read after every rung.
      metrics: as for ``sweep``.
      rank_by: as for ``sweep``; decides who goes on.
      highest: as for ``sweep``.
      accumulate: as for ``make_step``.
      train: as for ``make_step``.

    Returns:
      As ``sweep``; each row has the metrics of the run's own last step, and the ``rung`` that it finished.

    Raises:
      TransferError: as for ``sweep``, or ``rungs`` are no positive whole numbers, or ``keep`` is not in (0, 1).
      DataError: there are fewer batches.
      NonFiniteError: no run stayed finite.

    Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2016.

    >>> import jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(()), "stem": jnp.ones(())}, {})
    >>> recipe = lambda hyper: (tj.objectives.mean_squared_error(apply), tj.train("head"), optax.sgd(hyper["lr"]))
    >>> batches = [{"inputs": jnp.ones(4), "labels": jnp.zeros(4)}] * 3
    >>> found = successive_halving(recipe, grid_search(lr=[0.1, 0.2], seed=[0]), model, batches, rungs=[2, 1])
    >>> found.report.column("steps"), found.hyper
    ([2, 3], {'lr': 0.2, 'seed': 0})
    """
    _check_halving(rungs, keep, batches)
    check_validation(validation, metrics, "successive_halving")
    highest = is_highest(rank_by, highest, "successive_halving")
    runs = start_runs(recipe, grid, model, key=key, accumulate=accumulate, train=train)
    source = iter(batches)
    numbers, rows, order = list(range(len(runs.finite))), {}, [0]
    for rung in range(len(rungs)):
        if rung:
            stay = order[: math.ceil(keep * len(numbers))]
            runs, numbers = runs.take(stay), [numbers[place] for place in stay]
        last = {}
        for runs, last in sweep_steps(runs, _next(source, rungs, rung)):
            pass
        found = measured(runs, last, model, validation, metrics)
        order = ranked(found, rank_by, highest)
        rows.update({n: {**run_row(runs, found, at), "rung": rung} for at, n in enumerate(numbers)})
    return swept("Successive halving", runs, rows, numbers[order[0]], order[0], rank_by)


def _next(source: Iterator[Batch], rungs: Sequence[int], rung: int) -> Iterator[Batch]:
    """The batches of one rung."""
    for taken in range(rungs[rung]):
        try:
            yield next(source)
        except StopIteration:
            raise DataError(
                f"successive_halving() got {sum(rungs[:rung]) + taken} batches; expected {sum(rungs)}, one per step of "
                f"the rungs {list(rungs)}."
            ) from None


def _check_halving(rungs: Any, keep: float, batches: Any) -> None:
    check_batches(batches, "successive_halving")
    if not isinstance(rungs, Sequence) or not rungs or not all(is_whole(steps) for steps in rungs):
        raise TransferError(
            f"successive_halving() expects rungs as a list of whole numbers of steps, got {rungs!r}: write [100, 200]."
        )
    if not 0 < keep < 1:
        raise TransferError(f"successive_halving() expects keep as a fraction between 0 and 1, got {keep}.")
