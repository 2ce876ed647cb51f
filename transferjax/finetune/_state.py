"""The state of a fine-tuning run, and how it begins."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import SelectionError, describe
from transferjax._types import Model, Params, Tuning
from transferjax.tree import copy, paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FinetuneState:
    """All that changes during fine-tuning; with the data iterator's state, all that resuming needs.

    Attributes:
      step: number of optimizer steps taken, scalar int32.
      key: typed PRNG key; each step folds its number in, so the key itself stays.
      trainable: what learns, as the tuning's ``init`` made it; never a frozen weight.
      extra: what gradients do not learn (BatchNorm statistics).
      opt_state: the optimizer's state, for trainable leaves only.
    """

    step: Any
    key: Any
    trainable: Any
    extra: Any
    opt_state: Any


def init(key: jax.Array, model: Model, tuning: Tuning, tx: Any) -> tuple[FinetuneState, Params]:
    """The first state of a fine-tuning run, and the frozen weights.

    Every array of the state is a copy, so that donating it leaves the model alone: ``init`` twice from one model, and
    train both. Frozen weights are shared with the model, never copied, donated or written.

    Args:
      key: typed PRNG key; it is split between the tuning's new weights and the steps.
      model: a ``Model``.
      tuning: what learns.
      tx: an optax transform; ``per_group`` for a ``chain``.

    Returns:
      ``(state, frozen)``.

    Raises:
      SelectionError: a trainable leaf is no floating-point array, two leaves are one array, or the groups of tuning and
        optimizer differ.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> model = tj.Model(None, None, {"head": jnp.ones(2), "stem": jnp.ones(2)}, {})
    >>> state, frozen = init(jax.random.key(0), model, tj.train("head"), optax.sgd(0.1))
    >>> state.trainable["stem"], frozen["head"]
    (Hole, Hole)
    """
    _check_ties(model.params)
    key_tuning, key_state = jax.random.split(key)
    trainable, frozen = tuning.init(key_tuning, model.params)
    for path, leaf in paths(trainable).items():
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise SelectionError(
                f"'{path}' is {describe(leaf)}, which gradients cannot train. Expected floating-point leaves: "
                "leave it out of the tuning's selector."
            )
    trainable = copy(trainable)
    state = FinetuneState(
        step=jnp.zeros((), jnp.int32),
        key=key_state,
        trainable=trainable,
        extra=copy(model.extra),
        opt_state=copy(tx.init(trainable)),
    )
    return state, jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, frozen)


def _check_ties(params: Params) -> None:
    seen: dict[int, str] = {}
    for path, leaf in paths(params).items():
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            continue
        if id(leaf) in seen:
            raise SelectionError(
                f"'{seen[id(leaf)]}' and '{path}' are one array. Trained as two leaves they would drift apart: declare "
                f"the tie with transferjax.interop.tie(model, {{'{path}': '{seen[id(leaf)]}'}}), or copy one of them."
            )
        seen[id(leaf)] = path
