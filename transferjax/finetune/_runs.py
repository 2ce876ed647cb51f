"""Many fine-tunings as one program: what differs is stacked, the base and the data are there once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from transferjax._context import tracing_step
from transferjax._errors import DataError, SelectionError
from transferjax._types import Batch, Model, Params
from transferjax.finetune._hyper import Columns, Recipe, built, columns, explain_failure, keys_of
from transferjax.finetune._match import check_batches, check_call
from transferjax.finetune._over_runs import over_runs
from transferjax.finetune._state import FinetuneState, _committed_alike, init
from transferjax.finetune._step import Step, make_step, training_mode
from transferjax.program import inline
from transferjax.tree import Selector, paths

Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Runs:
    """K fine-tunings under way; made by ``start_runs``.

    Attributes:
      table: ``{name: [K]}``, the hyperparameters as they were given.
      hyper: the same as arrays of 32 bits.
      states: a ``FinetuneState`` whose leaves have a leading axis K; donated by every step.
      frozen: the frozen weights, once.
      finite: bool ``[K]``: which runs still learn; the others keep their last finite state.
      held: the leaves of the objective that do not depend on ``hyper``, once.
      steady: which leaves of ``extra`` no step changes, so that all runs read one copy; ``None`` before the first.
      known: the structures, shapes and types of the batches that steps have taken.
      build: ``(hyper, held) -> Step`` of one run.
      jitted: ``jitted(hyper, held, states, frozen, batch, finite, steady) -> (states, metrics)``.
    """

    table: Columns
    hyper: dict[str, jax.Array]
    states: FinetuneState
    frozen: Params
    finite: jax.Array
    held: list[Any]
    steady: tuple[bool, ...] | None
    known: frozenset[Any] = dataclasses.field(repr=False)
    build: Callable[[Any, list[Any] | None], Step] = dataclasses.field(repr=False)
    jitted: Any = dataclasses.field(repr=False)

    def take(self, numbers: Sequence[int]) -> Runs:
        """Some of the runs, in the order given."""
        names = ("table", "hyper", "states", "finite")
        parts = {name: getattr(self, name) for name in names}
        return dataclasses.replace(self, **jax.tree.map(lambda leaf: leaf[np.asarray(numbers)], parts))


def start_runs(
    recipe: Recipe,
    grid: Mapping[str, Any],
    model: Model,
    *,
    key: jax.Array | None = None,
    accumulate: int = 1,
    train: bool | Selector | str | None = None,
) -> Runs:
    """The first states of K fine-tunings over one frozen base.

    Args:
      recipe: as for ``sweep``.
      grid: as for ``sweep``.
      model: as for ``sweep``.
      key: as for ``sweep``.
      accumulate: as for ``make_step``.
      train: as for ``make_step``.

    Returns:
      :class:`Runs`; the state of run k is what ``init`` makes of its seed.

    Raises:
      TransferError: the grid is no table of numbers, or the recipe needs the value of a hyperparameter.
      SelectionError: a hyperparameter changes shapes, or the frozen weights depend on it.

    >>> import jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(()), "stem": jnp.ones(())}, {})
    >>> recipe = lambda hyper: (tj.objectives.mean_squared_error(apply), tj.train("head"), optax.sgd(hyper["lr"]))
    >>> runs = start_runs(recipe, {"lr": [0.1, 0.2], "seed": [0, 0]}, model)
    >>> runs.states.trainable["head"].tolist()
    [1.0, 1.0]
    """
    table = columns(grid)
    keys = keys_of(table, key)
    hyper = {name: jnp.asarray(values) for name, values in table.items()}
    build = partial(_step, recipe, accumulate, train)
    begin = lambda hyper, key: init(key, model, *built(recipe, hyper)[1:])

    def one(hyper, key):
        state, frozen = begin(hyper, key)
        for path, leaf in paths(frozen).items():
            if isinstance(leaf, Tracer):
                raise SelectionError(
                    f"the frozen weight '{path}' is made of a hyperparameter or of the run's key. Expected one frozen "
                    "base for all runs: make one sweep for each, or let it learn."
                )
        return state, frozen

    try:
        states, frozen = jax.vmap(one, out_axes=(0, None))(hyper, keys)
        held = _held(build, hyper)
    except Exception as error:
        explain_failure(error, lambda hyper: begin(hyper, keys[0])[0], table)
    states = _committed_alike(jax.tree.map(_strong, states), frozen)
    words = np.asarray(jax.random.key_data(keys))
    jitted = jax.jit(partial(_advance_all, build, bool((words == words[0]).all())), static_argnums=6, donate_argnums=2)
    return Runs(table, hyper, states, frozen, states.step >= 0, held, None, frozenset(), build, jitted)


def sweep_steps(runs: Runs, batches: Iterable[Batch]) -> Iterator[tuple[Runs, Metrics]]:
    """Runs all of them over batches, one compiled program per step, and yields what each step returns.

    What is yielded is donated at the next turn: keep it with ``transferjax.copy(runs.states)``. Once the loss or a
    gradient of a run is not finite, that run keeps the state from before and learns no more; the others go on.

    Args:
      runs: from :func:`start_runs`; its states are donated.
      batches: any iterable of batches; all runs see the same.

    Yields:
      ``(runs, metrics)`` after each step; metrics are ``[K]``, with ``loss`` and ``finite`` among them.

    Raises:
      DataError: there was no batch, or a batch is no dict, or changes a part of ``extra`` that earlier ones left.
      TransferError: as ``make_step``, or the objective needs the value of a hyperparameter.

    >>> import jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(()), "stem": jnp.ones(())}, {})
    >>> recipe = lambda hyper: (tj.objectives.mean_squared_error(apply), tj.train("head"), optax.sgd(hyper["lr"]))
    >>> runs = start_runs(recipe, {"lr": [0.0, 0.25], "seed": [0, 0]}, model)
    >>> batch = {"inputs": jnp.ones(4), "labels": jnp.zeros(4)}
    >>> [metrics["loss"].tolist() for runs, metrics in sweep_steps(runs, [batch, batch])]
    [[1.0, 1.0], [1.0, 0.25]]
    """
    check_batches(batches, "sweep")
    none = True
    for batch in batches:
        check_call(runs.states, runs.frozen, batch)
        leaves, treedef = jax.tree.flatten(batch)
        kind = (treedef, *((jnp.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves))
        try:
            if kind not in runs.known:
                runs = dataclasses.replace(runs, steady=_steady(runs, batch))
            arguments = (runs.hyper, runs.held, runs.states, runs.frozen, batch, runs.finite, runs.steady)
            states, metrics = runs.jitted(*arguments)
        except Exception as error:
            if kind in runs.known:
                raise
            explain_failure(error, partial(_attempt, runs, batch), runs.table)
        none, known = False, runs.known | {kind}
        runs = dataclasses.replace(runs, states=states, finite=metrics["finite"], known=known)
        yield runs, metrics
    if none:
        raise DataError("sweep() got no batch. Expected at least one: check the data set and the number of epochs.")


def _strong(leaf: jax.Array) -> jax.Array:
    return jax.lax.convert_element_type(leaf, leaf.dtype) if getattr(leaf, "weak_type", False) else leaf


def _step(recipe: Recipe, accumulate: int, train: Any, hyper: Any, held: list[Any] | None) -> Step:
    """The step of one run; the shared leaves of its objective are those that are given."""
    objective, tuning, tx = built(recipe, hyper)
    step = make_step(objective, tuning, tx, accumulate=accumulate, train=train)
    if held is None:
        return step
    leaves, treedef = jax.tree.flatten(step.objective)
    given = iter(held)
    leaves = [leaf if isinstance(leaf, Tracer) else next(given) for leaf in leaves]
    return dataclasses.replace(step, objective=jax.tree.unflatten(treedef, leaves))


def _held(build: Any, hyper: Any) -> list[Any]:
    """The leaves of the objective that are the same for all runs: a teacher's weights, say."""
    found: list[Any] = []

    def probe(hyper):
        found.extend(leaf for leaf in jax.tree.leaves(build(hyper, None).objective) if not isinstance(leaf, Tracer))
        return ()

    jax.eval_shape(probe, _first(hyper))
    return found


def _first(tree: Any) -> Any:
    """The shapes of one run."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)


def _advance_all(build, alike, hyper, held, states, frozen, batch, finite, steady) -> tuple[FinetuneState, Metrics]:
    """One step of all runs; ``alike``: they began with one key."""
    varying, constant = parted(states.extra, steady)

    def one(state, inputs, shared):
        (hyper, proceed), (constant, held, frozen, batch, drawn) = inputs, shared
        own = {"step": state.step, "key": state.key}
        state = dataclasses.replace(state, extra=joined(states.extra, steady, state.extra, constant), **(drawn or own))
        step = build(hyper, held)
        new, metrics = step._run(step.objective, state, frozen, batch, proceed)
        after = own["step"] + (new.step - state.step)
        return dataclasses.replace(new, extra=parted(new.extra, steady)[0], step=after, key=own["key"]), metrics

    # Runs that still learn are at one step. With one key too, what they draw (dropout, augmentation) is drawn once.
    drawn = {"step": jnp.max(states.step), "key": states.key[0]} if alike else None
    shared = ([leaf[0] for leaf in constant], held, frozen, batch, drawn)
    new, metrics = over_runs(one, dataclasses.replace(states, extra=varying), (hyper, finite), shared)
    return dataclasses.replace(new, extra=joined(states.extra, steady, new.extra, constant)), metrics


def parted(extra: Any, steady: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    """The leaves that differ between the runs, and those that all share."""
    leaves = jax.tree.leaves(extra)
    return [x for x, same in zip(leaves, steady) if not same], [x for x, same in zip(leaves, steady) if same]


def joined(like: Any, steady: Sequence[bool], varying: Sequence[Any], constant: Sequence[Any]) -> Any:
    """One tree from the two lists of ``parted``."""
    one, other = iter(varying), iter(constant)
    return jax.tree.unflatten(jax.tree.structure(like), [next(other) if same else next(one) for same in steady])


def _steady(runs: Runs, batch: Batch) -> tuple[bool, ...]:
    """Which leaves of ``extra`` come back from the objective as they went in."""
    leaves, treedef = jax.tree.flatten(runs.states.extra)
    if not leaves:
        return ()

    def extra_of(extra, state, hyper, held, frozen, batch):
        step = runs.build(hyper, held)
        mode = training_mode(step.tuning, state.trainable, frozen) if step.train is None else step.train
        with tracing_step(state.step):
            params = step.tuning.merge(state.trainable, frozen)
            return step.objective(params, extra, batch, state.key, mode).extra

    state, hyper = _first((runs.states, runs.hyper))
    trace = jax.make_jaxpr(extra_of, return_shape=True)
    jaxpr, shapes = trace(state.extra, state, hyper, runs.held, runs.frozen, batch)
    body = inline(jaxpr).jaxpr
    found = tuple(out is var for out, var in zip(body.outvars, body.invars))
    if jax.tree.structure(shapes) != treedef:
        found = (False,) * len(leaves)  # the step says what is wrong
    for path, before, now in zip(paths(runs.states.extra), runs.steady or found, found):
        if before and not now:
            raise DataError(
                f"this batch changes '{path}' of the model's extra, which earlier batches left as it was. Expected "
                "batches of one kind: the same entries in each."
            )
    return runs.steady or found


def _attempt(runs: Runs, batch: Batch, hyper: Any) -> Any:
    """One step of one run, abstractly, with these hyperparameters."""
    step = runs.build(hyper, None)
    return jax.eval_shape(step._run, step.objective, _first(runs.states), runs.frozen, batch, True)
