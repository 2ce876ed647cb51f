"""How fast each group learns."""

from __future__ import annotations

from typing import Any

import optax

from transferjax._errors import SelectionError, describe, listing


def per_group(**named: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """One optax transform per group of a ``transferjax.chain``.

    Clipping inside a group sees that group; ``optax.chain(optax.clip_by_global_norm(1.0), per_group(...))`` sees
    all trainable leaves.

    Args:
      **named: one transform for each group name of the tuning.

    Returns:
      An optax transform over ``{group: tree}``.

    Raises:
      SelectionError: a value is no optax transform; (at ``init``) the names differ from the tuning's, and the
        difference is named.

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
    for name, tx in named.items():
        if not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise SelectionError(
                f"per_group() expects an optax transform for '{name}', got {describe(tx)}: "
                f"write {name}=optax.adamw(1e-3)."
            )
    transforms = {name: optax.with_extra_args_support(tx) for name, tx in named.items()}

    def check(tree: Any) -> None:
        if not isinstance(tree, dict):
            raise SelectionError(_without_groups(sorted(named), f"{describe(tree)} came"))
        missing, surplus = sorted(set(tree) - set(named)), sorted(set(named) - set(tree))
        if (missing or surplus) and not are_groups(tree):
            raise SelectionError(_without_groups(sorted(named), f"its parameters {listing(sorted(tree))} came"))
        if missing or surplus:
            write = ", ".join(f"{name}=..." for name in sorted(tree))
            raise SelectionError(
                f"per_group() and the tuning name different groups. Only in the tuning: {missing or 'none'}. "
                f"Only in per_group: {surplus or 'none'}. Write per_group({write}), or name the groups of the tuning "
                f"so: tj.chain({', '.join(f'{name}=...' for name in sorted(named))})."
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


def are_groups(tree: dict[str, Any]) -> bool:
    """Whether a dict can be what a chain trains: every group has the outline of the same parameters."""
    outlines = {tuple(sorted(map(str, group))) if isinstance(group, dict) else None for group in tree.values()}
    return len(outlines) == 1


def _without_groups(names: list[str], came: str) -> str:
    write = ", ".join(f"{name}=..." for name in names)
    return (
        f"per_group() has the groups {names}, but the tuning has none ({came}). "
        f"Wrap the tuning: tj.chain({write}), or use a plain optax transform."
    )
