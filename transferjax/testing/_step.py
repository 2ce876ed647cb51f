"""The laws of a fine-tuning step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from transferjax._context import tracing_step
from transferjax._types import Batch, Loss, Model, Objective, Tuning
from transferjax.finetune import FinetuneState, Step, init, make_step, training_mode
from transferjax.testing._compare import broken, deleted, require_same
from transferjax.tree import copy, fill, flatten, split, where


def check_step(
    objective: Objective,
    model: Model,
    tuning: Tuning,
    tx: Any,
    batch: Batch,
    *,
    steps: int = 3,
    accumulate: int = 1,
    train: Any = None,
    key: jax.Array | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> None:
    """The laws of the step that ``make_step`` builds from these parts.

    Args:
      objective: what is minimised; a mean over examples when ``accumulate`` is more than 1.
      model: the ``Model``.
      tuning: what learns.
      tx: an optax transform.
      batch: a batch whose loss is finite; repeated at every step.
      steps: how many.
      accumulate: into how many equal parts the batch is split.
      train: which modules run in training mode, as for ``make_step``.
      key: typed PRNG key; default ``jax.random.key(0)``.
      rtol: relative tolerance of the comparison with the reference: float32 rounding.
      atol: absolute tolerance of the same.

    Raises:
      LawError: a law is broken: frozen leaves keep their bits; each step equals a reference that differentiates
        everything and deletes the frozen gradients before the optimizer; the state is donated, keeps its shapes, and
        compiles once; the model is left alone, and two runs from it are alike; a loss that is not finite, or a step
        held back, changes nothing.

    >>> import jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(()), "stem": jnp.ones(())}, {})
    >>> objective = tj.objectives.mean_squared_error(apply)
    >>> batch = {"inputs": jnp.arange(4.0), "labels": jnp.ones(4)}
    >>> check_step(objective, model, tj.train("head"), optax.sgd(0.1), batch)
    """
    key = jax.random.key(0) if key is None else key
    traces: list[None] = []
    counted = jax.tree_util.Partial(_Counting(traces), objective)
    step = make_step(counted, tuning, tx, accumulate=accumulate, train=train)
    original = copy((model.params, model.extra))
    state, frozen = init(key, model, tuning, tx)
    first, kept = copy(state), copy(frozen)
    reference = jax.jit(_Reference(step, objective))
    for number in range(steps):
        expected = reference(objective, copy(state), frozen, batch)
        before, shapes = state, _shapes(state)
        state, metrics = step(state, frozen, batch)
        if number == 0:
            once = len(traces)
        _check_donated(before)
        if not bool(metrics["finite"]):
            broken("the laws of a step are checked on a batch whose loss is finite", f"it is not at step {number}.")
        law = f"step {number} equals the reference that deletes frozen gradients before the optimizer"
        require_same(law, expected, {**_trained(state), "loss": metrics["loss"]}, rtol=rtol, atol=atol)
        require_same("the state keeps its outline, shapes and dtypes", shapes, _shapes(state))
        if (gone := deleted(frozen)) is not None:
            broken("frozen leaves keep their bits", "its buffer was deleted.", gone)
        require_same("frozen leaves keep their bits", kept, frozen)
    if len(traces) != once:
        broken("a step compiles once", f"the objective was traced anew {len(traces) - once} times.")
    state = _check_kept(step, state, frozen, batch)
    _check_second_run(step, key, model, tuning, tx, batch, original, first, steps, state)


class _Counting:
    """Calls an objective and notes that it was traced."""

    def __init__(self, traces: list[None]):
        self.traces = traces

    def __call__(self, objective, *arguments):
        self.traces.append(None)
        return objective(*arguments)


class _Reference:
    """One step the plain way: gradients of everything, the frozen ones thrown away, then the optimizer."""

    def __init__(self, step: Step, objective: Objective):
        self.step, self.objective = step, objective

    def __call__(self, objective, state: FinetuneState, frozen, batch):
        train = self.step.train
        train = training_mode(self.step.tuning, state.trainable, frozen) if train is None else train
        key, count = jax.random.fold_in(state.key, state.step), self.step.accumulate
        extra, values, gradients, shares = state.extra, [], [], []
        with tracing_step(state.step):
            for number in range(count):
                part = batch if count == 1 else jax.tree.map(lambda x, n=number: jnp.asarray(x)[n::count], batch)
                own = key if count == 1 else jax.random.fold_in(key, number)
                value, extra, gradient, share = self.differentiate(objective, state, frozen, part, own, extra, train)
                values.append(value)
                gradients.append(gradient)
                shares.append(share)
        share = jnp.stack(shares) / jnp.sum(jnp.stack(shares))
        value = jnp.dot(share, jnp.stack(values))
        mean = lambda x, *each: jnp.tensordot(share, jnp.stack(each), 1).astype(x.dtype)
        total = jax.tree.map(mean, state.trainable, *gradients)
        update = optax.with_extra_args_support(self.step.tx).update
        updates, opt_state = update(total, state.opt_state, state.trainable, value=value)
        trainable = optax.apply_updates(state.trainable, updates)
        return {
            "trainable": trainable,
            "extra": extra,
            "opt_state": opt_state,
            "step": state.step + 1,
            "loss": value,
        }

    def differentiate(self, objective, state, frozen, part, key, extra, train):
        floating = where(lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), "floating")
        every, rest = split((state.trainable, frozen), floating)

        def loss(every):
            result = objective(self.step.tuning.merge(*fill(every, rest)), extra, part, key, train)
            return result.value, (result.extra, _share(result, part))

        (value, (new, share)), (wanted, _frozen) = jax.value_and_grad(loss, has_aux=True)(every)
        return value, new, wanted, share


def _share(result: Loss, part: Batch) -> Any:
    """What a part of a batch counts in the mean over all parts."""
    given = result.weight.get("loss") if isinstance(result.weight, dict) else result.weight
    if given is not None:
        return given
    return jnp.sum(part["weight"]) if "weight" in part else jnp.ones(())


def _trained(state: FinetuneState) -> dict[str, Any]:
    return {"trainable": state.trainable, "extra": state.extra, "opt_state": state.opt_state, "step": state.step}


def _shapes(state: FinetuneState) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def _check_donated(state: FinetuneState) -> None:
    for path, leaf in flatten(state)[0]:
        if isinstance(leaf, jax.Array) and leaf.size and not leaf.is_deleted():
            broken("the state is donated", "its buffer is still there after the step.", path)


def _check_kept(step: Step, state: FinetuneState, frozen: Any, batch: Batch) -> FinetuneState:
    old = copy(state)
    state, metrics = step.jitted(step.objective, state, frozen, batch, False)
    law = "a step that is held back changes nothing"
    require_same(law, old, state)
    if bool(metrics["finite"]):
        broken(law, "its metric 'finite' is true.")
    bad = _not_finite(batch)
    if bad is None:
        return state
    state, metrics = step(state, frozen, bad)
    law = "a loss that is not finite changes nothing"
    if not bool(jnp.isfinite(metrics["loss"])) and bool(metrics["finite"]):
        broken(law, "its metric 'finite' is true.")
    if not bool(metrics["finite"]):
        require_same(law, old, state)
    return state


def _not_finite(batch: Batch) -> dict[str, Any] | None:
    floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    if not any(map(floating, jax.tree.leaves(batch["inputs"]))):
        return None
    return {**batch, "inputs": jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if floating(x) else x, batch["inputs"])}


def _check_second_run(step, key, model, tuning, tx, batch, original, first, steps, last) -> None:
    law = "the model is left alone by training"
    if (gone := deleted((model.params, model.extra))) is not None:
        broken(law, "its buffer was deleted.", gone)
    require_same(law, original, (model.params, model.extra))
    state, frozen = init(key, model, tuning, tx)
    require_same("two inits from one model and key are alike", first, state)
    for _ in range(steps):
        state, _ = step(state, frozen, batch)
    require_same("two runs from one model and key are alike", last, state)
