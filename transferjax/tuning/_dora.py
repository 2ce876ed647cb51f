"""Weight-decomposed low-rank adaptation."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._types import Tuning
from transferjax.tree import Selector
from transferjax.tuning._kernel import check_whole, low_rank, strength
from transferjax.tuning._lora import adapter
from transferjax.tuning._patterns import per_pattern


def dora(
    selector: Selector | str,
    rank: int | Mapping[str, int],
    *,
    alpha: float | Mapping[str, float] | None = None,
    rank_stabilised: bool = False,
) -> Tuning:
    """Weight-decomposed low-rank adaptation: direction by LoRA, length by a vector of its own.

    A kernel ``W`` becomes ``m * V / ||V||`` with ``V = W + s * A @ B``. The norm is over all axes but the last, and no
    gradient flows through it. A column of length 0 stays as long as ``V`` makes it.

    Args:
      selector: kernels of shape ``[in, out]`` (dense, embeddings) or ``[h, w, in, out]`` (convolution).
      rank: ``r``, or ``{glob: r}``; the first glob that matches a leaf's path counts.
      alpha: ``s = alpha / r``, or ``{glob: alpha}``; ``None`` means ``alpha = r``, so ``s = 1``.
      rank_stabilised: ``s = alpha / sqrt(r)`` instead.

    Returns:
      A ``Tuning``. ``lora_a`` (``[..., in, r]``) and ``lora_b`` (``[r, out]``) as in ``lora``, and ``magnitude``
      (``[out]``), which begins as ``||W||``; all float32.

    Raises:
      SelectionError: the rank is no whole number; (at ``init``) a selected leaf is no kernel, the rank exceeds its
        dimensions, or a mapping fits the leaves badly.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, section 4.3 for the norm's gradient.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = dora("fc/kernel", rank=2).init(jax.random.key(0), {"fc": {"kernel": jnp.ones((4, 3))}})
    >>> {name: leaf.shape for name, leaf in trainable["fc"]["kernel"].items()}
    {'lora_a': (4, 2), 'lora_b': (2, 3), 'magnitude': (3,)}
    """
    build = lambda selector, rank, alpha: _dora(selector, rank, alpha, rank_stabilised)
    return per_pattern("dora", build, selector, {"rank": rank, "alpha": alpha})


def _dora(selector: Selector, rank: int, alpha: float | None, rank_stabilised: bool) -> Tuning:
    check_whole("dora", "rank", rank)
    scale = strength("dora", rank, alpha, rank_stabilised)

    def create(key, path, leaf):
        a, b = low_rank("dora", key, path, leaf, rank)
        return {"lora_a": a, "lora_b": b, "magnitude": _length(leaf, a, b, scale)}

    def lift(weights, leaf):
        from transferjax.program import LowRank, Scaled

        a, b, magnitude = (weights[name] for name in ("lora_a", "lora_b", "magnitude"))
        length = jax.lax.stop_gradient(_length(leaf, a, b, scale))
        factor = jnp.where(length > 0, magnitude / jnp.where(length > 0, length, 1.0), 1.0)
        return Scaled(LowRank(leaf, a, b, scale), factor, (leaf.ndim - 1,))

    return adapter(selector, create, lambda weights, leaf: lift(weights, leaf).dense(), lift=lift)


def _length(kernel: Any, a: Any, b: Any, scale: Any) -> jax.Array:
    """The norm of each column of ``W + s * A @ B``, over all axes but the last, without the sum itself, in float32."""
    from transferjax.program import is_lifted

    w = jnp.asarray(kernel.dense() if is_lifted(kernel) else kernel, jnp.float32).reshape(-1, kernel.shape[-1])
    a = a.reshape(-1, a.shape[-1])
    product = functools.partial(jnp.matmul, precision="highest")
    # ||w + s A b||^2 = ||w||^2 + s b . (2 A' w + s A' A b), one column at a time
    cross = 2.0 * product(a.T, w) + scale * product(product(a.T, a), b)
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(w), 0) + scale * jnp.sum(b * cross, 0), 0.0))
