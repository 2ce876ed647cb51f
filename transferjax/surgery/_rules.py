"""Rules: small values that say where leaves come from and how they change on the way."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transferjax._errors import PlanError
from transferjax.surgery._ops import Op, Spec, castable, check_axes, check_dtype, check_shape, infer
from transferjax.surgery._patterns import compiled, expand, name_of, raw
from transferjax.tree import Selector, as_selector

Axes = tuple[int, ...]
Shape = tuple[int, ...]
TORCH_LAYOUT = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
"""From torch's kernels to Flax's, by the number of axes."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Base of every rule; it prints as it is written. Rules of your own derive from ``Naming`` or ``Transform``.

    >>> isinstance(fresh("head/**"), Rule)
    True
    """


class Lead(NamedTuple):
    """Where a source leaf goes; ``cut``: only a part of it; ``join`` and ``order``: with others into one target.

    >>> Lead("query/bias", cut=("slice", 0, 0, 4)).cut  # axis, start, stop
    ('slice', 0, 0, 4)
    """

    target: str
    cut: Op | None = None
    join: Op | None = None
    order: int = 0


@dataclasses.dataclass(frozen=True, repr=False)
class Naming(Rule, abc.ABC):
    """A rule over source names: at most one of them may match a name.

    >>> import numpy as np
    >>> from transferjax.surgery import plan
    >>> @dataclasses.dataclass(frozen=True)
    ... class Lower(Naming):
    ...     def leads(self, name, came):
    ...         return (Lead(name.lower()),) if name != name.lower() else None
    >>> plan({"Head/Bias": np.zeros(2)}, {"head": {"bias": np.zeros(2)}}, Lower()).moves[0].source
    'Head/Bias'
    """

    @property
    def otherwise(self) -> bool:
        """Whether the rule is only for names that no other matches."""
        return False

    @abc.abstractmethod
    def leads(self, name: str, came: Spec) -> tuple[Lead, ...] | None:
        """Where the leaf goes; ``None`` when the rule does not match."""

    def check_parts(self, target: str, names: Sequence[str], orders: Sequence[int]) -> None:
        """Raises a PlanError when the sources that join in one target are not all there, once each."""


@dataclasses.dataclass(frozen=True, repr=False)
class Rename(Naming):
    """See :func:`rename`."""

    pattern: re.Pattern[str]
    replacement: str | Callable[[re.Match[str]], str]
    last: bool = False

    @property
    def otherwise(self) -> bool:
        return self.last

    def __repr__(self) -> str:
        if self.replacement is _slashes:
            return "dots_to_slashes()"
        new = raw(self.replacement) if isinstance(self.replacement, str) else name_of(self.replacement)
        return f"rename({raw(self.pattern.pattern)}, {new}{', otherwise=True' if self.last else ''})"

    def __call__(self, name: str) -> str | None:
        """The new name, or ``None`` when the rule does not match."""
        found = self.pattern.fullmatch(name)
        return None if found is None else expand(self, found, self.replacement)

    def leads(self, name: str, came: Spec) -> tuple[Lead, ...] | None:
        new = self(name)
        return None if new is None else (Lead(new),)


@dataclasses.dataclass(frozen=True, repr=False)
class Transform(Rule, abc.ABC):
    """A rule that changes the leaves it selects on the way; ``op`` makes the operation from what comes.

    >>> import numpy as np
    >>> from transferjax.surgery import plan
    >>> from transferjax.tree import glob
    >>> @dataclasses.dataclass(frozen=True)
    ... class Backwards(Transform):
    ...     def op(self, came):
    ...         return ("permute", tuple(range(len(came.shape)))[::-1])
    >>> plan({"w": np.zeros((4, 3, 2))}, {"w": np.zeros((2, 3, 4))}, Backwards(glob("w"))).moves[0].how
    'permute(2, 1, 0)'
    """

    selector: Selector

    @property
    def conditional(self) -> bool:
        """Whether the rule may leave every leaf as it is; of others a plan says that they do nothing."""
        return False

    @abc.abstractmethod
    def op(self, came: Spec) -> Op | None:
        """The operation for a leaf that comes as ``came``; ``None`` to leave it as it is."""

    def op_for(self, came: Spec, expected: Spec) -> Op | None:
        """As ``op``, for rules that look at the target leaf too: what a plan calls."""
        return self.op(came)


@dataclasses.dataclass(frozen=True, repr=False)
class Permute(Transform):
    """See :func:`permute`."""

    axes: tuple[tuple[int, Axes | None], ...]
    by_rank: bool

    def __repr__(self) -> str:
        if self.axes == tuple(TORCH_LAYOUT.items()):
            return f"torch_layout({self.selector!r})"
        return f"permute({self.selector!r}, {dict(self.axes) if self.by_rank else self.axes[0][1]})"

    def op(self, came: Spec) -> Op | None:
        rank, table = len(came.shape), dict(self.axes)
        if rank not in table:
            write = f"add {rank}: axes, or {rank}: None to leave it" if self.by_rank else "select only what it fits"
            expected = " or ".join(map(str, table))
            raise PlanError(f"{self!r} expects {expected} axes; {came} came. Change the rule: {write}.")
        axes = table[rank]
        return None if axes is None else ("permute", axes)


@dataclasses.dataclass(frozen=True, repr=False)
class Reshape(Transform):
    """See :func:`reshape`."""

    shape: Shape | Callable[[Shape], Sequence[int]]

    def __repr__(self) -> str:
        return f"reshape({self.selector!r}, {name_of(self.shape) if callable(self.shape) else self.shape})"

    def op(self, came: Spec) -> Op | None:
        wanted = self.shape
        if callable(wanted):
            try:
                wanted = check_shape(wanted(came.shape))[0]
            except (LookupError, TypeError, ArithmeticError) as error:
                raise PlanError(
                    f"{self!r} raised {error!r} for the shape {came.shape}. Select only what it fits."
                ) from None
        shape = infer([("reshape", wanted)], [came]).shape
        return None if shape == came.shape else ("reshape", shape)


@dataclasses.dataclass(frozen=True, repr=False)
class Cast(Transform):
    """See :func:`cast`."""

    dtype: str | None

    def __repr__(self) -> str:
        return f"cast({self.selector!r}{'' if self.dtype is None else f', {self.dtype!r}'})"

    @property
    def conditional(self) -> bool:
        return self.dtype is None

    def op(self, came: Spec) -> Op | None:
        return None if self.dtype in (None, came.dtype) else ("cast", self.dtype)

    def op_for(self, came: Spec, expected: Spec) -> Op | None:
        wanted = self.dtype or (expected.dtype if castable(came.dtype, expected.dtype) else came.dtype)
        return None if wanted == came.dtype else ("cast", wanted)


@dataclasses.dataclass(frozen=True, repr=False)
class Fresh(Rule):
    """See :func:`fresh`."""

    selector: Selector

    def __repr__(self) -> str:
        return f"fresh({self.selector!r})"


@dataclasses.dataclass(frozen=True, repr=False)
class Waive(Rule):
    """See :func:`waive`."""

    selector: Selector
    optional: bool = False

    def __repr__(self) -> str:
        return f"waive({self.selector!r}{', optional=True' if self.optional else ''})"


def rename(pattern: str, replacement: str | Callable[[re.Match[str]], str], *, otherwise: bool = False) -> Rename:
    r"""Source names that a regular expression matches as a whole become target paths.

    All rename rules look at the *original* names at once: none sees what another made, so two names can be
    swapped, and the order of the rules does not matter. Two rules that match one name raise. A name that no rule
    matches stays exactly as it is (a "." stays a "."; see :func:`dots_to_slashes`).

    Args:
      pattern: a Python regular expression, matched against the full source name (``re.fullmatch``).
      replacement: the target path, with ``\1`` or ``\g<name>`` for groups; or a function of the match.
      otherwise: whether the rule is for those names only that no other rename rule matches.

    Returns:
      A rule for :func:`plan`.

    Raises:
      PlanError: the pattern does not compile, or the replacement refers to a group that the pattern lacks.

    >>> rename(r"_blocks\.(\d+)\._expand_conv\.weight", r"blocks/\1/expand/kernel")("_blocks.3._expand_conv.weight")
    'blocks/3/expand/kernel'
    >>> leaf = {"weight": "scale", "bias": "bias"}
    >>> rename(r"bn\.(\w+)", lambda m: f"bn/{leaf[m[1]]}")("bn.weight")
    'bn/scale'
    """
    return Rename(compiled(f"rename({raw(pattern)}, {raw(replacement)})", pattern, replacement), replacement, otherwise)


def dots_to_slashes() -> Rename:
    """Every name that no other rename rule matches, with each ``"."`` as ``"/"``.

    Returns:
      A rule for :func:`plan`.

    >>> dots_to_slashes()("encoder.layer.0.bias")
    'encoder/layer/0/bias'
    """
    return rename(r".*\..*", _slashes, otherwise=True)


def permute(selector: Selector | str, axes: Sequence[int] | Mapping[int, Sequence[int] | None]) -> Permute:
    """Target leaves whose source has its axes in another order.

    The rule decides, never the shape: a square matrix is transposed like any other.

    Args:
      selector: target leaves.
      axes: as for ``numpy.transpose``: axis ``i`` of the result is axis ``axes[i]`` of the source. A mapping
        ``{rank: axes}`` chooses by the number of axes that come; ``None`` leaves that rank as it is, and a rank
        without an entry raises.

    Returns:
      A rule for :func:`plan`.

    Raises:
      PlanError: the axes are no permutation, do nothing, or have another length than their rank.

    >>> import numpy as np
    >>> rules = [rename("w", "kernel"), permute("kernel", (1, 0))]
    >>> from transferjax.surgery import plan
    >>> plan({"w": np.zeros((2, 3))}, {"kernel": np.zeros((3, 2))}, *rules).moves[0].ops
    (('permute', (1, 0)),)
    >>> permute("**/kernel", {4: (2, 3, 1, 0), 2: (1, 0)})
    permute('**/kernel', {4: (2, 3, 1, 0), 2: (1, 0)})
    """
    chosen = as_selector(selector)
    by_rank = isinstance(axes, Mapping)
    if isinstance(axes, Mapping):
        table = tuple((rank, None if one is None else check_axes(one)[0]) for rank, one in axes.items())
    else:
        given = check_axes(axes)[0]
        table = ((len(given), given),)
    for rank, one in table:
        if one is not None and len(one) != rank:
            raise PlanError(f"permute({chosen!r}, ...) has {len(one)} axes {one} for rank {rank}; expected {rank}.")
        if one is not None and one == tuple(range(rank)):
            raise PlanError(f"permute({chosen!r}, {one}) leaves every axis in its place. Remove it, or write None.")
    if all(one is None for _, one in table):
        raise PlanError(f"permute({chosen!r}, {dict(table)}) does nothing. Write axes for at least one rank.")
    return Permute(chosen, table, by_rank)


def torch_layout(selector: Selector | str = "**/kernel") -> Permute:
    """Kernels from torch's layout to Flax's.

    Convolution (out, in, h, w) to (h, w, in, out), also in 1 and 3 dimensions; depthwise (channels, 1, h, w) to
    (h, w, 1, channels) is the same permutation; dense (out, in) to (in, out). Not for transposed convolutions
    (torch keeps them as (in, out, h, w)) and not for embeddings, which are (rows, features) in both.

    Args:
      selector: target leaves, each of 2 to 5 axes.

    Returns:
      A rule for :func:`plan`.

    >>> torch_layout("head/kernel").op(Spec((10, 4), "float32"))
    ('permute', (1, 0))
    """
    return permute(selector, TORCH_LAYOUT)


def reshape(selector: Selector | str, shape: Sequence[int] | Callable[[Shape], Sequence[int]]) -> Reshape:
    """Target leaves whose source has the same elements, in the same order, in another shape.

    Args:
      selector: target leaves.
      shape: the new shape, one size may be -1; or a function from the shape that comes to the new one, called
        when the plan is made.

    Returns:
      A rule for :func:`plan`.

    Raises:
      PlanError: the shape is malformed.

    >>> reshape("query/kernel", (8, 2, -1)).op(Spec((8, 6), "float32"))
    ('reshape', (8, 2, 3))
    >>> reshape("depthwise/kernel", lambda s: (s[0], s[1], 1, s[2] * s[3])).op(Spec((3, 3, 8, 1), "float32"))
    ('reshape', (3, 3, 1, 8))
    """
    return Reshape(as_selector(selector), shape if callable(shape) else check_shape(shape)[0])


def cast(selector: Selector | str, dtype: Any = None) -> Cast:
    """Target leaves whose source is converted to a dtype; without this rule a difference of dtype raises.

    Integers and floats change width, and integers become floats; a fraction never becomes an integer. A value that
    does not survive (an integer that changes, a float that overflows) raises when the plan is applied.

    Args:
      selector: target leaves; those that come in ``dtype`` already are left as they are.
      dtype: the dtype, which is to be the target's. ``None``: that of each target leaf, whatever comes, for files that
        are published in several widths; the plan says what is converted.

    Returns:
      A rule for :func:`plan`.

    Raises:
      PlanError: ``dtype`` is no dtype.

    >>> cast("**", "bfloat16").op(Spec((2,), "float32"))
    ('cast', 'bfloat16')
    >>> cast("**").op_for(Spec((2,), "bfloat16"), Spec((2,), "float32"))
    ('cast', 'float32')
    """
    return Cast(as_selector(selector), None if dtype is None else check_dtype(dtype)[0])


def fresh(selector: Selector | str) -> Fresh:
    """Target leaves that keep the target's own initial values.

    A source leaf that the other rules lead to such a leaf is waived with it, and listed in ``Plan.waived``.

    Args:
      selector: target leaves.

    Returns:
      A rule for :func:`plan`.

    >>> fresh("head/fc/**")
    fresh('head/fc/**')
    """
    return Fresh(as_selector(selector))


def waive(selector: Selector | str, *, optional: bool = False) -> Waive:
    """Source leaves that are left behind on purpose.

    Args:
      selector: *source* leaves, by their own names. A "." is an ordinary character of a segment, so that ``*``
        crosses it.
      optional: whether a source may lack them, as files of some versions lack a buffer; by default that raises.

    Returns:
      A rule for :func:`plan`.

    >>> waive("*.num_batches_tracked").selector("blocks.0.bn.num_batches_tracked")
    True
    """
    return Waive(as_selector(selector), optional)


def _slashes(match: re.Match[str]) -> str:
    return match[0].replace(".", "/")
