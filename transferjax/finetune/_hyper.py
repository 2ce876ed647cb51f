"""The hyperparameters of a sweep: what they may be, and what to say where they cannot be traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import SelectionError, TransferError, describe, listing
from transferjax._types import Tuning
from transferjax.finetune._match import check_objective
from transferjax.finetune._state import check_transform
from transferjax.tree import flatten

Recipe = Callable[[Mapping[str, Any]], tuple[Any, Tuning, Any]]
Columns = dict[str, np.ndarray]


def columns(grid: Any, name: str = "sweep") -> Columns:
    """A grid as one numpy array ``[K]`` per hyperparameter, checked.

    >>> columns({"lr": [0.1, 0.2], "seed": [0, 1]})["seed"].tolist()
    [0, 1]
    """
    write = f"write {name}(recipe, {{'lr': [1e-3, 1e-4], 'seed': [0, 0]}}, ...)"
    if not isinstance(grid, Mapping) or not grid:
        came = "an empty one" if isinstance(grid, Mapping) else describe(grid)
        raise TransferError(
            f"{name}() expects a dict of hyperparameters second, one value per run; got {came}: {write}."
        )
    table = {str(key): _column(str(key), values, name) for key, values in grid.items()}
    lengths = {key: len(values) for key, values in table.items()}
    if len(set(lengths.values())) > 1:
        raise TransferError(
            f"{name}() expects as many values of each hyperparameter as there are runs, got {lengths}. Repeat "
            "values until the lists are equally long, or, for every combination, write "
            "tj.finetune.grid_search(lr=[...], seed=[...])."
        )
    return table


def _column(key: str, values: Any, name: str) -> np.ndarray:
    try:
        column = np.asarray(values)
    except ValueError:
        column = np.asarray(None)
    if column.ndim != 1 or column.size == 0 or column.dtype.kind not in "fiub":
        raise TransferError(
            f"{name}() expects the values of '{key}' as a list of numbers, one per run; got {describe(column)}. "
            "Text, functions or shapes cannot differ within one program: make one sweep for each."
        )
    if column.dtype.kind in "iu" and (column.min() < -(2**31) or column.max() >= 2**31):
        raise TransferError(f"{name}() expects whole numbers of 32 bits; '{key}' holds larger ones.")
    if key == "seed" and (column.dtype.kind not in "iu" or column.min() < 0):
        raise TransferError(f"{name}() expects each 'seed' as a whole number of at least 0; got {column.tolist()}.")
    return column


def keys_of(table: Columns, key: Any, name: str = "sweep") -> jax.Array:
    """One typed key per run: of its seed, or the same for all."""
    if ("seed" in table) == (key is not None):
        came = "both" if key is not None else "neither"
        raise TransferError(
            f"{name}() expects either a 'seed' in the grid or one key for all runs, got {came}: "
            "write key=jax.random.key(0), or 'seed': [0, 1, 2]."
        )
    if key is None:
        return jnp.stack([jax.random.key(int(seed)) for seed in table["seed"]])
    return jnp.stack([key] * len(next(iter(table.values()))))


def row(table: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The hyperparameters of one run as plain numbers.

    >>> row({"lr": np.array([0.5, 0.25])}, 1)
    {'lr': 0.25}
    """
    return {key: np.asarray(values)[number].item() for key, values in table.items()}


def built(recipe: Recipe, hyper: Mapping[str, Any]) -> tuple[Any, Tuning, Any]:
    """What a recipe makes of hyperparameters, checked."""
    try:
        made = recipe(dict(hyper))
    except KeyError as error:
        if error.args[:1] and error.args[0] in hyper:
            raise
        raise TransferError(
            f"the recipe asks for the hyperparameter {error}, and the grid has {listing(sorted(hyper))}. Add it to the "
            f"grid, or write hyper.get({error}, value) in the recipe."
        ) from error
    if not isinstance(made, tuple) or len(made) != 3:
        raise TransferError(
            f"a recipe returns (objective, tuning, tx), got {describe(made)}: write "
            "lambda hyper: (objective, tj.train('head/**'), optax.adamw(hyper['lr']))."
        )
    objective, tuning, tx = made
    check_objective(objective)
    if not isinstance(tuning, Tuning):
        raise TransferError(f"a recipe returns (objective, tuning, tx), but its tuning is a {describe(tuning)}.")
    check_transform(tx, "recipe")
    return objective, tuning, tx


def explain_failure(error: Exception, attempt: Callable[[dict[str, Any]], Any], table: Columns) -> NoReturn:
    """Raises what is wrong with tracing: which hyperparameter must be known, and which shapes it decides.

    Args:
      error: what came when all hyperparameters were traced.
      attempt: ``(hyper) -> tree`` of arrays, run abstractly with some hyperparameters as plain numbers.
      table: the values of all runs.

    Raises:
      TransferError: one hyperparameter must be a plain number; where it decides a shape, a SelectionError.
    """
    first = row(table, 0)
    if _fails(attempt, first, ()):
        raise error
    for name in [name for name in table if _fails(attempt, first, (name,))]:
        _raise_for_shapes(name, attempt, table, error)
        raise TransferError(
            f"the runs of a sweep are one program, in which '{name}' is a traced scalar; the recipe needs its value "
            f"({type(error).__name__}). Expected arithmetic on it only: use jnp.where in place of if, and take it out "
            "of the grid where it decides a shape or a loop."
        ) from error
    raise error


def _raise_for_shapes(name: str, attempt: Any, table: Columns, error: Exception) -> None:
    first = row(table, 0)
    before = _shapes(attempt, first)
    for value in dict.fromkeys(table[name].tolist()):
        after = _shapes(attempt, {**first, name: value})
        for path in [*before, *after]:
            was, now = before.get(path, "no leaf"), after.get(path, "no leaf")
            if was != now:
                raise SelectionError(
                    f"'{name}' changes shapes: with {name} = {first[name]} '{path}' is {was}, with {name} = {value} "
                    f"it is {now}. Expected runs of equal shapes, as they are one program: make one sweep for each "
                    f"{name}, or pad a rank of LoRA: tj.lora(selector, hyper['{name}'], max_rank=...)."
                ) from error


def _shapes(attempt: Any, hyper: dict[str, Any]) -> dict[str, str]:
    return {path: describe(leaf) for path, leaf in flatten(jax.eval_shape(lambda: attempt(hyper)))[0]}


def _fails(attempt: Any, hyper: dict[str, Any], traced: tuple[str, ...]) -> bool:
    fixed = {key: value for key, value in hyper.items() if key not in traced}
    try:
        jax.eval_shape(lambda some: attempt({**fixed, **some}), {key: hyper[key] for key in traced})
    except Exception:
        return True
    return False
