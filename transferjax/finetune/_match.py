"""Whether a state fits its step, and whether arguments are what they should be."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from transferjax._errors import DataError, SelectionError, TransferError, describe, listing
from transferjax._types import Loss, Tuning
from transferjax.finetune._state import FinetuneState
from transferjax.tree import flatten, natural

_SAME_TUNING = "Pass the same tuning to init and make_step."


def check_call(state: Any, frozen: Any, batch: Any) -> None:
    """Whether the arguments of a step are in order: a live state, frozen weights and a dict."""
    if not isinstance(state, FinetuneState):
        swapped = " They are swapped." if isinstance(frozen, FinetuneState) else ""
        raise TransferError(
            f"a step expects a FinetuneState first, got {describe(state)}.{swapped} Write step(state, frozen, batch) "
            "with both from tj.init."
        )
    if not isinstance(batch, Mapping):
        raise DataError(
            f"the batch is a {describe(batch)}; expected a dict with inputs and labels: write "
            "{'inputs': images, 'labels': labels}."
        )
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted():
            raise TransferError(
                "this state was donated to an earlier step: use the state that the step returned, call tj.init again, "
                "or keep one with tj.copy(state)."
            )


def check_batches(batches: Any, name: str) -> None:
    """Whether batches are many, not one."""
    if isinstance(batches, Mapping):
        raise DataError(f"{name}() expects an iterable of batches, got one batch (a dict): wrap it in a list, [batch].")
    if not isinstance(batches, Iterable):
        raise DataError(
            f"{name}() expects an iterable of batches, got {describe(batches)}: write tj.data.batches(...)."
        )


def check_objective(objective: Any) -> None:
    """Whether an objective takes its five arguments."""
    form = "(params, extra, batch, key, train) -> Loss"
    write = "write tj.objectives.cross_entropy(model.apply)"
    if not callable(objective):
        raise TransferError(f"make_step() expects an Objective first, {form}, got {describe(objective)}: {write}.")
    try:
        signature = inspect.signature(objective)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*"pebkt")
    except TypeError:
        raise TransferError(
            f"make_step() expects an Objective first, {form}, got a function of ({', '.join(signature.parameters)}). "
            f"For a Model.apply {write}; a metric belongs into make_eval."
        ) from None


def check_loss(result: Any) -> None:
    """Whether an objective returned a scalar loss and scalar metrics."""
    if not isinstance(result, Loss):
        raise TransferError(f"an Objective returns Loss(value, metrics, extra), got {describe(result)}.")
    if jnp.shape(result.value) != ():
        raise TransferError(
            f"the objective's loss is {describe(result.value)}; expected a scalar: take the mean over the batch."
        )
    if not isinstance(result.metrics, Mapping):
        raise TransferError(f"the objective's metrics are a {describe(result.metrics)}; expected a dict of scalars.")
    for name, value in result.metrics.items():
        if jnp.shape(value) != ():
            raise TransferError(
                f"the objective's metric '{name}' is {describe(value)}; expected a scalar: take the mean over the "
                "batch."
            )


def check_state(tuning: Tuning, tx: Any, state: FinetuneState, frozen: Any) -> None:
    """Whether a state is one that this tuning and this optimizer would make; seen by shapes alone."""
    trainable, frozen, key, opt_state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jax.dtypes.result_type(leaf)),
        (state.trainable, frozen, state.key, state.opt_state),
    )
    try:
        expected = jax.eval_shape(tuning.init, key, _original(tuning, trainable, frozen))[0]
    except TransferError as error:
        raise SelectionError(f"the state was made by another tuning: {error} {_SAME_TUNING}") from error
    except Exception:
        return  # an init that looks at values says nothing about shapes
    ours, theirs = ({path: leaf.shape for path, leaf in flatten(tree)[0]} for tree in (expected, trainable))
    if ours != theirs:
        raise SelectionError(
            f"the state was made by another tuning. {_difference(theirs, ours, 'tuning')} {_SAME_TUNING}"
        )
    try:
        made = jax.eval_shape(tx.init, trainable)
    except Exception:
        return
    if jax.tree.structure(made) != jax.tree.structure(opt_state):
        ours, theirs = ({path: leaf.shape for path, leaf in flatten(tree)[0]} for tree in (made, opt_state))
        raise SelectionError(
            f"the state was made with another optimizer. {_difference(theirs, ours, 'optimizer')} "
            "Pass the same optimizer to init and make_step."
        )


def _original(tuning: Tuning, trainable: Any, frozen: Any) -> Any:
    """The parameters that a tuning was given: the merged ones, with a frozen leaf's own dtype where there is one."""
    try:
        merged = jax.eval_shape(tuning.merge, trainable, frozen)
    except TransferError:
        raise
    except Exception as error:
        raise SelectionError(f"merging failed with {type(error).__name__}: {error}.") from error
    flat, treedef = jax.tree.flatten(merged)
    try:
        kept = treedef.flatten_up_to(frozen)
    except ValueError:
        return merged
    leaves = [own if isinstance(own, jax.ShapeDtypeStruct) else leaf for leaf, own in zip(flat, kept, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


def _difference(state: dict[str, Any], step: dict[str, Any], noun: str) -> str:
    only = lambda a, b: listing(sorted(set(a) - set(b), key=natural)) or "none"
    parts = f"Only in the state: {only(state, step)}. Only in the step's {noun}: {only(step, state)}."
    other = [path for path in state if path in step and state[path] != step[path]]
    if other:
        named = listing([f"{path} {state[path]} in the state, {step[path]} in the step" for path in other], 3)
        parts += f" Of other shapes: {named}."
    return parts
