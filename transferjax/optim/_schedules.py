"""Schedules and averages."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transferjax._errors import TransferError


def warmup_cosine(peak: float, steps: int, *, warmup: float = 0.1, end: float = 0.0) -> optax.Schedule:
    """A learning rate that rises linearly and then falls along a cosine.

    Args:
      peak: the highest learning rate; a traced scalar too, as in a sweep.
      steps: the number of optimizer steps of the whole run.
      warmup: the fraction of the steps in which it rises from 0, in [0, 1).
      end: the learning rate at the last step.

    Returns:
      An optax schedule, ``step -> learning rate``.

    Raises:
      TransferError: ``steps`` is below 1 or ``warmup`` outside [0, 1).

    >>> schedule = warmup_cosine(1.0, 100, warmup=0.1)
    >>> [round(float(schedule(step)), 2) for step in (0, 10, 55, 100)]
    [0.0, 1.0, 0.5, 0.0]
    """
    if steps < 1:
        raise TransferError(f"warmup_cosine() expects at least 1 step, got {steps}.")
    if not 0.0 <= warmup < 1.0:
        raise TransferError(f"warmup_cosine() expects warmup as a fraction in [0, 1), got {warmup}.")
    rise = int(warmup * steps)
    if isinstance(peak, jax.Array):  # optax compares its peak with 0
        down = optax.cosine_decay_schedule(1.0, max(steps, rise + 1) - rise)
        fall = lambda count: end + (peak - end) * down(count)
        return optax.join_schedules([lambda count: peak * count / max(rise, 1), fall], [rise])
    start = 0.0 if rise else peak
    return optax.warmup_cosine_decay_schedule(start, peak, rise, max(steps, rise + 1), end)


class AverageState(NamedTuple):
    """State of :func:`with_average`: the inner state and the moving average of the parameters."""

    inner: Any
    average: Any


def with_average(tx: optax.GradientTransformation, decay: float = 0.999) -> optax.GradientTransformationExtraArgs:
    """Any optax transform, plus an exponential moving average (EMA) of what it trains.

    The average lives in the optimizer state, so it is donated, saved and resumed with it. It is kept in float32 at
    least: in bfloat16 a decay of .999 would never move it.

    Args:
      tx: the transform that trains.
      decay: the weight of the past in [0, 1): ``average = decay * average + (1 - decay) * new``.

    Returns:
      An optax transform; read the average with :func:`averaged`.

    Raises:
      TransferError: ``decay`` is outside [0, 1).

    >>> import jax.numpy as jnp
    >>> tx = with_average(optax.sgd(1.0), decay=0.5)
    >>> params = jnp.zeros(())
    >>> updates, state = tx.update(jnp.ones(()), tx.init(params), params)
    >>> float(averaged(state))
    -0.5
    """
    if not 0.0 <= decay < 1.0:
        raise TransferError(f"with_average() expects a decay in [0, 1), got {decay}.")
    inner = optax.with_extra_args_support(tx)

    def init(params):
        return AverageState(inner.init(params), jax.tree.map(_at_least_float32, params))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise TransferError("with_average() needs the parameters: call tx.update(gradients, state, params).")
        updates, new = inner.update(updates, state.inner, params, **extra)
        fresh = optax.apply_updates(params, updates)
        mix = lambda old, value: (decay * old + (1.0 - decay) * value).astype(old.dtype)
        return updates, AverageState(new, jax.tree.map(mix, state.average, fresh))

    return optax.GradientTransformationExtraArgs(init, update)


def _at_least_float32(leaf: jax.Array) -> jax.Array:
    return jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))


def averaged(opt_state: Any) -> Any:
    """The moving average that :func:`with_average` keeps, wherever it sits in an optimizer state.

    Raises:
      TransferError: the state holds no average, or more than one.

    >>> import jax.numpy as jnp
    >>> float(averaged((AverageState(None, jnp.ones(())),)))
    1.0
    """
    is_average = lambda node: isinstance(node, AverageState)
    found = [node.average for node in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(node)]
    if len(found) != 1:
        raise TransferError(
            f"expected one moving average in the optimizer state, found {len(found)}: use with_average()."
        )
    return found[0]
