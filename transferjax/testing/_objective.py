"""The laws of an Objective."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import LawError, describe
from transferjax._types import Batch, Loss, Model, Objective
from transferjax.testing._compare import broken, require_same
from transferjax.tree import flatten


def check_objective(
    objective: Objective,
    model: Model,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    weights: bool = True,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> None:
    """The laws of an objective: what ``make_step`` and accumulation rely on. It is called in inference mode.

    Args:
      objective: the ``Objective`` under test.
      model: the ``Model`` whose params and extra it takes.
      batch: at least two examples; every entry has the batch as its first axis.
      key: typed PRNG key for its randomness; default ``jax.random.key(0)``.
      weights: whether the value is a mean over examples. Turn it off where examples are compared with each other.
      rtol: relative tolerance of equal values.
      atol: absolute tolerance of equal values.

    Raises:
      LawError: a law is broken: it is a pytree of arrays and numbers that enters jit as an argument; it returns
        ``Loss`` with a floating-point scalar, a dict of scalars and the outline of ``extra``; equal calls give equal
        values; it can be differentiated; an example of weight 2 counts like the example twice, one of weight 0 like
        none, and weights of 1 like no weights.

    >>> import jax.numpy as jnp, transferjax as tj
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(())}, {})
    >>> batch = {"inputs": jnp.arange(3.0), "labels": jnp.ones(3)}
    >>> check_objective(tj.objectives.mean_squared_error(apply), model, batch)
    """
    key = jax.random.key(0) if key is None else key
    close = functools.partial(require_same, rtol=rtol, atol=atol)
    _check_pytree(objective)
    evaluate = lambda part: objective(model.params, model.extra, part, key, False)
    loss = evaluate(batch)
    _check_loss(loss, model)
    require_same("equal calls give equal values", loss, evaluate(batch))
    law = "an objective enters jit as an argument"
    call = lambda objective, params, extra, part, key: objective(params, extra, part, key, False)
    try:
        compiled = jax.jit(call)(objective, model.params, model.extra, dict(batch), key)
    except Exception as error:
        broken(law, f"it raised {type(error).__name__}: {error}", cause=error)
    close(law, _numbers(loss), _numbers(compiled))
    _check_gradient(objective, model, batch, key)
    if weights:
        _check_weights(evaluate, batch, close)


def _check_pytree(objective: Any) -> None:
    law = "an objective is a pytree whose leaves are arrays and numbers"
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(objective)):
        broken(law, f"got {describe(objective)}. Wrap it: jax.tree_util.Partial(function, arrays).")
    for path, leaf in flatten(objective)[0]:
        if not isinstance(leaf, (bool, int, float)) and not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            broken(law, f"got {describe(leaf)}. Use jax.tree_util.Partial for functions too.", path)


def _check_loss(loss: Any, model: Model) -> None:
    law = "an objective returns Loss(value, metrics, extra)"
    if not isinstance(loss, Loss):
        broken(law, f"got {describe(loss)}.")
    if np.shape(loss.value) != () or not jnp.issubdtype(jnp.result_type(loss.value), jnp.floating):
        broken(law, f"the value is {describe(loss.value)}; expected a floating-point scalar.")
    if not isinstance(loss.metrics, dict):
        broken(law, f"the metrics are {describe(loss.metrics)}; expected a dict of scalars.")
    for name, value in loss.metrics.items():
        if not isinstance(name, str) or np.shape(value) != ():
            broken(law, f"the metric is {describe(value)}; expected a scalar.", str(name))
    outline = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)
    require_same("an objective keeps the outline of extra", outline(model.extra), outline(loss.extra))


def _check_gradient(objective: Objective, model: Model, batch: Batch, key: Any) -> None:
    law = "an objective can be differentiated"
    value = lambda params: objective(params, model.extra, batch, key, False).value
    floating = all(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in jax.tree.leaves(model.params))
    try:
        jax.eval_shape(jax.grad(value, allow_int=not floating), model.params)
    except Exception as error:
        broken(law, f"it raised {type(error).__name__}: {error}", cause=error)


def _check_weights(evaluate: Any, batch: Batch, close: Callable[..., None]) -> None:
    batch = dict(batch)
    count = len(jax.tree.leaves(batch)[0])
    weight = np.asarray(batch.pop("weight", np.ones(count, np.float32)), np.float32)
    take = lambda rows, w: {**jax.tree.map(lambda x: jnp.asarray(x)[rows], batch), "weight": jnp.asarray(w)}
    every, last = np.arange(count), count - 1
    factor = lambda f: np.where(every == last, f * weight, weight).astype(np.float32)
    cases = {
        "an example of weight 2 counts like the example twice": (
            take(every, factor(2.0)),
            take(np.append(every, last), np.append(weight, weight[last])),
        ),
        "an example of weight 0 counts like none": (take(every, factor(0.0)), take(every[:-1], weight[:-1])),
        "weights of 1 count like no weights": (
            take(every, np.ones(count, np.float32)),
            {name: value for name, value in take(every, weight).items() if name != "weight"},
        ),
    }
    for law, (first, second) in cases.items():
        try:
            close(law, _numbers(evaluate(second)), _numbers(evaluate(first)))
        except LawError as error:
            raise LawError(
                f"{error} Weight the mean, jnp.sum(batch['weight'] * values) / jnp.sum(batch['weight']), or use "
                "objectives.supervised, which does; pass weights=False where examples are compared with each other."
            ) from None


def _numbers(loss: Loss) -> dict[str, Any]:
    return {"value": loss.value, **loss.metrics}
