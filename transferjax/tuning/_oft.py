"""Orthogonal fine-tuning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import SelectionError, describe
from transferjax._types import Tuning
from transferjax.tree import Selector
from transferjax.tuning._kernel import check_whole, widths
from transferjax.tuning._lora import adapter


def oft(selector: Selector | str, block_size: int) -> Tuning:
    """Orthogonal fine-tuning: the input is rotated before the kernel, ``x @ R @ W``.

    ``R`` is block-diagonal; each block is the Cayley transform ``(I - Q) (I + Q)^-1`` of a skew-symmetric ``Q``, whose
    upper triangle, row by row, is what learns. Angles between the columns of ``W`` stay as they are.

    Args:
      selector: kernels of shape ``[in, out]``.
      block_size: the width of a block; it divides the in-features.

    Returns:
      A ``Tuning``. ``oft`` has shape ``[in / block_size, block_size * (block_size - 1) / 2]``, zeros, float32.

    Raises:
      SelectionError: the block size is no whole number of at least 2; (at ``init``) a selected leaf is no kernel
        ``[in, out]``, or the block size does not divide its in-features.

    Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023; the input-centric form of
    Hugging Face PEFT with ``use_cayley_neumann=False``. PEFT's default replaces the inverse by five terms of a series.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = oft("fc/kernel", 2).init(jax.random.key(0), {"fc": {"kernel": jnp.ones((4, 3))}})
    >>> trainable["fc"]["kernel"]["oft"].shape
    (2, 1)
    """
    check_whole("oft", "block_size", block_size)
    if block_size < 2:
        raise SelectionError("oft() expects a block_size of at least 2: a block of 1 has nothing to rotate.")

    def create(key, path, leaf):
        (wide,), _ = widths("oft", path, leaf, (2,))
        if wide % block_size:
            fitting = [size for size in range(2, wide + 1) if wide % size == 0]
            raise SelectionError(
                f"oft() got block_size {block_size}, which does not divide the {wide} in-features of '{path}' "
                f"{describe(leaf)}. Write one that does: {min(fitting, key=lambda size: abs(size - block_size))}."
            )
        return {"oft": jnp.zeros((wide // block_size, block_size * (block_size - 1) // 2), jnp.float32)}

    def combine(weights, leaf):
        rows = leaf.reshape(-1, block_size, leaf.shape[1])
        rotated = jnp.einsum("bij,bjo->bio", _cayley(weights["oft"], block_size), rows, precision="highest")
        return rotated.reshape(leaf.shape)

    return adapter(selector, create, combine)


def _cayley(upper: jax.Array, size: int) -> jax.Array:
    """Rotations ``[blocks, size, size]`` from the upper triangles of skew-symmetric matrices."""
    row, column = np.triu_indices(size, 1)
    triangle = jnp.zeros((upper.shape[0], size, size), upper.dtype).at[:, row, column].set(upper)
    skew = triangle - triangle.mT
    one = jnp.eye(size, dtype=upper.dtype)
    return jnp.linalg.solve(one + skew, one - skew)  # the two factors commute
