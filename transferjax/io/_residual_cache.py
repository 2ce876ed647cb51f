"""The cache of what a hoisted step computes once per example."""

from __future__ import annotations

import os
from typing import Any

from transferjax._errors import TransferError, describe
from transferjax.io._feature_cache import FeatureCache


def residual_cache(
    hoisted: Any,
    state: Any,
    frozen: Any,
    *,
    preprocess: Any = None,
    path: str | os.PathLike[str] | None = None,
    memory_bytes: int = 1 << 30,
) -> FeatureCache:
    """A cache for ``transferjax.fit(..., cache=...)``, bound to the weights and the program that fill it.

    Args:
      hoisted: from ``transferjax.hoist``.
      state: the ``FinetuneState``, for the statistics in its ``extra``.
      frozen: the frozen weights.
      preprocess: what happened to the inputs before they became a batch: text, or a value whose ``repr`` says it all.
      path: of a folder, so that another run of the same base can go on with it; ``None``: in memory only.
      memory_bytes: of rows in memory.

    Returns:
      A :class:`FeatureCache`, whose ``options`` are those of ``hoist``: ``fit`` hoists with them. With copies it holds
      one row for each copy of an example. Which one a step uses is the batch's entry ``epoch`` modulo their number, or,
      where there is none, how often ``fit`` has met the example: give ``epoch`` where a run is to be resumed.

    Raises:
      TransferError: ``hoisted`` or ``state`` is something else.
      CheckpointError: the folder was filled by other weights, preprocessing or another program, or is no cache.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda p, extra, x, *, key=None, train=False: (jnp.tanh(x @ p["stem"]) @ p["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones((3, 2)), "stem": jnp.ones((8, 3))}, {})
    >>> tuning, tx = tj.train("head"), optax.sgd(0.1)
    >>> step = tj.make_step(tj.objectives.cross_entropy(apply), tuning, tx)
    >>> state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    >>> batch = {"inputs": jnp.ones((4, 8)), "labels": jnp.zeros(4, int), "id": jnp.arange(4)}
    >>> cache = residual_cache(tj.hoist(step, state, frozen, batch), state, frozen)
    >>> steps = list(tj.fit(step, state, frozen, [batch, batch, batch], cache=cache))
    >>> len(steps), len(cache), cache.bytes
    (3, 4, 64)
    """
    if not hasattr(hoisted, "prefix_jaxpr"):
        raise TransferError(
            f"residual_cache() expects a Hoisted first, got {describe(hoisted)}: write tj.hoist(step, state, frozen, "
            "batch)."
        )
    if not hasattr(state, "extra"):
        raise TransferError(
            f"residual_cache() expects a FinetuneState second, got {describe(state)}: write residual_cache(hoisted, "
            "state, frozen)."
        )
    weights = hoisted.reads(state, frozen)
    program = str(hoisted.prefix_jaxpr())
    fingerprint = FeatureCache.fingerprint_of(weights, preprocess, program)
    cache = FeatureCache(path, fingerprint=fingerprint, memory_bytes=memory_bytes)
    cache.options = hoisted.options
    return cache
