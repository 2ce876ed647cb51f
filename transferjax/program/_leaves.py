"""Leaves that stand for a matrix without being one: low-rank sums, scalings, and stacks of them for ``scan``.

Each is a frozen dataclass and a pytree with ``shape``, ``dtype`` and ``dense()``. ``transferjax.program.lift`` runs a
function on them without ever building the matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_static = {"static": True}


class Lifted:
    """What all leaves have that stand for an array; ``isinstance(x, Lifted)`` tells them from arrays.

    >>> leaf = Scaled(jnp.ones((3, 2)), jnp.ones(2), (1,))
    >>> isinstance(leaf, Lifted), leaf.ndim, leaf.size, leaf.transpose((1, 0)).axes
    (True, 2, 6, (0,))
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that the leaf stands for."""
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        """Of the array that the leaf stands for."""
        raise NotImplementedError

    def dense(self) -> jax.Array:
        """The array itself."""
        raise NotImplementedError

    def cast(self, dtype: Any) -> Any:
        """The same leaf in another floating-point type."""
        raise NotImplementedError

    def transpose(self, order: Sequence[int]) -> Any:
        """The same leaf with its axes in another order; ``None`` where only the array has that form."""
        raise NotImplementedError

    def reshape(self, shape: Sequence[int]) -> Any:
        """The same leaf in another shape; ``None`` where only the array has that form."""
        raise NotImplementedError

    def problem(self) -> str | None:
        """What is wrong with the parts of the leaf, in words; ``None`` where they fit."""
        return None

    @property
    def ndim(self) -> int:
        """How many axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)


def is_lifted(value: Any) -> bool:
    """Whether a value stands for an array without being one; use it as ``is_leaf``.

    >>> is_lifted(jnp.ones(2)), is_lifted(Scaled(jnp.ones((3, 2)), jnp.ones(2), (1,)))
    (False, True)
    """
    return isinstance(value, Lifted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Lifted):
    """``base + scale * A @ B``.

    Attributes:
      base: an array, or a leaf that stands for one, ``[in..., out...]``.
      a: ``[in..., r]``; for a convolution ``[h, w, in, r]``.
      b: ``[r, out...]``.
      scale: a number or an array without axes.
      axes: ``"a"`` or ``"b"`` per axis of ``base``: which factor has it. Default: first all axes of ``a``, then all
        of ``b``.

    Source: Hu et al., "LoRA", 2021.

    >>> leaf = LowRank(jnp.zeros((3, 2)), jnp.ones((3, 1)), jnp.ones((1, 2)), 0.5)
    >>> leaf.shape, leaf.dense().tolist()[0]
    ((3, 2), [0.5, 0.5])
    """

    base: Any
    a: Any
    b: Any
    scale: Any = 1.0
    axes: str = dataclasses.field(default="", metadata=_static)

    @property
    def letters(self) -> str:
        """``"a"`` or ``"b"`` per axis."""
        return self.axes or "a" * (len(self.a.shape) - 1) + "b" * (len(self.b.shape) - 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return jnp.result_type(self.base.dtype, self.a.dtype, self.b.dtype)

    def scaled(self, value: Any) -> Any:
        """``scale * value`` in the type of ``value``."""
        if isinstance(self.scale, (int, float)) and self.scale == 1:
            return value
        return value * jnp.asarray(self.scale, value.dtype)

    def factors(self, letter: str) -> tuple[Any, Any]:
        """The factor of ``letter`` with the rank last, and the other one with the rank first."""
        if letter == "a":
            return self.a, self.b
        return jnp.moveaxis(self.b, 0, -1), jnp.moveaxis(self.a, -1, 0)

    def dense(self) -> jax.Array:
        product = self.scaled(jnp.tensordot(self.a, self.b, 1))
        order = [axis for letter in "ab" for axis, own in enumerate(self.letters) if own == letter]
        if order != sorted(order):
            product = jnp.transpose(product, [order.index(axis) for axis in range(len(order))])
        return dense(self.base) + product

    def cast(self, dtype: Any) -> LowRank:
        return dataclasses.replace(
            self, base=cast(self.base, dtype), a=self.a.astype(dtype), b=self.b.astype(dtype), axes=self.letters
        )

    def transpose(self, order: Sequence[int]) -> LowRank | None:
        base, letters = transposed(self.base, order), self.letters
        own = lambda letter: [letters[:axis].count(letter) for axis in order if letters[axis] == letter]
        a, b = jnp.transpose(self.a, [*own("a"), self.a.ndim - 1]), [0, *(1 + axis for axis in own("b"))]
        if base is None:
            return None
        return LowRank(base, a, jnp.transpose(self.b, b), self.scale, "".join(letters[axis] for axis in order))

    def reshape(self, shape: Sequence[int]) -> LowRank | None:
        groups, base = regrouped(self.shape, shape), reshaped(self.base, shape)
        if groups is None or base is None:
            return None
        axes: list[str] = []
        for old, new in groups:
            found = {self.letters[axis] for axis in old if self.shape[axis] > 1} or {"a"}
            if len(found) > 1:
                return None
            axes += [*found] * len(new)
        sizes = {letter: [size for size, own in zip(shape, axes, strict=True) if own == letter] for letter in "ab"}
        a, b = self.a.reshape(*sizes["a"], -1), self.b.reshape(-1, *sizes["b"])
        return LowRank(base, a, b, self.scale, "".join(axes))

    def problem(self) -> str | None:
        inner = self.base.problem() if is_lifted(self.base) else None
        expected = [iter(self.a.shape[:-1]), iter(self.b.shape[1:])]
        if sorted(self.letters) != sorted("a" * (len(self.a.shape) - 1) + "b" * (len(self.b.shape) - 1)):
            return f"axes '{self.axes}' do not count those of a {self.a.shape} and b {self.b.shape}"
        made = tuple(next(expected["ab".index(letter)]) for letter in self.letters)
        if made != self.shape or self.a.shape[-1] != self.b.shape[0]:
            return inner or f"a {self.a.shape} and b {self.b.shape} do not make its base {self.shape}"
        return inner


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Lifted):
    """``base`` times one number per entry of some of its axes.

    Attributes:
      base: an array, or a leaf that stands for one.
      scale: its shape is that of ``base`` on ``axes``.
      axes: which axes of ``base``, in ascending order: of ``[in, out]`` ``(1,)`` scales the outputs, ``(0,)`` the
        inputs.

    >>> Scaled(jnp.ones((3, 2)), jnp.array([1.0, 2.0]), (1,)).dense().tolist()[0]
    [1.0, 2.0]
    """

    base: Any
    scale: Any
    axes: tuple[int, ...] = dataclasses.field(metadata=_static)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return jnp.result_type(self.base.dtype, self.scale.dtype)

    def dense(self) -> jax.Array:
        return dense(self.base) * spread(self.scale, self.axes, self.ndim)

    def cast(self, dtype: Any) -> Scaled:
        return Scaled(cast(self.base, dtype), self.scale.astype(dtype), self.axes)

    def transpose(self, order: Sequence[int]) -> Scaled | None:
        base = transposed(self.base, order)
        return None if base is None else Scaled(base, *transposed_scale(self.scale, self.axes, order))

    def reshape(self, shape: Sequence[int]) -> Scaled | None:
        base, found = reshaped(self.base, shape), reshaped_scale(self.scale, self.axes, self.shape, shape)
        return None if base is None or found is None else Scaled(base, *found)

    def problem(self) -> str | None:
        ordered = list(self.axes) == sorted(set(self.axes)) and all(0 <= axis < self.ndim for axis in self.axes)
        if not ordered or tuple(self.scale.shape) != tuple(self.shape[axis] for axis in self.axes):
            return f"scale {tuple(self.scale.shape)} is not that of axes {self.axes} of its base {self.shape}"
        return self.base.problem() if is_lifted(self.base) else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked(Lifted):
    """The same leaf for every layer of a scanned model: it enters ``scan`` as one of its ``xs``.

    Attributes:
      leaf: a leaf whose arrays have a leading axis of layers; arrays without axes are shared by all layers.

    >>> leaf = Stacked(LowRank(jnp.zeros((5, 3, 2)), jnp.ones((5, 3, 1)), jnp.ones((5, 1, 2)), 0.5))
    >>> leaf.shape, leaf.layer(0).shape
    ((5, 3, 2), (3, 2))
    """

    leaf: Any

    @property
    def _first(self) -> Any:
        """The shapes of one layer."""
        one = lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)) if jnp.ndim(x) else x
        return jax.tree.map(one, self.leaf)

    @property
    def layers(self) -> int:
        """How many layers."""
        return next(x.shape[0] for x in jax.tree.leaves(self.leaf) if jnp.ndim(x))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.layers, *self._first.shape)

    @property
    def dtype(self) -> Any:
        return self._first.dtype

    def layer(self, number: Any) -> Any:
        """The leaf of one layer."""
        return jax.tree.map(lambda x: x[number] if jnp.ndim(x) else x, self.leaf)

    def part(self, start: Any, size: int) -> Stacked:
        """The leaf of ``size`` neighbouring layers."""
        own = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size) if jnp.ndim(x) else x
        return Stacked(jax.tree.map(own, self.leaf))

    def split(self) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
        """The arrays with a leading axis, and the function from such arrays of one layer to its leaf."""
        leaves, treedef = jax.tree.flatten(self.leaf)
        mine = [number for number, x in enumerate(leaves) if jnp.ndim(x)]

        def join(arrays: Sequence[Any]) -> Any:
            found = dict(zip(mine, arrays, strict=True))
            return jax.tree.unflatten(treedef, [found.get(number, x) for number, x in enumerate(leaves)])

        return [leaves[number] for number in mine], join

    def each(self, function: Callable[[Any], Any]) -> Any:
        """``function`` of every layer's leaf, stacked."""
        arrays, join = self.split()
        return jax.vmap(lambda *arrays: function(join(arrays)))(*arrays)

    def dense(self) -> jax.Array:
        return self.each(lambda leaf: leaf.dense())

    def cast(self, dtype: Any) -> Stacked | None:
        return self._with(lambda leaf: leaf.cast(dtype))

    def transpose(self, order: Sequence[int]) -> Stacked | None:
        if not order or order[0] != 0:
            return None
        return self._with(lambda leaf: leaf.transpose([axis - 1 for axis in order[1:]]))

    def reshape(self, shape: Sequence[int]) -> Any:
        if tuple(shape) == self.shape[1:] and self.layers == 1:
            return self.layer(0)
        if not shape or shape[0] != self.layers:
            return None
        return self._with(lambda leaf: leaf.reshape(shape[1:]))

    def problem(self) -> str | None:
        sizes = {jnp.shape(x)[0] for x in jax.tree.leaves(self.leaf) if jnp.ndim(x)}
        return f"its arrays have {sorted(sizes)} layers" if len(sizes) > 1 else self._first.problem()

    def _with(self, function: Callable[[Any], Any]) -> Stacked | None:
        """The stack of what ``function`` makes of every layer's leaf."""
        return None if jax.eval_shape(function, self._first) is None else Stacked(self.each(function))


def dense(value: Any) -> Any:
    """The array that a value is or stands for."""
    return value.dense() if is_lifted(value) else value


def cast(value: Any, dtype: Any) -> Any:
    """An array or a leaf in another type."""
    return value.cast(dtype) if is_lifted(value) else value.astype(dtype)


def transposed(value: Any, order: Sequence[int]) -> Any:
    """An array or a leaf with its axes in another order."""
    return value.transpose(order) if is_lifted(value) else jnp.transpose(value, order)


def reshaped(value: Any, shape: Sequence[int]) -> Any:
    """An array or a leaf in another shape."""
    return value.reshape(shape) if is_lifted(value) else jnp.reshape(value, shape)


def spread(scale: Any, axes: Sequence[int], ndim: int) -> Any:
    """``scale``, whose axes are ``axes``, in a form that multiplies an array of ``ndim`` axes."""
    return jax.lax.expand_dims(jnp.asarray(scale), [axis for axis in range(ndim) if axis not in axes])


def transposed_scale(scale: Any, axes: Sequence[int], order: Sequence[int]) -> tuple[Any, tuple[int, ...]]:
    """Scale and axes of a scaled array whose axes come in another order."""
    places = [place for place, axis in enumerate(order) if axis in axes]
    return jnp.transpose(scale, [axes.index(order[place]) for place in places]), tuple(places)


def reshaped_scale(
    scale: Any, axes: Sequence[int], old: Sequence[int], new: Sequence[int]
) -> tuple[Any, tuple[int, ...]] | None:
    """Scale and axes of a scaled array in another shape; ``None`` where an axis was mixed with another."""
    groups = regrouped(old, new)
    if groups is None:
        return None
    places: list[int] = []
    for before, after in groups:
        found = {axis in axes for axis in before if old[axis] > 1}
        if len(found) > 1:
            return None
        places += after if found == {True} else []
    return scale.reshape([new[place] for place in places]), tuple(places)


def regrouped(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Which old axes become which new ones under ``reshape``, in the smallest groups; ``None`` for empty arrays.

    >>> regrouped((4, 6, 1), (4, 2, 3))
    [([0], [0]), ([1], [1, 2]), ([2], [])]
    """
    if 0 in (*old, *new):
        return None
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before, after = [*range(i, min(i + 1, len(old)))], [*range(j, min(j + 1, len(new)))]
        size = [math.prod(old[k] for k in before), math.prod(new[k] for k in after)]
        while size[0] != size[1]:
            if size[0] < size[1]:
                before.append(i + len(before))
                size[0] *= old[before[-1]]
            else:
                after.append(j + len(after))
                size[1] *= new[after[-1]]
        groups.append((before, after))
        i, j = i + len(before), j + len(after)
    return groups
