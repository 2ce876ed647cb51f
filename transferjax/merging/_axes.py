"""Which axes of a program's values may be permuted together: equivalence classes of the factors of axes."""

from __future__ import annotations

from collections.abc import Sequence

Axis = tuple[int, ...]
"""Factors, outermost first, whose sizes multiply to the axis; an axis of size 1 has none."""

Shape = Sequence[int]


class Axes:
    """Equivalence classes of factors. A class is free, fixed (no permutation), or split into an outer and inner one.

    Factors only ever become more alike: they are united, split or fixed, never the reverse, so the order in which the
    equations of a program are looked at does not matter.

    >>> axes = Axes()
    >>> whole, heads, width = axes.new(6), axes.new(2), axes.new(3)
    >>> axes.unite(whole, (*heads, *width))
    >>> axes.fix(heads)
    >>> [(axes.size(one), axes.is_fixed(one)) for one in axes.leaves(whole)]
    [(2, True), (3, False)]
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._fixed: list[bool] = []
        self._halves: list[Axis] = []

    def new(self, size: int, fixed: bool = False) -> Axis:
        """An axis of its own; free unless told otherwise. Size 1 has nothing to permute, size 0 is left alone."""
        return () if size == 1 else (self._class(size, fixed or size == 0),)

    def value(self, shape: Shape, fixed: bool = False) -> list[Axis]:
        """New axes for a value of this shape."""
        return [self.new(size, fixed) for size in shape]

    def size(self, one: int) -> int:
        """Of a factor."""
        return self._size[one]

    def is_fixed(self, one: int) -> bool:
        """Whether a factor may not be permuted."""
        return self._fixed[self._find(one)]

    def leaves(self, axis: Axis) -> Axis:
        """The classes that an axis consists of, outermost first: none of them is split."""
        out: list[int] = []
        for one in map(self._find, axis):
            out += self.leaves(self._halves[one]) if self._halves[one] else (one,)
        return tuple(out)

    def fix(self, *axes: Axis) -> None:
        """No permutation of these axes is allowed."""
        for axis in axes:
            for one in self.leaves(axis):
                self._fixed[one] = True

    def unite(self, a: Axis, b: Axis) -> None:
        """Two axes of one size are permuted alike, factor by factor; fixed, where their factors do not fit."""
        mine, yours = list(self.leaves(a)), list(self.leaves(b))
        while mine and yours:
            x, y = self._first(mine), self._first(yours)
            if self._size[x] == self._size[y]:
                self._join(x, y)
                mine, yours = mine[1:], yours[1:]
            elif not (self._split(x, self._size[y]) or self._split(y, self._size[x])):
                return self.fix(a, b)
        if mine or yours:
            self.fix(a, b)

    def regroup(self, axes: Sequence[Axis], shape: Shape) -> list[Axis]:
        """The axes of a value that is reshaped, row by row; fixed, where the factors do not fit the new shape."""
        left = [one for axis in axes for one in self.leaves(axis)]
        if 0 in shape:
            return self.value(shape, fixed=True)
        out: list[Axis] = []
        for size in shape:
            taken: list[int] = []
            while size > 1 and left:
                one = self._first(left)
                if size % self._size[one] and not self._split(one, size):
                    break
                one = self._first(left)
                taken.append(left.pop(0))
                size //= self._size[one]
            if size != 1:
                self.fix(*axes)
                return self.value(shape, fixed=True)
            out.append(tuple(taken))
        return out

    def block(self, axis: Axis, size: int, parts: int) -> Axis:
        """The axis of one of ``parts`` equal parts of an axis of ``parts * size``; which part it is, is fixed."""
        outer, inner = self.regroup([axis], (parts, size))
        self.fix(outer)
        return inner

    def _class(self, size: int, fixed: bool) -> int:
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._fixed.append(fixed)
        self._halves.append(())
        return len(self._parent) - 1

    def _find(self, one: int) -> int:
        while self._parent[one] != one:
            self._parent[one] = self._parent[self._parent[one]]
            one = self._parent[one]
        return one

    def _first(self, factors: list[int]) -> int:
        """The first class of a list, which may have been split since the list was made."""
        factors[:1] = self.leaves((factors[0],))
        return factors[0]

    def _split(self, one: int, outer: int) -> bool:
        """Split a class into an outer part of this size and the rest; whether that can be done."""
        size = self._size[one]
        if not 1 < outer < size or size % outer:
            return False
        self._halves[one] = (self._class(outer, self._fixed[one]), self._class(size // outer, self._fixed[one]))
        return True

    def _join(self, x: int, y: int) -> None:
        if x != y:
            self._fixed[x] = self._fixed[x] or self._fixed[y]
            self._parent[y] = x
