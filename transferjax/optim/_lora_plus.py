"""LoRA+: the second factor of an adapter learns faster than the first."""

from __future__ import annotations

from typing import Any

import jax
import optax

from transferjax._errors import SelectionError, describe
from transferjax.tree import flatten

FAST = "lora_b"


def lora_plus(
    tx: optax.GradientTransformation, ratio: float = 16.0, *, leaf: str = FAST
) -> optax.GradientTransformationExtraArgs:
    """Any optax transform, with ``ratio`` times the learning rate for ``lora_b``, the factor that begins as zeros.

    The updates of these leaves are multiplied after ``tx``; weight decay that ``tx`` scales with its learning rate is
    multiplied with it.

    Args:
      tx: the transform, its learning rate included.
      ratio: how much faster, above 0.
      leaf: the name of the leaves: the last segment of their paths.

    Returns:
      An optax transform with the state of ``tx``.

    Raises:
      SelectionError: ``tx`` is no optax transform or ``ratio`` no number above 0; (at ``init``) no leaf has the name.

    Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024.

    >>> import jax.numpy as jnp
    >>> tx = lora_plus(optax.sgd(1.0), 4.0)
    >>> trainable = {"lora_a": jnp.zeros(()), "lora_b": jnp.zeros(())}
    >>> updates, _ = tx.update({"lora_a": jnp.ones(()), "lora_b": jnp.ones(())}, tx.init(trainable), trainable)
    >>> {name: float(value) for name, value in updates.items()}
    {'lora_a': -1.0, 'lora_b': -4.0}
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise SelectionError(f"lora_plus() expects an optax transform, got {describe(tx)}: write optax.adamw(1e-4).")
    if isinstance(ratio, (str, bool)) or (isinstance(ratio, (int, float)) and not ratio > 0):
        raise SelectionError(f"lora_plus() expects ratio as a number above 0, got {ratio!r}.")
    inner = optax.with_extra_args_support(tx)

    def init(params):
        if not any(_is_fast(path) for path, _ in flatten(params)[0]):
            raise SelectionError(
                f"lora_plus() found no leaf '{leaf}' among the trainable ones. Expected the weights of tj.lora, or "
                "leaf=... for another adapter."
            )
        return inner.init(params)

    def update(updates, state, params=None, **extra):
        updates, state = inner.update(updates, state, params, **extra)
        flat, treedef = flatten(updates)
        scaled: list[Any] = [value * ratio if _is_fast(path) else value for path, value in flat]
        return jax.tree.unflatten(treedef, scaled), state

    def _is_fast(path: str) -> bool:
        return path.rpartition("/")[2] == leaf

    return optax.GradientTransformationExtraArgs(init, update)
