"""DARE: task vectors of which a random part is dropped and the rest enlarged."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from transferjax._errors import DataError, describe
from transferjax.merging._checks import as_fraction, as_number, as_weights
from transferjax.merging._leaf import Leaf, is_traced
from transferjax.merging._trees import merged, numbered
from transferjax.merging._vectors import added

BLOCK = 1 << 17
"""Entries that have random bits of their own; chunks begin at multiples of it."""
RESCALES = ("density", "l1", None)
LEAST = 1e-7


def dare(
    base: Any,
    models: Sequence[Any],
    weights: Any,
    density: float,
    key: Any,
    *,
    scale: Any = 1.0,
    rescale: str | None = "density",
) -> Any:
    """DARE: every entry of a task vector is kept with probability ``density``; then they are enlarged and added.

    ``base + scale * sum(weight * mask * (model - base) / density)``. The masks are random bits of numpy's Philox,
    seeded by the key, the CRC-32 of the leaf's path and the model's place in the list: those of a leaf depend on no
    other leaf, so that a checkpoint merged leaf by leaf equals the tree merged in memory, bit for bit.

    Computed in float32 (float64 stays) and returned in the base's dtype; leaves of integers, truth values and PRNG
    keys must be equal. Weights, scale and arrays may be traced by JAX, the key may not; else numpy computes.

    Args:
      base: the tree that the models were fine-tuned from.
      models: trees equal to it in paths, shapes and dtypes.
      weights: ``[n]`` finite numbers; ``None``: ones.
      density: the probability with which an entry is kept, in (0, 1].
      key: a PRNG key of JAX; it is consumed.
      scale: a finite number.
      rescale: ``"density"`` divides by the density, as in the paper; ``"l1"`` multiplies each leaf's task vector so
        that the sum of its magnitudes is that before, as mergekit does; ``None`` leaves the entries as they are.

    Returns:
      A tree like the base.

    Raises:
      DataError: the trees are not alike or not finite, or a coefficient, the key or ``rescale`` is not as above.

    Source: Yu et al., Language models are super Mario, arXiv:2311.03099.

    >>> import jax, numpy as np
    >>> base, models = {"bias": np.zeros(8)}, [{"bias": np.ones(8)}]
    >>> dare(base, models, None, 0.5, jax.random.key(0))
    {'bias': array([2., 2., 2., 0., 2., 2., 2., 2.])}
    """
    trees = {"base": base, **numbered("dare", models)}
    weights = as_weights("dare", weights, len(models))
    density, scale = as_fraction("dare", "density", density, zero=False), as_number("dare", "scale", scale)
    words = _words(key)
    if rescale not in RESCALES:
        raise DataError(f"dare() got rescale={rescale!r}. Expected 'density', 'l1' or None.")

    def rule(leaf: Leaf) -> Any:
        masks = [_Mask(words, leaf, number, density) for number in range(len(models))]
        factors = [leaf.scalars(weight) for weight in weights]
        if rescale == "density":
            factors = [factor / leaf.scalars(density) for factor in factors]
        elif rescale == "l1":
            factors = [factor * ratio for factor, ratio in zip(factors, _ratios(leaf, masks))]
        return added(leaf, leaf.xp.stack(factors), scale, masks)

    return merged("dare", trees, rule, (weights, scale))


def _words(key: Any) -> list[int]:
    """The numbers of a key."""
    if is_traced(key):
        raise DataError("dare() got a traced key. Expected a key from outside of jit: the masks are drawn by numpy.")
    typed = hasattr(key, "dtype") and jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
    with jax.ensure_compile_time_eval():  # inside of jit too
        data = np.asarray(jax.random.key_data(key) if typed else key)
    if data.ndim != 1 or data.dtype != np.uint32:
        raise DataError(f"dare() got {describe(key)} as key. Expected one key: jax.random.key(0).")
    return data.tolist()


class _Mask:
    """Which entries of one model's leaf are kept; each block has random bits of its own."""

    def __init__(self, words: list[int], leaf: Leaf, number: int, density: float):
        seed = np.random.SeedSequence([*words, zlib.crc32(leaf.path.encode()), number])
        self._key = seed.generate_state(2, np.uint64)
        self._density = density

    def __call__(self, at: slice, delta: Any) -> np.ndarray:
        starts = range(at.start, at.stop, BLOCK)
        return np.concatenate([self._block(s // BLOCK, min(BLOCK, at.stop - s)) for s in starts] or [np.empty(0, bool)])

    def _block(self, number: int, size: int) -> np.ndarray:
        """A byte decides for all but one entry in 256; for those on the edge 64 bits more."""
        bits = np.random.Philox(key=self._key, counter=[0, 0, 0, number])
        byte = bits.random_raw(-(-size // 8)).astype("<u8", copy=False).view(np.uint8)[:size]
        whole, part = int(self._density * 256), self._density * 256 % 1
        kept = byte < whole
        if part:
            edge = np.flatnonzero(byte == whole)
            kept[edge] = bits.random_raw(len(edge)) < part * 2.0**64
        return kept


def _ratios(leaf: Leaf, masks: list[_Mask]) -> Any:
    """The sum of magnitudes of every task vector over that of its kept entries; one, where either is nought."""

    def sums(at: Any, base: Any, *models: Any) -> Any:
        out = []
        for mask, model in zip(masks, models):
            magnitudes = leaf.xp.abs(model - base)
            out.append([magnitudes.sum(), (magnitudes * mask(at, magnitudes)).sum()])
        return leaf.xp.asarray(out)

    before, after = (leaf.total(sums) + leaf.xp.zeros((len(masks), 2))).T
    small = (before < LEAST) | (after < LEAST)
    return leaf.scalars(leaf.xp.where(small, 1.0, before / leaf.xp.where(small, 1.0, after)))
