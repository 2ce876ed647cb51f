"""How fast each group learns."""

from __future__ import annotations

from typing import Any

import optax

from transferjax._errors import SelectionError, describe


def per_group(**named: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """One optax transform per group of a ``transferjax.chain``.

    Clipping inside a group sees that group; ``optax.chain(optax.clip_by_global_norm(1.0), per_group(...))`` sees
    all trainable leaves.

    Args:
      **named: one transform for each group name of the tuning.

    Returns:
      An optax transform over ``{group: tree}``.

    Raises:
      SelectionError: (at ``init``) the names differ from the tuning's; the difference is named.

    >>> import jax.numpy as jnp
    >>> tx = per_group(head=optax.sgd(1.0), lora=optax.sgd(0.5))
    >>> trainable = {"head": jnp.zeros(()), "lora": jnp.zeros(())}
    >>> gradients = {"head": jnp.ones(()), "lora": jnp.ones(())}
    >>> updates, _ = tx.update(gradients, tx.init(trainable), trainable)
    >>> {name: float(value) for name, value in updates.items()}
    {'head': -1.0, 'lora': -0.5}
    """
    if not named:
        raise SelectionError("per_group() expects at least one group, for example per_group(head=optax.adamw(1e-3)).")
    transforms = {name: optax.with_extra_args_support(tx) for name, tx in named.items()}

    def check(tree: Any) -> None:
        if not isinstance(tree, dict):
            raise SelectionError(
                f"per_group() has the groups {sorted(named)}, but the tuning has none ({describe(tree)} came). "
                "Use transferjax.chain(...) with these names, or a plain optax transform."
            )
        missing, surplus = sorted(set(tree) - set(named)), sorted(set(named) - set(tree))
        if missing or surplus:
            raise SelectionError(
                f"per_group() and the tuning name different groups. Only in the tuning: {missing or 'none'}. "
                f"Only in per_group: {surplus or 'none'}."
            )

    def init(params):
        check(params)
        return {name: tx.init(params[name]) for name, tx in transforms.items()}

    def update(updates, state, params=None, **extra):
        check(updates)
        out, new = {}, {}
        for name, tx in transforms.items():
            inner = None if params is None else params[name]
            out[name], new[name] = tx.update(updates[name], state[name], inner, **extra)
        return out, new

    return optax.GradientTransformationExtraArgs(init, update)
