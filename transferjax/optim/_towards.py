"""Weight decay towards a reference in place of zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transferjax._errors import SelectionError, TransferError, describe, listing
from transferjax._types import Model
from transferjax.optim._model_paths import resolve
from transferjax.tree import flatten, paths


class TowardsState(NamedTuple):
    """State of :func:`decay_towards`: where what learns is drawn to."""

    reference: Any


def decay_towards(strength: float | jax.Array, reference: Any = None) -> optax.GradientTransformation:
    """Adds ``strength * (param - reference)`` to the updates: weight decay whose centre is the source, not zero.

    In front of an optimizer it is coupled, the gradient of ``strength / 2 * ||param - reference||^2`` (L2-SP):
    ``optax.chain(decay_towards(0.01), optax.sgd(0.1))``. Behind the scaling it is decoupled, as the weight decay of
    AdamW: ``optax.chain(optax.scale_by_adam(), decay_towards(0.01), optax.scale_by_learning_rate(1e-3))``.

    Args:
      strength: at least 0; a traced scalar too, as in a sweep.
      reference: params of the source; paths are those of the model, without the name of a group. ``None``: the values
        at ``init``, which for a fresh head or an adapter are its first ones.

    Returns:
      An optax transform whose state is the reference of what learns, in its dtypes.

    Raises:
      SelectionError: ``strength`` is no number of at least 0, or ``reference`` a Model; (at ``init``) a trainable leaf
        is not in the reference, or of another shape.
      TransferError: (at ``update``) the parameters are missing.

    Source: Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    2018, arXiv:1802.01483.

    >>> tx = optax.chain(decay_towards(0.5), optax.sgd(1.0))
    >>> state = tx.init(jnp.array(1.0))
    >>> updates, _ = tx.update(jnp.array(0.0), state, jnp.array(3.0))
    >>> float(updates)
    -1.0
    """
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not (number or hasattr(strength, "dtype")) or (number and not strength >= 0):
        raise SelectionError(f"decay_towards() expects strength as a number of at least 0, got {strength!r}.")
    if isinstance(reference, Model):
        raise SelectionError("decay_towards() expects params as reference, got a Model: write reference=model.params.")

    def init(params):
        # Copied: a state that shares its arrays with the parameters could not be donated together with them.
        given = params if reference is None else _of(reference, params)
        return TowardsState(jax.tree.map(lambda leaf, own: jnp.array(leaf, own.dtype, copy=True), given, params))

    def update(updates, state, params=None):
        if params is None:
            raise TransferError("decay_towards() needs the parameters: call tx.update(gradients, state, params).")
        pull = lambda update, param, centre: (update + strength * (param - centre)).astype(update.dtype)
        return jax.tree.map(pull, updates, params, state.reference), state

    return optax.GradientTransformation(init, update)


def _of(reference: Any, params: Any) -> Any:
    """The leaves of the reference in the structure of what learns."""
    known = paths(reference)
    # A source knows nothing of the two parts of an extended model's params.
    name_of = lambda path: next((name for name in (path, path.removeprefix("model/")) if name in known), None)
    found = resolve(params, lambda path, leaf: name_of(path))
    missing = [path for path, name in found.values() if name is None]
    if missing:
        raise SelectionError(
            f"decay_towards() has no reference for {len(missing)} of {len(found)} trainable leaves: "
            f"{listing(missing)}. Put it into the transforms of the other groups of tj.per_group, or leave reference "
            "out: then all are drawn to their first values."
        )
    flat, treedef = flatten(params)
    leaves = [known[found[path][1]] for path, _ in flat]
    for (path, leaf), other in zip(flat, leaves, strict=True):
        if jnp.shape(other) != jnp.shape(leaf):
            raise SelectionError(
                f"decay_towards(): '{found[path][0]}' is {describe(leaf)} and its reference {describe(other)}. "
                "Expected equal shapes: give a head of another size its own group of tj.per_group, without it."
            )
    return jax.tree.unflatten(treedef, leaves)
