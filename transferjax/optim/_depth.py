"""Layer-wise rates: the nearer to the input, the slower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from transferjax._errors import SelectionError, listing
from transferjax.optim._model_paths import resolve
from transferjax.tree import Selector, as_order, flatten


def depth_decay(decay: float | jax.Array, order: Sequence[Selector | str]) -> optax.GradientTransformation:
    """Updates become smaller from output to input: ``decay ** (stages - 1 - position)`` of each.

    Put it last, where it scales learning rates: ``optax.chain(optax.adamw(1e-3), depth_decay(0.75, order))``. In front
    of Adam it does nothing, as Adam divides by the size of its gradients. Weight decay behind which it stands is scaled
    with the rest. Inside ``per_group`` it is for one group, around it for all.

    Args:
      decay: in (0, 1]; a traced scalar too, as in a sweep. Layer-wise decay of vision transformers is .65 to .85.
      order: one selector per stage, from input to output, as for ``transferjax.last``: ``transferjax.models.stages``
        or ``transferjax.stages``. Selectors match model paths: the name of a group is no part of them, and a weight of
        an adapter counts where the leaf does that it adapts. The last of several stages that match a leaf is its own.

    Returns:
      An optax transform without state.

    Raises:
      SelectionError: ``decay`` is no number in (0, 1], or ``order`` no list of selectors; (at ``init``) a trainable
        leaf is in no stage.

    Source: Howard and Ruder, 2018, arXiv:1801.06146; Bao et al., BEiT, 2021, arXiv:2106.08254.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(optax.sgd(1.0), depth_decay(0.5, ["stem", "block", "head"]))
    >>> weights = {"stem": jnp.ones(()), "block": jnp.ones(()), "head": jnp.ones(())}
    >>> updates, _ = tx.update(weights, tx.init(weights), weights)
    >>> [float(updates[name]) for name in ("stem", "block", "head")]
    [-0.25, -0.5, -1.0]
    """
    number = isinstance(decay, (int, float)) and not isinstance(decay, bool)
    if not (number or hasattr(decay, "dtype")) or (number and not 0 < decay <= 1):
        raise SelectionError(f"depth_decay() expects decay as a number in (0, 1], got {decay!r}.")
    stages = as_order(order, "depth_decay")
    if not stages:
        raise SelectionError("depth_decay() got an order without stages. Write tj.models.stages(name).")

    def init(params):
        _positions(params, stages)
        return optax.EmptyState()

    def update(updates, state, params=None):
        at = _positions(updates, stages)
        flat, treedef = flatten(updates)
        scaled: list[Any] = [(leaf * decay ** (len(stages) - 1 - at[path])).astype(leaf.dtype) for path, leaf in flat]
        return jax.tree.unflatten(treedef, scaled), state

    return optax.GradientTransformation(init, update)


def _positions(tree: Any, stages: list[Selector]) -> dict[str, int]:
    """The number of the stage of each trainable leaf."""

    def find(path: str, leaf: Any) -> int | None:
        for name in (path, path.rpartition("/")[0]):  # the weights of an adapter lie below the leaf that they adapt
            found = [number for number, stage in enumerate(stages) if stage(name, leaf)]
            if found:
                return found[-1]
        return None

    found = resolve(tree, find)
    missing = [name for name, number in found.values() if number is None]
    if missing:
        raise SelectionError(
            f"{len(missing)} of {len(found)} trainable leaves are in no stage of depth_decay(): {listing(missing)}. "
            "Add selectors for them to order, where they stand between input and output; or leave depth_decay out of "
            "the transform of their group in tj.per_group."
        )
    return {path: number for path, (_, number) in found.items()}
