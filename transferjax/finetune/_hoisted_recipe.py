"""A sweep over what is left of a loss once the frozen part of it is computed."""

from __future__ import annotations

from jax.tree_util import Partial

from transferjax._errors import TransferError, describe
from transferjax._types import Model, Tuning
from transferjax.finetune._hoist import Hoisted
from transferjax.finetune._hyper import Recipe


def hoisted_recipe(recipe: Recipe, hoisted: Hoisted, model: Model) -> tuple[Recipe, Model]:
    """The recipe and the model of a ``sweep`` whose batches are residuals: what runs share is computed once for all.

    Every run trains the second part of the loss on what the first part left of each example, so hundreds of heads cost
    one pass of the frozen network, and the time of the heads.

    Args:
      recipe: as for ``sweep``; its tuning does not depend on the hyperparameters.
      hoisted: from ``hoist``, of a step that this recipe makes.
      model: as for ``sweep``.

    Returns:
      ``(recipe, model)`` for ``sweep`` or ``start_runs``, whose batches come from ``residuals`` or ``hoisted.prefix``.
      States are those of the recipe that was given. The model merges before it is applied, so that validation batches
      are ordinary ones.

    Raises:
      TransferError: ``hoisted`` is not from ``hoist``.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda p, extra, x, *, key=None, train=False: (jnp.tanh(x @ p["stem"]) @ p["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones((3, 2)), "stem": jnp.ones((8, 3))}, {})
    >>> recipe = lambda h: (tj.objectives.cross_entropy(apply), tj.train("head"), optax.sgd(h.get("lr", 0.1)))
    >>> objective, tuning, tx = recipe({})
    >>> state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    >>> batch = {"inputs": jnp.ones((4, 8)), "labels": jnp.zeros(4, int)}
    >>> hoisted = tj.hoist(tj.make_step(objective, tuning, tx), state, frozen, batch)
    >>> residual = hoisted.prefix(frozen, state.extra, objective, batch)
    >>> grid = {"lr": [0.1, 0.2], "seed": [0, 0]}
    >>> apart, for_validation = hoisted_recipe(recipe, hoisted, model)
    >>> found = tj.sweep(apart, grid, for_validation, [residual])
    >>> found.state.trainable["head"].shape
    (3, 2)
    """
    if not isinstance(hoisted, Hoisted):
        raise TransferError(f"hoisted_recipe() expects a Hoisted second, got {describe(hoisted)}: write tj.hoist(...).")
    tuning = hoisted.step.step.tuning

    def call(objective, params, extra, residual, key, train):
        trainable, frozen = params
        return hoisted.suffix(trainable, frozen, extra, objective, residual, key)

    def apart(hyper):
        objective, own, tx = recipe(hyper)
        return Partial(call, objective), _apart(own), tx

    def apply(params, extra, inputs, **options):
        return model.apply(tuning.merge(*params), extra, inputs, **options)

    return apart, model._replace(apply=apply)


def _apart(tuning: Tuning) -> Tuning:
    """A tuning that merges nothing: the second part takes what learns and what is frozen apart."""

    def init(key, params):
        return tuning.init(key, tuning.merge(*params) if isinstance(params, tuple) else params)

    return Tuning(init, lambda trainable, frozen: (trainable, frozen))
