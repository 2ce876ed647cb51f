"""Vector-based random matrix adaptation."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import SelectionError, describe
from transferjax._types import Tuning
from transferjax.tree import Selector
from transferjax.tuning._kernel import check_whole, widths
from transferjax.tuning._lora import adapter


def vera(selector: Selector | str, rank: int, *, seed: int = 0, start: float = 0.1, projections: Any = None) -> Tuning:
    """Vector-based random matrix adaptation: two vectors learn around random matrices that all kernels share.

    A kernel ``W`` becomes ``W + (A * d) @ (B * b)`` with ``A`` (``[in, r]``) and ``B`` (``[r, out]``) the first rows
    and columns of one pair of matrices. They are drawn from ``seed``, not from the key of ``init``, and again whenever
    a program is traced, by NumPy's ``RandomState``, whose stream is fixed for good. So they are in no tree and no file:
    what is saved, ``vera_d`` and ``vera_b``, is complete for whoever knows ``rank`` and ``seed``.

    Args:
      selector: kernels of shape ``[in, out]``.
      rank: ``r``; larger than for LoRA, for instance 256. It may exceed the kernel's widths.
      seed: of ``A`` and ``B``, a whole number; another seed makes saved vectors worthless.
      start: the first value of ``d``.
      projections: ``(A, B)`` to use instead of drawn ones, of shapes ``[>= in, r]`` and ``[r, >= out]``: those of a
        file that holds them, transposed.

    Returns:
      A ``Tuning``. ``vera_d`` (``[r]``, all ``start``) and ``vera_b`` (``[out]``, zeros), float32. ``A`` is uniform
      within ``sqrt(6 / in)``, ``B`` within ``sqrt(6 / r)`` (Kaiming).

    Raises:
      SelectionError: rank or seed is no whole number, or the projections do not fit the rank; (at ``init``) a selected
        leaf is no kernel ``[in, out]``, or wider than the projections.

    Source: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", 2024; conventions as in Hugging Face PEFT.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = vera("fc/kernel", rank=8).init(jax.random.key(0), {"fc": {"kernel": jnp.ones((4, 3))}})
    >>> {name: leaf.shape for name, leaf in trainable["fc"]["kernel"].items()}
    {'vera_d': (8,), 'vera_b': (3,)}
    """
    check_whole("vera", "rank", rank)
    check_seed("vera", seed)
    given = None if projections is None else _checked(projections, rank)

    def create(key, path, leaf):
        (wide,), out = widths("vera", path, leaf, (2,))
        if given is not None and (given[0].shape[0] < wide or given[1].shape[1] < out):
            raise SelectionError(
                f"vera() got projections for at most ({given[0].shape[0]}, {given[1].shape[1]}) features, but '{path}' "
                f"is {describe(leaf)}. Give wider ones, or narrow the selector."
            )
        return {"vera_d": jnp.full((rank,), start, jnp.float32), "vera_b": jnp.zeros((out,), jnp.float32)}

    def lift(weights, leaf):
        from transferjax.program import LowRank

        wide, out = leaf.shape
        a, b = _drawn(seed, wide, out, rank) if given is None else (given[0][:wide], given[1][:, :out])
        return LowRank(leaf, a * weights["vera_d"], b * weights["vera_b"])

    return adapter(selector, create, lambda weights, leaf: lift(weights, leaf).dense(), lift=lift)


def _drawn(seed: int, wide: int, out: int, rank: int) -> tuple[jax.Array, jax.Array]:
    """The first ``wide`` rows of ``A`` and ``out`` columns of ``B``: drawn row by row, so that a prefix is a prefix."""
    a = np.random.RandomState([seed, 0]).uniform(-1.0, 1.0, (wide, rank))
    b = np.random.RandomState([seed, 1]).uniform(-1.0, 1.0, (out, rank)).T
    scaled = (a * math.sqrt(6.0 / wide), b * math.sqrt(6.0 / rank))
    return jnp.asarray(scaled[0], jnp.float32), jnp.asarray(scaled[1], jnp.float32)


def _checked(projections: Any, rank: int) -> tuple[jax.Array, jax.Array]:
    pair = tuple(projections)
    if len(pair) != 2 or any(getattr(one, "ndim", 0) != 2 for one in pair):
        came = ", ".join(describe(one) for one in pair)
        raise SelectionError(f"vera() expects projections as two matrices (A [in, r], B [r, out]), got ({came}).")
    a, b = jnp.asarray(pair[0], jnp.float32), jnp.asarray(pair[1], jnp.float32)
    if a.shape[1] != rank or b.shape[0] != rank:
        raise SelectionError(
            f"vera() expects projections of rank {rank}, A [in, {rank}] and B [{rank}, out]; got {a.shape} and "
            f"{b.shape}. Matrices of a PEFT file are transposed: write (vera_A.T, vera_B.T)."
        )
    return a, b


def check_seed(name: str, seed: Any) -> None:
    """Whether a seed is a whole number that NumPy takes.

    Raises:
      SelectionError: it is not.

    >>> check_seed("vera", 0)
    """
    if not hasattr(seed, "__index__") or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise SelectionError(f"{name}() expects a seed from 0 to 2**32 - 1, got {seed!r}.")
