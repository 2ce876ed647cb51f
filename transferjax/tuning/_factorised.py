"""Low-rank adaptation that begins with a part of the kernel itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from transferjax._types import Tuning
from transferjax.tree import Selector
from transferjax.tuning._kernel import check_rank, check_whole, strength, widths
from transferjax.tuning._lora import adapter
from transferjax.tuning._patterns import per_pattern

Factors = Callable[[jax.Array, int, float], tuple[jax.Array, jax.Array]]


def pissa(
    selector: Selector | str, rank: int | Mapping[str, int], *, alpha: float | Mapping[str, float] | None = None
) -> Tuning:
    """LoRA on the principal part: ``s * A @ B`` begins as the best approximation of rank ``r``, the rest is frozen.

    With ``W = U S V``, ``A = U_r sqrt(S_r / s)``, ``B = sqrt(S_r / s) V_r``; ``frozen`` holds ``W - s * A @ B`` in the
    dtype of ``W``, so a bfloat16 base loses that much of the residual. It is computed from the kernel at ``init``:
    resume from the same base. Its value does not depend on the signs that a decomposition happens to choose.

    Args:
      selector: kernels of shape ``[in, out]`` (dense, embeddings) or ``[h, w, in, out]`` (convolution, taken as a
        matrix ``[h * w * in, out]``).
      rank: ``r``, or ``{glob: r}``; the first glob that matches a leaf's path counts.
      alpha: ``s = alpha / r``, or ``{glob: alpha}``; ``None`` means ``alpha = r``, so ``s = 1``.

    Returns:
      A ``Tuning``. ``lora_a`` (``[..., in, r]``) and ``lora_b`` (``[r, out]``), float32.

    Raises:
      SelectionError: the rank is no whole number; (at ``init``) a selected leaf is no kernel, the rank exceeds its
        dimensions, or a mapping fits the leaves badly.

    Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", 2024.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = pissa("fc/kernel", rank=1).init(jax.random.key(0), {"fc": {"kernel": jnp.ones((4, 3))}})
    >>> bool(jnp.allclose(frozen["fc"]["kernel"], 0.0, atol=1e-6))  # a kernel of rank 1 leaves no residual
    True
    """
    build = lambda selector, rank, alpha: _factorised("pissa", selector, rank, alpha, _principal)
    return per_pattern("pissa", build, selector, {"rank": rank, "alpha": alpha})


def olora(
    selector: Selector | str, rank: int | Mapping[str, int], *, alpha: float | Mapping[str, float] | None = None
) -> Tuning:
    """LoRA with orthonormal beginnings: ``A`` and ``B`` begin as a part of the kernel's QR decomposition.

    With ``W^T = Q R``, ``B`` is the transpose of the first ``r`` columns of ``Q`` (its rows are orthonormal) and ``A``
    that of the first ``r`` rows of ``R``; ``frozen`` holds ``W - s * A @ B`` in the dtype of ``W``.

    Args:
      selector: kernels of shape ``[in, out]`` (dense, embeddings) or ``[h, w, in, out]`` (convolution, taken as a
        matrix ``[h * w * in, out]``).
      rank: ``r``, or ``{glob: r}``; the first glob that matches a leaf's path counts.
      alpha: ``s = alpha / r``, or ``{glob: alpha}``; ``None`` means ``alpha = r``, so ``s = 1``.

    Returns:
      A ``Tuning``. ``lora_a`` (``[..., in, r]``) and ``lora_b`` (``[r, out]``), float32.

    Raises:
      SelectionError: the rank is no whole number; (at ``init``) a selected leaf is no kernel, the rank exceeds its
        dimensions, or a mapping fits the leaves badly.

    Source: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024; as in Hugging Face
    PEFT, where ``A @ B`` is not divided by ``s``.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = olora("fc/kernel", rank=2).init(jax.random.key(0), {"fc": {"kernel": jnp.eye(4, 3)}})
    >>> b = trainable["fc"]["kernel"]["lora_b"]
    >>> bool(jnp.allclose(b @ b.T, jnp.eye(2), atol=1e-6))
    True
    """
    build = lambda selector, rank, alpha: _factorised("olora", selector, rank, alpha, _orthonormal)
    return per_pattern("olora", build, selector, {"rank": rank, "alpha": alpha})


def _principal(matrix: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    u, values, v = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _orthonormal(matrix: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    q, r = jnp.linalg.qr(matrix.T)
    return r[:rank].T, q[:, :rank].T


def _factorised(name: str, selector: Selector, rank: int, alpha: float | None, factors: Factors) -> Tuning:
    check_whole(name, "rank", rank)
    scale = strength(name, rank, alpha)

    def create(key, path, leaf):
        inner, out = widths(name, path, leaf)
        matrix = jnp.asarray(leaf, jnp.float32).reshape(-1, out)
        check_rank(name, path, leaf, rank, min(matrix.shape), "the smaller of its input and output widths")
        a, b = factors(matrix, rank, scale)
        return {"lora_a": a.reshape(*inner, rank), "lora_b": b}

    def keep(weights, leaf):
        return (leaf - scale * (weights["lora_a"] @ weights["lora_b"])).astype(leaf.dtype)

    def lift(weights, leaf):
        from transferjax.program import LowRank

        return LowRank(leaf, weights["lora_a"], weights["lora_b"], scale)

    return adapter(selector, create, lambda weights, leaf: lift(weights, leaf).dense(), keep=keep, lift=lift)
