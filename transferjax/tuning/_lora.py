"""Low-rank adaptation, in merge form."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import SelectionError, describe, is_whole
from transferjax._types import Hole, Tuning, is_hole
from transferjax.tree import Selector, as_selector, flatten, matches


def adapter(
    selector: Selector | str,
    create: Callable[[jax.Array, str, Any], dict[str, Any]],
    combine: Callable[[dict[str, Any], Any], Any],
) -> Tuning:
    """A tuning that puts new weights beside frozen leaves: the frame of every adapter.

    Args:
      selector: which leaves are adapted.
      create: ``(key, path, leaf) -> {name: array}``, the new weights of one leaf; the key differs per path and
        is consumed.
      combine: ``(weights, leaf) -> leaf``, the adapted leaf; equal to ``leaf`` for fresh weights.

    Returns:
      A ``Tuning`` whose trainable paths are ``<path>/<name>`` and whose frozen tree keeps the leaf.

    Raises:
      SelectionError: (at ``init``) the selector matches nothing, or ``create`` returns no dict of arrays.

    >>> import jax, jax.numpy as jnp
    >>> scale = adapter("fc", lambda key, path, leaf: {"scale": jnp.ones(())}, lambda w, leaf: leaf * w["scale"])
    >>> trainable, frozen = scale.init(jax.random.key(0), {"fc": jnp.ones(2)})
    >>> sorted(trainable["fc"]), scale.merge(trainable, frozen)["fc"].shape
    (['scale'], (2,))
    """
    selector = as_selector(selector)

    def init(key, params):
        chosen = set(matches(params, selector))
        flat, treedef = flatten(params)
        fresh = [
            _named_arrays(create(jax.random.fold_in(key, zlib.crc32(path.encode())), path, leaf), path)
            if path in chosen
            else Hole()
            for path, leaf in flat
        ]
        return jax.tree.unflatten(treedef, fresh), params

    def merge(trainable, frozen):
        leaves, treedef = jax.tree.flatten(frozen, is_leaf=is_hole)
        weights = treedef.flatten_up_to(trainable)
        out = [leaf if is_hole(w) else combine(w, leaf) for w, leaf in zip(weights, leaves, strict=True)]
        return jax.tree.unflatten(treedef, out)

    return Tuning(init, merge)


def _named_arrays(weights: Any, path: str) -> dict[str, Any]:
    """What ``create`` returned for one leaf, checked."""
    came = None
    if not isinstance(weights, dict):
        came = describe(weights)
    elif not weights:
        came = "an empty dict"
    else:
        for name, value in weights.items():
            if not isinstance(name, str) or not (hasattr(value, "shape") and hasattr(value, "dtype")):
                came = f"{describe(value)} under {name!r}"
    if came is not None:
        raise SelectionError(
            f"adapter() expects create to return a dict {{name: array}}; for '{path}' it returned {came}. "
            "Write, for example, {'scale': jnp.ones(())}."
        )
    return weights


def lora(selector: Selector | str, rank: int, *, alpha: float | None = None, rank_stabilised: bool = False) -> Tuning:
    """Low-rank adaptation: a kernel ``W`` becomes ``W + s * A @ B``, and only ``A`` and ``B`` learn.

    Args:
      selector: kernels of shape ``[in, out]`` (dense) or ``[h, w, in, out]`` (convolution).
      rank: ``r``, the width of the bottleneck.
      alpha: ``s = alpha / r``; ``None`` means ``alpha = r``, so ``s = 1``.
      rank_stabilised: ``s = alpha / sqrt(r)`` instead (rsLoRA).

    Returns:
      A ``Tuning``. ``lora_a`` has shape ``[..., in, r]`` (Kaiming-uniform, a = sqrt 5), ``lora_b`` has shape
      ``[r, out]`` (zeros), both float32. Merging promotes: a bfloat16 kernel with float32 adapters merges in float32.

    Raises:
      SelectionError: (at ``init``) a selected leaf is no kernel, or the rank exceeds its dimensions.

    Source: Hu et al., "LoRA", 2021; conventions as in Hugging Face PEFT.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = lora("fc/kernel", rank=2).init(jax.random.key(0), {"fc": {"kernel": jnp.ones((8, 4))}})
    >>> {name: leaf.shape for name, leaf in trainable["fc"]["kernel"].items()}
    {'lora_a': (8, 2), 'lora_b': (2, 4)}
    """
    if not is_whole(rank):
        raise SelectionError(f"lora() expects a whole number of at least 1 as rank, got {rank!r}.")
    scale = (rank if alpha is None else alpha) / (math.sqrt(rank) if rank_stabilised else rank)

    def create(key, path, leaf):
        shape = [int(size) for size in getattr(leaf, "shape", ())]
        if len(shape) not in (2, 4) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise SelectionError(
                f"lora() expects kernels [in, out] or [h, w, in, out]; '{path}' is {describe(leaf)}. "
                "Narrow the selector, for example to '**/kernel'."
            )
        fan_in, out = math.prod(shape[:-1]), shape[-1]
        if rank > min(fan_in, out):
            raise SelectionError(
                f"lora() got rank {rank} for '{path}' {describe(leaf)}: expected at most {min(fan_in, out)}, "
                "the smaller of its input and output widths."
            )
        bound = 1.0 / math.sqrt(fan_in)
        return {
            "lora_a": jax.random.uniform(key, (*shape[:-1], rank), jnp.float32, -bound, bound),
            "lora_b": jnp.zeros((rank, out), jnp.float32),
        }

    def combine(weights, leaf):
        return leaf + scale * (weights["lora_a"] @ weights["lora_b"])

    return adapter(selector, create, combine)
