"""The largest differences of a leaf, exactly as many as are asked for, without sorting it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from transferjax.merging._leaf import Leaf

SAMPLE = 1 << 16
"""Elements that say where the threshold lies."""
SIGMAS = 5
"""How many standard deviations of the sample's rank lie on each side of it."""

Mask = Callable[[Any, Any], Any]


def largest(leaf: Leaf, number: int, count: int) -> Mask:
    """Which elements of ``|leaf[number] - leaf[0]|`` are the ``count`` largest; of equals, those that come first.

    Args:
      leaf: the base first.
      number: the place of the model among the leaf's arrays.
      count: how many, from 0 to the size.

    Returns:
      ``(at, magnitudes) -> mask``, for the magnitudes of the chunk ``at``.
    """
    if count in (0, leaf.size):
        all_or_none = Cut(-math.inf if count else math.inf, -1)
        return all_or_none if not leaf.traced else lambda at, magnitudes: jnp.full(magnitudes.shape, bool(count))
    if leaf.traced:
        base, model = leaf.chunks(slice(0, leaf.size), 0, number)
        order = jnp.argsort(-jnp.abs(model - base), stable=True)
        mask = jnp.zeros(leaf.size, bool).at[order[:count]].set(True)
        return lambda at, magnitudes: mask

    def magnitudes(at: Any) -> np.ndarray:
        base, model = leaf.chunks(at, 0, number)
        return np.abs(model - base)

    return _cut(leaf, magnitudes, count) if leaf.size > SAMPLE else _sorted(leaf, magnitudes, count)


class Cut(NamedTuple):
    """Where the largest end: all above ``threshold``, and those equal to it up to the place ``last``."""

    threshold: Any
    last: int

    def __call__(self, at: slice, magnitudes: np.ndarray) -> np.ndarray:
        mask = magnitudes >= self.threshold
        after = max(0, self.last + 1 - at.start)
        if after < len(mask):
            mask[after:] = magnitudes[after:] > self.threshold
        return mask

    def within(self, at: slice) -> Cut:
        """The same for the chunk ``at`` alone, whose places fit int32 where those of the leaf may not."""
        return Cut(self.threshold, min(max(self.last - at.start, -1), at.stop - at.start))


def is_kept(magnitudes: Any, threshold: Any, last: Any) -> Any:
    """The mask of a :class:`Cut` in a compiled formula."""
    places = jnp.arange(magnitudes.size, dtype=jnp.int32)
    return (magnitudes > threshold) | ((magnitudes == threshold) & (places <= last))


def _cut(leaf: Leaf, magnitudes: Callable[[Any], np.ndarray], count: int) -> Cut:
    """The threshold lies between two values of a random sample; only what lies between them is sorted.

    Should the sample mislead, everything is.
    """
    low, high = _bracket(leaf.size, magnitudes, count)

    def between(at: slice) -> tuple[int, np.ndarray]:
        found = magnitudes(at)
        below = found < high
        above = len(found) - int(np.count_nonzero(below))
        return above, found[np.logical_and(below, found > low, out=below)]

    found = leaf.each(between)
    above, values = sum(part[0] for part in found), [part[1] for part in found]
    if 0 < count - above <= sum(map(len, values)):
        return _split(leaf, magnitudes, values, count - above)
    return _at_an_edge(leaf, magnitudes, count, (high, low))


def _bracket(size: int, magnitudes: Callable[[Any], np.ndarray], count: int) -> tuple[Any, Any]:
    """Two values, or infinities, between which the threshold very probably lies."""
    drawn = np.random.Generator(np.random.PCG64(0)).integers(0, size, SAMPLE)
    share = count / size
    width = SIGMAS * np.sqrt(len(drawn) * share * (1 - share)) + 2
    first = int(np.floor(len(drawn) * (1 - share) - width))
    last = int(np.ceil(len(drawn) * (1 - share) + width))
    with np.errstate(all="ignore"):
        sample = np.partition(magnitudes(drawn), [max(first, 0), min(last, len(drawn) - 1)])
    return sample[first] if first >= 0 else -np.inf, sample[last] if last < len(sample) else np.inf


def _split(leaf: Leaf, magnitudes: Callable[[Any], np.ndarray], parts: list[np.ndarray], count: int) -> Cut:
    """The cut after the ``count`` largest of some values; ``parts`` are those of each chunk."""
    values = np.concatenate(parts)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    equal = np.cumsum([np.count_nonzero(part == threshold) for part in parts])
    left = count - int(np.count_nonzero(values > threshold))
    return Cut(threshold, _place(leaf, magnitudes, threshold, equal, left))


def _place(leaf: Leaf, magnitudes: Callable[[Any], np.ndarray], value: Any, equal: np.ndarray, number: int) -> int:
    """Where the ``number``-th element of this value stands; ``equal`` counts them up to the end of each chunk."""
    chunk = int(np.searchsorted(equal, number))
    before = int(equal[chunk - 1]) if chunk else 0
    at = leaf.spans()[chunk]
    return at.start + int(np.flatnonzero(magnitudes(at) == value)[number - before - 1])


def _at_an_edge(leaf: Leaf, magnitudes: Callable[[Any], np.ndarray], count: int, edges: tuple[Any, Any]) -> Cut:
    """The cut at a value that many elements have, such as zero."""
    for edge in edges:
        count_of = lambda at, edge=edge: [np.count_nonzero(f(magnitudes(at), edge)) for f in (np.greater, np.equal)]
        counts = np.array(leaf.each(count_of))
        above, equal = int(counts[:, 0].sum()), np.cumsum(counts[:, 1])
        if above < count <= above + equal[-1]:
            return Cut(edge, _place(leaf, magnitudes, edge, equal, count - above))
    return _sorted(leaf, magnitudes, count)


def _sorted(leaf: Leaf, magnitudes: Callable[[Any], np.ndarray], count: int) -> Cut:
    with np.errstate(all="ignore"):
        found = magnitudes(slice(0, leaf.size))
    found[np.isnan(found)] = np.inf  # told by an error when the leaf is made
    return _split(leaf, magnitudes, [found[at] for at in leaf.spans()], count)
