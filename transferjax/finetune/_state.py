"""The state of a fine-tuning run, and how it begins."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from transferjax._errors import SelectionError, TransferError, describe
from transferjax._types import Model, Params, Tuning, counted
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

    def __repr__(self) -> str:
        known = isinstance(self.step, jax.Array) and not isinstance(self.step, Tracer)
        step = f"step {_step(self.step)}, " if known and not self.step.is_deleted() else ""
        others = "".join(
            f", {name} {counted(tree, sizes=False)}"
            for name, tree in (("extra", self.extra), ("optimizer", self.opt_state))
        )
        return f"FinetuneState({step}trainable {counted(self.trainable)}{others})"


def _step(step: jax.Array) -> str:
    """The number of a state, or of several that are stacked."""
    return str(int(step)) if not step.ndim else f"{int(step.max())} of {step.size} runs"


def init(key: jax.Array, model: Model, tuning: Tuning, tx: Any) -> tuple[FinetuneState, Params]:
    """The first state of a fine-tuning run, and the frozen weights.

    Every array of the state is a copy, so that donating it leaves the model alone: ``init`` twice from one model, and
    train both. Frozen weights are shared with the model, never copied, donated or written.

    Args:
      key: typed PRNG key (or raw uint32 key data); it is split between the tuning's new weights and the steps.
      model: a ``Model``.
      tuning: what learns.
      tx: an optax transform; ``per_group`` for a ``chain``.

    Returns:
      ``(state, frozen)``.

    Raises:
      SelectionError: a trainable leaf is no floating-point array, two leaves are one array, or the groups of tuning and
        optimizer differ.
      TransferError: an argument is no key, Model, Tuning or optax transform.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> model = tj.Model(None, None, {"head": jnp.ones(2), "stem": jnp.ones(2)}, {})
    >>> state, frozen = init(jax.random.key(0), model, tj.train("head"), optax.sgd(0.1))
    >>> state.trainable["stem"], frozen["head"]
    (Hole, Hole)
    """
    _check_model(model)
    if not isinstance(tuning, Tuning):
        write = f"tj.train('{tuning}')" if isinstance(tuning, str) else "tj.train('fc/**')"
        raise TransferError(f"init() expects a Tuning third, got {describe(tuning)}: write {write}.")
    check_transform(tx, "init")
    _check_ties(model.params)
    key = _typed(key)
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
    frozen = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, frozen)
    return _committed_alike(state, frozen), frozen


def _committed_alike(state: FinetuneState, frozen: Params) -> FinetuneState:
    """The state, bound to the weights' devices where the weights are.

    What a program returns is bound to devices as soon as one of its inputs is. A state that is free at the first step
    and bound at the second would have the step compiled twice.
    """
    bound = lambda leaf: isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed
    shardings = {leaf.sharding for leaf in jax.tree.leaves((state, frozen)) if bound(leaf)}
    everywhere = next((_everywhere(one) for one in shardings), None)
    if everywhere is None:
        return state
    return jax.tree.map(lambda leaf: leaf if bound(leaf) else jax.device_put(leaf, everywhere), state)


def _everywhere(sharding: Any) -> Any:
    """The sharding that keeps a whole copy on each device of another one."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(), memory_kind=sharding.memory_kind)
    return sharding


def check_transform(tx: Any, name: str) -> None:
    """Whether an optimizer is one."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TransferError(f"{name}() expects an optax transform, got {describe(tx)}: write optax.adamw(1e-3).")


def _check_model(model: Any) -> None:
    if isinstance(model, Model):
        return
    write = "write tj.Model(apply, capture, params, extra)"
    for name, call in (("flax.nnx", "tj.interop.nnx(module)"), ("flax.linen", "tj.interop.linen(module, variables)")):
        flax = sys.modules.get(name)
        if flax is not None and isinstance(model, flax.Module):
            write = f"write {call}"
    raise TransferError(f"init() expects a Model second, got {describe(model)}: {write}.")


def _typed(key: Any) -> Any:
    """A typed key as it is; raw key data wrapped."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if dtype == jnp.uint32 and jnp.ndim(key) == 1:
        return jax.random.wrap_key_data(key)
    raise TransferError(f"init() expects a PRNG key first, got {describe(key)}: write jax.random.key(0).")


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
