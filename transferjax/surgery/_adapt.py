"""The rule adapt: leaves whose source has another size are resized on the way, as plain operations of the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from transferjax._errors import PlanError, nearest_hint
from transferjax.surgery._ops import Op, Spec, check_op
from transferjax.surgery._resize import FILLS, METHODS, row_numbers, square_grid, whole
from transferjax.surgery._rules import Transform
from transferjax.tree import Selector, as_selector

OPTIONS: dict[str, dict[str, Any]] = {
    "position_embedding": {"grid": None, "old_grid": None, "prefix": 1, "method": "bicubic"},
    "patch_embedding": {},
    "input_channels": {},
    "rows": {"fill": "mean", "mapping": None, "axis": 0},
}
"""What a leaf can be resized as, with the options of each and their defaults."""


@dataclasses.dataclass(frozen=True, repr=False)
class Adapt(Transform):
    """See :func:`adapt`."""

    how: str
    options: tuple[tuple[str, Any], ...]

    def __repr__(self) -> str:
        told = "".join(f", {name}={_written(value)}" for name, value in self.options)
        return f"adapt({self.selector!r}, '{self.how}'{told})"

    @property
    def conditional(self) -> bool:
        return True

    def op(self, came: Spec) -> Op | None:
        raise PlanError(f"{self!r} depends on the size of its target. Call op_for(came, expected).")

    def op_for(self, came: Spec, expected: Spec) -> Op | None:
        """The operation for a leaf that comes as ``came`` and is to be as ``expected``; ``None``: it has that size."""
        if len(came.shape) != len(expected.shape):
            raise PlanError(
                f"{self!r} needs a leaf of as many axes as its target; {came} came for {expected}. "
                "Write it after the reshape and permute rules of the leaf."
            )
        op = _OPERATIONS[self.how](came, expected, **{**OPTIONS[self.how], **dict(self.options)})
        return None if op is None else check_op(op)


def adapt(selector: Selector | str, how: str, **options: Any) -> Adapt:
    """Target leaves whose source has another size, and is resized on the way.

    The new size is that of the target leaf; the plan records it in the operation. The rule looks at the leaf as it
    comes out of the rules before it: write it after ``permute`` and ``reshape`` of the same leaf.

    Args:
      selector: target leaves; those that come in the target's size are left as they are.
      how: what the leaf is. ``"position_embedding"``, by :func:`resize_position_embedding` (options ``grid`` and
        ``old_grid``, squares by default, ``prefix=1``, ``method="bicubic"``); ``"patch_embedding"``, [h, w, in, out],
        by :func:`resize_patch_embedding`; ``"input_channels"``, [h, w, in, out], by :func:`adapt_input_channels`;
        ``"rows"``, by :func:`resize_rows` (options ``fill="mean"`` or ``"zeros"``, ``mapping``, ``axis=0``).
      **options: of ``how``.

    Returns:
      A rule for :func:`plan`.

    Raises:
      PlanError: ``how`` or an option is unknown, or an option is malformed.

    >>> rule = adapt("pos_embed", "position_embedding", method="align_corners")
    >>> rule
    adapt('pos_embed', 'position_embedding', method='align_corners')
    >>> rule.op_for(Spec((1, 197, 8), "float32"), Spec((1, 577, 8), "float32"))
    ('resize_position_embedding', (14, 14), (24, 24), 1, 'align_corners')
    >>> adapt("embed/embedding", "rows").op_for(Spec((100, 8), "float32"), Spec((103, 8), "float32"))
    ('resize_rows', 103, 'mean', None, 0)
    """
    chosen = as_selector(selector)
    if how not in OPTIONS:
        raise PlanError(
            f"adapt({chosen!r}, {how!r}) is unknown. Expected one of {', '.join(map(repr, OPTIONS))}."
            f"{nearest_hint(str(how), OPTIONS, 1)}"
        )
    unknown = [name for name in options if name not in OPTIONS[how]]
    if unknown:
        known = ", ".join(OPTIONS[how]) or "none"
        raise PlanError(f"adapt({chosen!r}, '{how}') has no option '{unknown[0]}'. Its options: {known}.")
    given = {name: _frozen(value) for name, value in options.items()}
    made = Adapt(chosen, how, tuple((name, given[name]) for name in OPTIONS[how] if name in given))
    _check(made, {**OPTIONS[how], **given})
    return made


def _check(rule: Adapt, options: Mapping[str, Any]) -> None:
    """Finds malformed options when the rule is written; the numbers stand for those of a plan."""
    if rule.how == "position_embedding":
        grids = [(1, 1) if options[name] is None else options[name] for name in ("old_grid", "grid")]
        if options["method"] not in METHODS:
            raise PlanError(f"{rule!r} has an unknown method. Expected one of {', '.join(map(repr, METHODS))}.")
        check_op(("resize_position_embedding", *grids, options["prefix"], options["method"]))
    elif rule.how == "rows":
        if not isinstance(options["fill"], str) or options["fill"] not in FILLS:
            raise PlanError(
                f"adapt({rule.selector!r}, 'rows') has a fill that a plan cannot hold. Expected 'mean' or 'zeros'; "
                "give rows of your own to resize_rows(array, n, fill=rows) outside the plan."
            )
        rows = options["mapping"]
        named = _thawed(rows)
        listed = tuple(named.values()) if isinstance(named, dict) else None if rows is None else row_numbers(rows, 0)
        check_op(("resize_rows", len(listed or (0,)), options["fill"], listed, options["axis"]))


def _position_embedding(came: Spec, expected: Spec, grid: Any, old_grid: Any, prefix: int, method: str) -> Op | None:
    if came.shape == expected.shape and grid is None and old_grid is None:
        return None
    new = square_grid(expected.shape, prefix, "grid") if grid is None else tuple(grid)
    old = square_grid(came.shape, prefix, "old_grid") if old_grid is None else tuple(old_grid)
    return None if old == new else ("resize_position_embedding", old, new, prefix, method)


def _patch_embedding(came: Spec, expected: Spec) -> Op | None:
    size = expected.shape[:2]
    return None if came.shape[:2] == size else ("resize_patch_embedding", size)


def _input_channels(came: Spec, expected: Spec) -> Op | None:
    if len(expected.shape) < 3:
        raise PlanError(f"the kernel of a convolution is [h, w, in, out]; {expected} is expected of it.")
    n = expected.shape[-2]
    return None if came.shape[-2] == n else ("adapt_input_channels", n)


def _rows(came: Spec, expected: Spec, fill: str, mapping: Any, axis: int) -> Op | None:
    if axis >= len(expected.shape):
        raise PlanError(f"rows along axis {axis} are expected; the target is {expected}.")
    n = expected.shape[axis]
    rows = None if mapping is None else row_numbers(_thawed(mapping), n)
    if came.shape[axis] == n and (rows is None or rows == tuple(range(n))):
        return None
    return ("resize_rows", n, fill, rows, axis)


_OPERATIONS: dict[str, Callable[..., Op | None]] = {
    "position_embedding": _position_embedding,
    "patch_embedding": _patch_embedding,
    "input_channels": _input_channels,
    "rows": _rows,
}


def _frozen(value: Any) -> Any:
    """An option that hashes: a dict as the tuple of its sorted pairs, any other list as the tuple of its entries."""
    if isinstance(value, Mapping):
        wrong = [item for item in value.items() if not all(map(whole, item))]
        if wrong or not value:
            told = f"{wrong[0][0]!r}: {wrong[0][1]!r}" if wrong else "no row"
            raise PlanError(f"the mapping has {told}; expected {{new row: old row}}, whole numbers.")
        return tuple(sorted(value.items()))
    return tuple(value) if hasattr(value, "__iter__") and not isinstance(value, str) else value


def _thawed(mapping: tuple[Any, ...]) -> Any:
    return dict(mapping) if mapping and isinstance(mapping[0], tuple) else mapping


def _written(value: Any) -> str:
    if not isinstance(value, tuple) or len(value) <= 8:
        return repr(_thawed(value)) if isinstance(value, tuple) else repr(value)
    return f"<{len(value):,} rows>"
