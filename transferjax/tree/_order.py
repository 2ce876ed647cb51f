"""An order of stages: one selector for each, from input to output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transferjax._errors import SelectionError, describe
from transferjax._types import Model
from transferjax.tree._select import Selector, as_selector


def as_order(order: Any, verb: str) -> list[Selector]:
    """A list of selectors or globs, checked: there is no default order, as that of a tree's keys is not that of layers.

    Args:
      order: one selector per stage, from input to output.
      verb: the function that was given it, for errors.

    Returns:
      The selectors.

    Raises:
      SelectionError: ``order`` is no list.

    >>> as_order(["stem/**", "head/**"], "last")
    ['stem/**', 'head/**']
    """
    if isinstance(order, (Model, Mapping, str)) or not isinstance(order, Sequence):
        raise SelectionError(
            f"{verb}() expects order as a list of selectors, one per stage from input to output; got "
            f"{describe(order)}. Write tj.models.stages(name), or tj.stages(model, inputs)."
        )
    return [as_selector(stage) for stage in order]
