"""Adapters whose change of a kernel is another kind of product: Hadamard, Kronecker, with the kernel, repetition."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from transferjax._types import Tuning
from transferjax.tree import Selector
from transferjax.tuning._kernel import check_rank, check_whole, kaiming, low_rank, strength, widths
from transferjax.tuning._lora import adapter
from transferjax.tuning._patterns import per_pattern


def loha(
    selector: Selector | str, rank: int | Mapping[str, int], *, alpha: float | Mapping[str, float] | None = None
) -> Tuning:
    """Low-rank Hadamard product: ``W + s * (A1 @ B1) * (A2 @ B2)``, of rank up to ``r ** 2``.

    Args:
      selector: kernels of shape ``[in, out]`` (dense, embeddings) or ``[h, w, in, out]`` (convolution).
      rank: ``r``, or ``{glob: r}``; the first glob that matches a leaf's path counts.
      alpha: ``s = alpha / r``, or ``{glob: alpha}``; ``None`` means ``alpha = r``, so ``s = 1``.

    Returns:
      A ``Tuning``. ``loha_w1_a`` and ``loha_w2_a`` (``[..., in, r]``), ``loha_w1_b`` and ``loha_w2_b`` (``[r, out]``),
      float32, Kaiming-uniform with a = sqrt 5; ``loha_w2_b`` begins as zeros.

    Raises:
      SelectionError: the rank is no whole number; (at ``init``) a selected leaf is no kernel, the rank exceeds its
        dimensions, or a mapping fits the leaves badly.

    Source: Hyeon-Woo et al., "FedPara", 2022; Yeh et al., "LyCORIS", 2024.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = loha("fc/kernel", rank=2).init(jax.random.key(0), {"fc": {"kernel": jnp.ones((4, 3))}})
    >>> {name: leaf.shape for name, leaf in trainable["fc"]["kernel"].items()}
    {'loha_w1_a': (4, 2), 'loha_w1_b': (2, 3), 'loha_w2_a': (4, 2), 'loha_w2_b': (2, 3)}
    """
    return per_pattern("loha", _loha, selector, {"rank": rank, "alpha": alpha})


def _loha(selector: Selector, rank: int, alpha: float | None) -> Tuning:
    check_whole("loha", "rank", rank)
    scale = strength("loha", rank, alpha)

    def create(key, path, leaf):
        one, two, three = jax.random.split(key, 3)
        a1, zeros = low_rank("loha", one, path, leaf, rank)
        a2, _ = low_rank("loha", two, path, leaf, rank)
        b1 = kaiming(three, zeros.shape, rank)
        return {"loha_w1_a": a1, "loha_w1_b": b1, "loha_w2_a": a2, "loha_w2_b": zeros}

    def combine(weights, leaf):
        first = weights["loha_w1_a"] @ weights["loha_w1_b"]
        return leaf + scale * first * (weights["loha_w2_a"] @ weights["loha_w2_b"])

    return adapter(selector, create, combine)


def lokr(selector: Selector | str, rank: int, *, alpha: float | None = None) -> Tuning:
    """Low-rank Kronecker product: ``W + s * kron(W1, W2)``.

    ``in = i1 * i2`` and ``out = o1 * o2`` are split as near to their square roots as whole numbers allow. ``W1``
    (``[i1, o1]``) is full; ``W2`` (``[i2, o2]``) is a product of rank ``r`` where that is smaller, that is, where ``r``
    is below half of its longer side, and full elsewhere.

    Args:
      selector: kernels of shape ``[in, out]``.
      rank: ``r``; any size, as it only says when ``W2`` is a product.
      alpha: ``s = alpha / r``; ``None`` means ``s = 1``.

    Returns:
      A ``Tuning``. ``lokr_w1`` (zeros), and ``lokr_w2``, or ``lokr_w2_a`` (``[i2, r]``) and ``lokr_w2_b``
      (``[r, o2]``); float32, Kaiming-uniform with a = sqrt 5.

    Raises:
      SelectionError: the rank is no whole number; (at ``init``) a selected leaf is no kernel ``[in, out]``.

    Source: Edalati et al., "KronA", 2022; Yeh et al., "LyCORIS", 2024; splits as in Hugging Face PEFT.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = lokr("fc/kernel", rank=1).init(jax.random.key(0), {"fc": {"kernel": jnp.ones((12, 8))}})
    >>> {name: leaf.shape for name, leaf in trainable["fc"]["kernel"].items()}
    {'lokr_w1': (3, 2), 'lokr_w2_a': (4, 1), 'lokr_w2_b': (1, 4)}
    """
    check_whole("lokr", "rank", rank)
    scale = strength("lokr", rank, alpha)

    def create(key, path, leaf):
        (wide,), out = widths("lokr", path, leaf, (2,))
        (i1, i2), (o1, o2) = _halves(wide), _halves(out)
        weights = {"lokr_w1": jnp.zeros((i1, o1), jnp.float32)}
        if rank >= max(i2, o2) / 2:
            return {**weights, "lokr_w2": kaiming(key, (i2, o2), i2)}
        one, two = jax.random.split(key)
        return {**weights, "lokr_w2_a": kaiming(one, (i2, rank), i2), "lokr_w2_b": kaiming(two, (rank, o2), rank)}

    def combine(weights, leaf):
        second = weights["lokr_w2"] if "lokr_w2" in weights else weights["lokr_w2_a"] @ weights["lokr_w2_b"]
        return leaf + scale * jnp.kron(weights["lokr_w1"], second)

    return adapter(selector, create, combine)


def _halves(size: int) -> tuple[int, int]:
    """Two whole numbers whose product is ``size``, as near to each other as can be, the smaller one first."""
    small = next(one for one in range(math.isqrt(size), 0, -1) if size % one == 0)
    return small, size // small


def hira(selector: Selector | str, rank: int | Mapping[str, int]) -> Tuning:
    """High-rank adaptation: ``W + W * (A @ B)``, a change of high rank from factors of low rank.

    Args:
      selector: kernels of shape ``[in, out]`` (dense, embeddings) or ``[h, w, in, out]`` (convolution).
      rank: ``r``, or ``{glob: r}``; the first glob that matches a leaf's path counts.

    Returns:
      A ``Tuning``. ``hira_a`` (``[..., in, r]``, Kaiming-uniform with a = sqrt 5) and ``hira_b`` (``[r, out]``, zeros),
      float32.

    Raises:
      SelectionError: the rank is no whole number; (at ``init``) a selected leaf is no kernel, the rank exceeds its
        dimensions, or the mapping fits the leaves badly.

    Source: Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation", 2025.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = hira("fc/kernel", rank=2).init(jax.random.key(0), {"fc": {"kernel": jnp.ones((4, 3))}})
    >>> {name: leaf.shape for name, leaf in trainable["fc"]["kernel"].items()}
    {'hira_a': (4, 2), 'hira_b': (2, 3)}
    """
    return per_pattern("hira", _hira, selector, {"rank": rank})


def _hira(selector: Selector, rank: int) -> Tuning:
    check_whole("hira", "rank", rank)

    def create(key, path, leaf):
        a, b = low_rank("hira", key, path, leaf, rank)
        return {"hira_a": a, "hira_b": b}

    return adapter(selector, create, lambda weights, leaf: leaf + leaf * (weights["hira_a"] @ weights["hira_b"]))


def miss(selector: Selector | str, rank: int | Mapping[str, int]) -> Tuning:
    """Matrix shard sharing: one matrix ``D`` is added to every stretch of ``r`` in-features.

    ``W[i, o] + D[i mod r, o]``; where ``r`` does not divide the in-features, the last stretch is cut.

    Args:
      selector: kernels of shape ``[in, out]``.
      rank: ``r``, at most the in-features, or ``{glob: r}``; the first glob that matches a leaf's path counts.

    Returns:
      A ``Tuning``. ``miss`` has shape ``[r, out]``, zeros, float32.

    Raises:
      SelectionError: the rank is no whole number; (at ``init``) a selected leaf is no kernel ``[in, out]``, the rank
        exceeds its in-features, or the mapping fits the leaves badly.

    Source: Kang and Yin, "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing", 2025.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = miss("fc/kernel", rank=2).init(jax.random.key(0), {"fc": {"kernel": jnp.ones((4, 3))}})
    >>> trainable["fc"]["kernel"]["miss"].shape
    (2, 3)
    """
    return per_pattern("miss", _miss, selector, {"rank": rank})


def _miss(selector: Selector, rank: int) -> Tuning:
    check_whole("miss", "rank", rank)

    def create(key, path, leaf):
        (wide,), out = widths("miss", path, leaf, (2,))
        check_rank("miss", path, leaf, rank, wide, "its input width")
        return {"miss": jnp.zeros((rank, out), jnp.float32)}

    def combine(weights, leaf):
        return leaf + jnp.tile(weights["miss"], (-(-leaf.shape[0] // rank), 1))[: leaf.shape[0]]

    return adapter(selector, create, combine)
