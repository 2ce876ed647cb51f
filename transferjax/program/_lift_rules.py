"""How a lifted leaf passes each product: matrix product, convolution and look-up are linear in it.

:func:`push` computes such an operation on a leaf part by part. It raises :class:`Refused`, with the reason, where
only the array would do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from transferjax.program._leaves import LowRank, Scaled, Stacked, cast, spread
from transferjax.program._quantised import Quantised

After = Callable[[jax.Array], jax.Array]


class Refused(Exception):
    """A leaf cannot pass; the message says why."""


def push(operation: Any, leaf: Any) -> jax.Array:
    """The result of an operation that is linear in ``leaf``, an array or a lifted leaf.

    A quantised leaf is decoded at the product and, in the backward pass, once more: the decoded matrix is not kept.
    """
    if isinstance(leaf, LowRank):
        side = operation.low_rank(leaf.cast(leaf.dtype))
        made = push(operation, cast(leaf.base, leaf.dtype))
        return made + side.astype(made.dtype)
    if isinstance(leaf, Scaled):
        before, after = operation.scaled(leaf)
        return after(push(before, cast(leaf.base, leaf.dtype)))
    if isinstance(leaf, Quantised):
        decoded = lambda x, leaf: push(dataclasses.replace(operation, x=x), leaf.opened())
        return jax.checkpoint(decoded)(operation.x, leaf)
    if isinstance(leaf, Stacked):
        return operation.stacked(leaf)
    return operation.plain(leaf)


@dataclasses.dataclass(frozen=True)
class Product:
    """``dot_general`` of ``x`` and a leaf.

    Attributes:
      x: the array.
      contracted: axes of ``x`` and of the leaf that are summed over.
      batch: axes of ``x`` and of the leaf that are kept in pairs.
      first: whether the leaf is the left operand.
      options: precision and preferred_element_type.
    """

    x: Any
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    first: bool
    options: dict[str, Any]

    def plain(self, leaf: Any) -> jax.Array:
        turned = lambda pair: pair[::-1] if self.first else pair
        lhs, rhs = turned((self.x, leaf))
        return jax.lax.dot_general(lhs, rhs, (turned(self.contracted), turned(self.batch)), **self.options)

    def low_rank(self, leaf: LowRank) -> jax.Array:
        ours, summed = leaf.letters, self.contracted[1]
        found = {ours[axis] for axis in summed}
        if self.batch[1]:
            raise Refused("an axis of one matrix is a batch axis of the product")
        if len(found) != 1:
            raise Refused("the product sums over axes of both factors, or over none")
        letter = found.pop()
        x, mine, out = self._names(leaf.ndim)
        own = "".join(mine[axis] for axis in range(leaf.ndim) if ours[axis] == letter)
        other = "".join(mine[axis] for axis in range(leaf.ndim) if ours[axis] != letter)
        near, far = leaf.factors(letter)
        middle = "".join(name for name in x + own if (name in x) != (name in own)) + "z"
        narrow = jnp.einsum(f"{x},{own}z->{middle}", self.x, near, **self.options)
        narrow = leaf.scaled(narrow).astype(far.dtype)
        return jnp.einsum(f"{middle},z{other}->{out}", narrow, far, **self.options)

    def scaled(self, leaf: Scaled) -> tuple[Product, After]:
        x, mine, out = self._names(leaf.ndim)
        axes = [mine[axis] for axis in leaf.axes]
        if all(name in x for name in axes):
            return dataclasses.replace(self, x=_times(self.x, leaf.scale, axes, x)), lambda made: made
        if any(mine[axis] in axes for axis in self.contracted[1]):
            raise Refused("the product sums over some of the axes that are scaled, not over all")
        return self, lambda made: _times(made, leaf.scale, axes, out)

    def stacked(self, leaf: Stacked) -> jax.Array:
        if 0 not in self.batch[1]:
            raise Refused("the layers of a stack are used at once")
        place = self.batch[1].index(0)
        gone = self.batch[0][place]
        without = lambda axes, axis: tuple(other - (other > axis) for other in axes if other != axis)
        pair = lambda axes: (without(axes[0], gone), without(axes[1], 0))
        inner = dataclasses.replace(self, contracted=pair(self.contracted), batch=pair(self.batch))
        arrays, join = leaf.split()
        one = lambda x, arrays: push(dataclasses.replace(inner, x=x), join(arrays))
        return jax.vmap(one, (gone, 0), place)(self.x, arrays)

    def _names(self, count: int) -> tuple[str, str, str]:
        """One letter per axis of ``x``, of the leaf (with ``count`` axes) and of the result."""
        mine = "abcdefghijkl"[:count]
        x = list("mnopqrstuvwxy"[: self.x.ndim])
        for theirs, own in ((self.contracted[0], self.contracted[1]), (self.batch[0], self.batch[1])):
            for there, here in zip(theirs, own, strict=True):
                x[there] = mine[here]
        free = [name for name in x if name not in mine], [name for name in mine if name not in x]
        both = free[::-1] if self.first else free
        return "".join(x), mine, "".join([*(mine[axis] for axis in self.batch[1]), *both[0], *both[1]])


@dataclasses.dataclass(frozen=True)
class Convolution:
    """``conv_general_dilated`` of ``x`` with a leaf as its kernel; ``options``: everything else."""

    x: Any
    options: dict[str, Any]

    @property
    def numbers(self) -> Any:
        """Which axes of input, kernel and output are which."""
        return self.options["dimension_numbers"]

    def plain(self, leaf: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(self.x, leaf, **self.options)

    def low_rank(self, leaf: LowRank) -> jax.Array:
        output, letters = self.numbers.rhs_spec[0], leaf.letters
        if self.options["feature_group_count"] != 1 or self.options["batch_group_count"] != 1:
            raise Refused("the convolution has groups")
        if letters.count(letters[output]) != 1:
            raise Refused("the output channels of the convolution share a factor with other axes")
        near, far = leaf.factors("a" if letters[output] == "b" else "b")
        narrow = self.plain(jnp.moveaxis(near, -1, output))
        channel = self.numbers.out_spec[1]
        accuracy = {name: self.options[name] for name in ("precision", "preferred_element_type")}
        made = jnp.tensordot(leaf.scaled(narrow).astype(far.dtype), far, ((channel,), (0,)), **accuracy)
        return jnp.moveaxis(made, -1, channel)

    def scaled(self, leaf: Scaled) -> tuple[Convolution, After]:
        output, features, *_ = self.numbers.rhs_spec
        if leaf.axes == (output,):
            axis = self.numbers.out_spec[1]
            return self, lambda made: _times(made, leaf.scale, [axis], range(made.ndim))
        if leaf.axes == (features,) and self.options["feature_group_count"] == 1:
            x = _times(self.x, leaf.scale, [self.numbers.lhs_spec[1]], range(self.x.ndim))
            return dataclasses.replace(self, x=x), lambda made: made
        raise Refused("the convolution's kernel is scaled along other axes than its input or output channels")

    def stacked(self, leaf: Stacked) -> jax.Array:
        raise Refused("the layers of a stack are used at once")


@dataclasses.dataclass(frozen=True)
class Lookup:
    """``gather`` of whole rows of a leaf; ``x``: the row numbers ``[..., 1]``, ``options``: everything else."""

    x: Any
    options: dict[str, Any]

    def plain(self, leaf: Any) -> jax.Array:
        return jax.lax.gather(leaf, self.x, **self.options)

    def low_rank(self, leaf: LowRank) -> jax.Array:
        self._check(leaf)
        if leaf.letters.count(leaf.letters[0]) != 1:
            raise Refused("the rows of the table share a factor with other axes")
        near, far = leaf.factors(leaf.letters[0])
        narrow = leaf.scaled(self._rows(near))
        return jnp.tensordot(narrow, far, 1)

    def scaled(self, leaf: Scaled) -> tuple[Lookup, After]:
        self._check(leaf)
        filling = self.options.get("fill_value")
        if filling is not None and not math.isnan(filling) and filling != 0:
            raise Refused("rows out of bounds are filled with a number")
        first = self.x.ndim - 1
        if leaf.axes == (0,):
            rows = self._rows(leaf.scale)
            return self, lambda made: _times(made, rows, range(first), range(made.ndim))
        if 0 in leaf.axes:
            raise Refused("the table is scaled along its rows and other axes at once")
        axes = [first + axis - 1 for axis in leaf.axes]
        return self, lambda made: _times(made, leaf.scale, axes, range(made.ndim))

    def stacked(self, leaf: Stacked) -> jax.Array:
        raise Refused("the layers of a stack are used at once")

    def _check(self, leaf: Any) -> None:
        numbers, batch = self.options["dimension_numbers"], self.x.ndim - 1
        whole = tuple(self.options["slice_sizes"]) == (1, *leaf.shape[1:])
        trailing = tuple(numbers.offset_dims) == tuple(range(batch, batch + leaf.ndim - 1))
        rows = tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
        if not (whole and trailing and rows) or numbers.operand_batching_dims:
            raise Refused("the look-up takes something else than whole rows")

    def _rows(self, table: Any) -> jax.Array:
        """The rows of another table; those out of bounds are 0, so that they add nothing to what the base has there."""
        batch = self.x.ndim - 1
        numbers = self.options["dimension_numbers"]._replace(offset_dims=tuple(range(batch, batch + table.ndim - 1)))
        options = {**self.options, "dimension_numbers": numbers, "slice_sizes": (1, *table.shape[1:]), "fill_value": 0}
        return jax.lax.gather(table, self.x, **options)


def _times(value: Any, scale: Any, axes: Sequence[Any], places: Sequence[Any]) -> jax.Array:
    """``value * scale``: the axes of ``scale`` are called ``axes`` among the ``places`` of ``value``."""
    where = [list(places).index(axis) for axis in axes]
    order = sorted(range(len(where)), key=lambda number: where[number])
    return value * spread(jnp.transpose(scale, order), where, value.ndim).astype(value.dtype)
