"""Plan: one Move per target leaf, as data that prints, round-trips and applies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import PlanError, describe
from transferjax._report import Report
from transferjax.surgery._ops import Op, Spec, check_op, run, show, spec_of
from transferjax.tree import Selector

Read = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Move:
    """Where one target leaf comes from.

    Attributes:
      target: path of the leaf.
      source: name of the source leaf, several names, or ``None`` for a leaf that keeps its initial value.
      ops: operations in the order in which they run, as plain tuples: ``("permute", (2, 3, 1, 0))``,
        ``("reshape", (8, 8))``, ``("cast", "float32")``.
    """

    target: str
    source: str | tuple[str, ...] | None
    ops: tuple[Op, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of all sources: none, one or several."""
        if self.source is None:
            return ()
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def how(self) -> str:
        """``"fresh"``, ``"copy"``, or the operations in words."""
        if self.source is None:
            return "fresh"
        return ", ".join(map(show, self.ops)) or "copy"

    def run(self, arrays: Sequence[Any]) -> Any:
        """The target's array from those of its sources.

        Args:
          arrays: one array per source, numpy or JAX.

        Returns:
          The array of the target leaf, of the same kind.

        Raises:
          PlanError: the number of arrays is wrong, an operation is malformed, or a cast loses values.

        >>> import numpy as np
        >>> Move("kernel", "weight", (("permute", (1, 0)),)).run([np.zeros((2, 3))]).shape
        (3, 2)
        """
        if len(arrays) != len(self.sources) or not arrays:
            raise PlanError(f"'{self.target}' is made from {len(self.sources)} arrays; {len(arrays)} came.")
        try:
            return run([check_op(op) for op in self.ops], arrays)
        except PlanError as error:
            raise PlanError(f"'{self.target}' from {_names(self)}: {error}") from None


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What happens to every leaf of a source and of a target, made by :func:`plan` from shapes only.

    Attributes:
      moves: one :class:`Move` per target leaf, in natural order of the targets.
      waived: names of the source leaves that no move reads, in natural order.
      shapes: ``{target path: (shape, dtype)}``.
      sources: ``{source name: (shape, dtype)}`` of every source leaf, waived ones too.
      fingerprint: of the source that the plan is bound to, or ``None``; see :meth:`with_source`.
      replaced: the moves that fresh leaves would have had, for those to which the rules lead a source leaf; their
        shapes need not fit. Only :meth:`inverse` reads them: a new head goes back under the old one's name.
    """

    moves: tuple[Move, ...]
    waived: tuple[str, ...]
    shapes: Mapping[str, Spec]
    sources: Mapping[str, Spec]
    fingerprint: str | None = None
    replaced: tuple[Move, ...] = ()

    def __hash__(self) -> int:
        return hash((self.moves, self.waived, self.fingerprint))

    def __repr__(self) -> str:
        facts = ", ".join(f"{number:,} {name}" for name, number in self.counts().items())
        return f"Plan({len(self.sources):,} sources -> {len(self.moves):,} targets: {facts})"

    def __str__(self) -> str:
        return str(self.report())

    def counts(self) -> dict[str, int]:
        """How many leaves are copied, transformed, fresh, and waived."""
        fresh = sum(m.source is None for m in self.moves)
        changed = sum(bool(m.ops) for m in self.moves)
        copied = len(self.moves) - fresh - changed
        return {"copied": copied, "transformed": changed, "fresh": fresh, "waived": len(self.waived)}

    def report(self) -> Report:
        """The plan as a table: one row per target leaf, then one per waived source leaf.

        Returns:
          A ``Report`` with the columns target, shape, dtype, source, came (the source's shape), how; its metadata
          hold the counts of leaves and the number of parameters read.

        >>> from transferjax.surgery import plan, rename
        >>> import numpy as np
        >>> print(plan({"w": np.zeros(2)}, {"bias": np.zeros(2)}, rename("w", "bias")))
        Plan: 1 sources -> 1 targets
        target  shape  dtype    source  came  how
        ------  -----  -------  ------  ----  ----
        bias    (2,)   float64  w       (2,)  copy
        copied: 1
        transformed: 0
        fresh: 0
        waived: 0
        parameters read: 2
        """
        rows = [
            (
                move.target,
                str(self.shapes[move.target].shape),
                self.shapes[move.target].dtype,
                " + ".join(move.sources) or None,
                " + ".join(str(self.sources[name].shape) for name in move.sources) or None,
                move.how,
            )
            for move in self.moves
        ]
        rows += [(None, None, None, name, str(self.sources[name].shape), "waived") for name in self.waived]
        used = {name for move in self.moves for name in move.sources}
        read = sum(math.prod(self.sources[name].shape) for name in used)
        bound = {} if self.fingerprint is None else {"source": self.fingerprint}
        title = f"Plan: {len(self.sources):,} sources -> {len(self.moves):,} targets"
        columns = ("target", "shape", "dtype", "source", "came", "how")
        return Report(title, columns, tuple(rows), {**self.counts(), "parameters read": read, **bound})

    def with_source(self, fingerprint: str | None) -> Plan:
        """The same plan, bound to the source with this fingerprint (``None``: to any)."""
        if fingerprint is not None and not isinstance(fingerprint, str):
            raise PlanError(
                f"a source's fingerprint is a str, got {describe(fingerprint)}. Write source.fingerprint(), or None."
            )
        return dataclasses.replace(self, fingerprint=fingerprint)

    def apply(self, read: Read | Mapping[str, Any], init: Read | Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Every target leaf's array.

        Args:
          read: ``name -> array`` of the source, or a mapping.
          init: ``path -> array`` of the target, asked for fresh leaves only, or a mapping.

        Returns:
          ``{target path: array}``, in natural order. Put it back with :func:`assemble`.

        Raises:
          PlanError: an array has another shape or dtype than the plan was made for, a name is missing, a cast
            loses values, or there are fresh leaves and no ``init``.

        >>> import numpy as np
        >>> from transferjax.surgery import plan, fresh
        >>> made = plan({"stem": np.zeros(2)}, {"head": np.zeros(1), "stem": np.zeros(2)}, fresh("head"))
        >>> made.apply({"stem": np.array([1.0, 2.0])}, {"head": np.array([5.0])})
        {'head': array([5.]), 'stem': array([1., 2.])}
        """
        return dict(self.leaves(read, init))

    def leaves(
        self, read: Read | Mapping[str, Any], init: Read | Mapping[str, Any] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """As :meth:`apply`, one ``(target path, array)`` at a time: only one source leaf need be in memory."""
        for move in self.moves:
            if move.source is None:
                yield move.target, self._initial(move, init)
                continue
            arrays = [_got(read, name, "source", self.sources[name]) for name in move.sources]
            value = move.run(arrays)
            if spec_of(value, move.target, "target") != self.shapes[move.target]:
                raise PlanError(
                    f"'{move.target}' came out as {describe(value)}; the plan promises {self.shapes[move.target]}. "
                    "Make the plan again, and for float64 and int64 in JAX arrays enable x64."
                )
            yield move.target, value

    def _initial(self, move: Move, init: Read | Mapping[str, Any] | None) -> Any:
        if init is None:
            raise PlanError(f"'{move.target}' is fresh, but there is no init. Write plan.apply(read, init).")
        value = _got(init, move.target, "initial value of", self.shapes[move.target])
        if isinstance(value, jax.ShapeDtypeStruct):
            raise PlanError(
                f"'{move.target}' is fresh, but its initial value is a jax.ShapeDtypeStruct. Pass an array."
            )
        return value

    def inverse(self, *moves: Move, leave_out: Selector | str | None = None, lossy: bool = False) -> Plan:
        """The plan that goes back: from this plan's targets to its source's names, shapes and dtypes.

        Permutations and reshapes are turned round, parts that were cut from one leaf are joined and the other way
        round, casts go back. Where several leaves hold all of a source leaf (``tie``, ``repeat``), the first makes it
        and the others are waived. A fresh leaf goes where the leaf that it replaced came from, in its own size: a new
        head is written under the old head's name. Source leaves that this plan waives are not made. The order of the
        source's leaves is natural, as in the plan.

        Args:
          *moves: how leaves are made that have no inverse, or no name in the source:
            ``Move("classifier.weight", "head/kernel", (("permute", (1, 0)),))``. They precede what would be found.
          leave_out: source leaves not to make, and fresh target leaves not to write; by their names.
          lossy: whether a cast that dropped digits (float32 to bfloat16) goes back too: the dtype, not the digits.

        Returns:
          A :class:`Plan`, bound to no source.

        Raises:
          PlanError: an operation has no inverse (resizing, a lossy cast), parts are missing, a fresh leaf has no name
            in the source, a given move does not fit, or ``leave_out`` selects nothing.

        >>> import numpy as np
        >>> from transferjax.surgery import plan, fresh, permute, rename
        >>> source = {"stem.w": np.ones((2, 3)), "fc.w": np.ones((1000, 2))}
        >>> target = {"stem": np.ones((3, 2)), "head": np.ones((2, 10))}
        >>> made = plan(source, target, rename("stem.w", "stem"), rename("fc.w", "head"), fresh("head"),
        ...             permute("**", (1, 0)))
        >>> for name, array in made.inverse().apply(target).items():
        ...     print(name, array.shape)
        fc.w (10, 2)
        stem.w (2, 3)
        """
        from transferjax.surgery._inverse import invert

        return invert(self, moves, leave_out, lossy)

    def to_json(self) -> str:
        """The whole plan as JSON; ``Plan.from_json`` is its exact inverse."""
        from transferjax.surgery._json import dump

        return dump(self)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that :meth:`to_json` wrote, checked.

        Raises:
          PlanError: the text is no JSON, no plan, of a newer version, or its moves do not fit its shapes.

        >>> import numpy as np
        >>> from transferjax.surgery import plan
        >>> made = plan({"bias": np.zeros(2)}, {"bias": np.zeros(2)})
        >>> Plan.from_json(made.to_json()) == made
        True
        """
        from transferjax.surgery._json import parse

        return parse(text)


def _names(move: Move) -> str:
    return " + ".join(f"'{name}'" for name in move.sources)


def _got(read: Read | Mapping[str, Any], name: str, noun: str, expected: Spec) -> Any:
    if not isinstance(read, Mapping) and not callable(read):
        raise PlanError(f"{noun} arrays come as {describe(read)}; expected a function name -> array, or a mapping.")
    try:
        value = read[name] if isinstance(read, Mapping) else read(name)
    except KeyError:
        raise PlanError(f"there is no {noun} '{name}'; the plan was made with one of {expected}.") from None
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        value = jnp.asarray(value)
    if spec_of(value, name, noun) != expected:
        raise PlanError(
            f"{noun} '{name}' is {describe(value)}; the plan was made for {expected}. "
            "Make the plan from the shapes of the source that it is applied to."
        )
    return value
