"""Dropout in front of low-rank adapters, in training steps only."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._context import current_step
from transferjax._errors import SelectionError, describe
from transferjax._types import PyTree, Tuning
from transferjax.tree import flatten
from transferjax.tuning._vera import check_seed


def lora_dropout(tuning: Tuning, rate: float, *, seed: int = 0) -> Tuning:
    """A LoRA tuning in which each training step leaves out some of the inputs of every adapter.

    Each input feature reaches an adapter with probability ``1 - rate``, times ``1 / (1 - rate)``; the frozen kernel
    sees all of them. As ``dropout(x) @ A`` with one draw for all rows of ``x`` is ``x`` times ``A`` with rows left
    out, it is rows of ``lora_a`` that are dropped, a row per input (of a convolution: per tap and input channel).
    Steps of ``make_step`` drop, each step anew; ``merge`` and the lifted form outside of a step never do, so
    evaluation and export see the whole adapter.

    Hugging Face PEFT's ``lora_dropout`` draws anew for each example and position. The mean is the same, one draw for
    the whole batch is noisier; a draw depends on ``seed``, the step and the path, and is the same for all parts of an
    accumulated batch. Embedding tables are not dropped, as in PEFT.

    Args:
      tuning: ``lora``, ``pissa``, ``olora`` or ``eva``, or a ``chain`` with one of them.
      rate: probability that an input is left out, in [0, 1); it may be a scalar array, such as a value of a sweep.
      seed: of the draws, a whole number.

    Returns:
      A ``Tuning`` with the same ``init`` and the same trainable paths.

    Raises:
      SelectionError: the rate is outside [0, 1), or the seed no whole number; (at ``init``) the tuning has no
        ``lora_a``, or has a magnitude, whose norm would change from draw to draw (DoRA).

    Source: Lin et al., "LoRA Dropout as a Sparsity Regularizer for Overfitting Control", arXiv:2404.09610, on the
    inputs; for all rows of a batch alike, Hugging Face PEFT's ``lora_dropout``.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> model = tj.interop.pure(lambda params, x: x @ params["kernel"], {"kernel": jnp.ones((8, 4))})
    >>> tuning, tx = lora_dropout(tj.lora("kernel", rank=2), 0.5), optax.sgd(0.1)
    >>> state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    >>> step = tj.make_step(tj.objectives.mean_squared_error(model.apply), tuning, tx)
    >>> before = tj.copy(state.trainable)
    >>> state, _ = step(state, frozen, {"inputs": jnp.ones((2, 8)), "labels": jnp.zeros((2, 4))})
    >>> bool(jnp.any(state.trainable["kernel"]["lora_b"] != before["kernel"]["lora_b"]))
    True
    """
    if not isinstance(tuning, Tuning):
        raise SelectionError(f"lora_dropout() expects a Tuning first, got {describe(tuning)}: write tj.lora(...).")
    number = isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 <= rate < 1
    if not number and getattr(rate, "shape", None) != ():
        raise SelectionError(f"lora_dropout() expects a rate from 0 to below 1, got {rate!r}.")
    check_seed("lora_dropout", seed)

    def init(key, params):
        trainable, frozen = tuning.init(key, params)
        owners = {path.rpartition("/")[::2] for path, _ in flatten(trainable)[0]}
        adapted = sorted(owner for owner, name in owners if name == "lora_a")
        if not adapted:
            raise SelectionError(
                "lora_dropout() found no lora_a among the trainable leaves. Expected tj.lora, pissa, olora or eva, or "
                "a chain with one of them."
            )
        for owner in adapted:
            if (owner, "magnitude") in owners:
                raise SelectionError(
                    f"lora_dropout() does not apply to DoRA: '{owner}' has a magnitude, and its norm would change "
                    "with every draw. Use tj.lora there."
                )
        return trainable, frozen

    def dropped(form: Any) -> Any:
        def run(trainable, frozen):
            step = current_step()
            return form(trainable if step is None else _thinned(trainable, rate, seed, step), frozen)

        return run

    return Tuning(init, dropped(tuning.merge), None if tuning.lifted is None else dropped(tuning.lifted))


def _thinned(trainable: PyTree, rate: Any, seed: int, step: Any) -> PyTree:
    """The adapters with some rows of each ``lora_a`` zero and the others larger, as drawn for this step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    flat, treedef = flatten(trainable)

    def one(path: str, leaf: Any) -> Any:
        owner, _, name = path.rpartition("/")
        if name != "lora_a" or owner.rpartition("/")[2] == "embedding":
            return leaf
        kept = jax.random.bernoulli(jax.random.fold_in(key, zlib.crc32(path.encode())), 1 - rate, leaf.shape[:-1])
        return jnp.where(kept[..., None], leaf / (1 - rate), 0).astype(leaf.dtype)

    return jax.tree.unflatten(treedef, [one(path, leaf) for path, leaf in flat])
