"""Leaves of trees and Models by path, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from transferjax._errors import PlanError, describe, listing, nearest_hint
from transferjax._types import Model
from transferjax.tree import flatten, natural


def leaves(tree: Any) -> dict[str, Any]:
    """Every leaf by its path, in natural order; of a Model, params and extra in one namespace.

    Args:
      tree: any pytree, a mapping from path to leaf, or a ``Model``.

    Returns:
      ``{path: leaf}``.

    Raises:
      PlanError: params and extra of a Model have a path in common.

    >>> leaves(Model(None, None, {"bn": {"scale": 1.0}}, {"bn": {"mean": 0.0}}))
    {'bn/mean': 0.0, 'bn/scale': 1.0}
    """
    if isinstance(tree, Model):
        params, extra = dict(flatten(tree.params)[0]), dict(flatten(tree.extra)[0])
        both = [path for path in params if path in extra]
        if both:
            raise PlanError(
                f"params and extra of the Model both have {listing([repr(p) for p in both])}. "
                "Expected one leaf per path: rename one of them in the Model."
            )
        found = {**params, **extra}
    else:
        found = dict(flatten(dict(tree) if isinstance(tree, Mapping) and type(tree) is not dict else tree)[0])
    # The path itself decides between "01" and "1", which are equal as numbers: no order of a dict is seen.
    return dict(sorted(found.items(), key=lambda item: (natural(item[0]), item[0])))


def assemble(target: Any, arrays: Mapping[str, Any]) -> Any:
    """The arrays in the structure of a target; the inverse of listing its leaves by path.

    Args:
      target: any pytree, or a ``Model``; only its structure is used (and a Model's functions).
      arrays: ``{path: array}`` with every path of the target, as from ``Plan.apply``.

    Returns:
      The same kind as ``target``.

    Raises:
      PlanError: a path of the target is missing, or ``arrays`` has a path that the target lacks.

    >>> assemble({"head": {"bias": 0.0}, "stem": [1.0]}, {"stem/0": 3.0, "head/bias": 2.0})
    {'head': {'bias': 2.0}, 'stem': [3.0]}
    """
    if not isinstance(arrays, Mapping):
        raise PlanError(f"assemble() expects arrays as {{path: array}}, got {describe(arrays)}: write plan.apply(...).")
    known = leaves(target)
    missing = [path for path in known if path not in arrays]
    if missing:
        hint = nearest_hint(missing[0], [a for a in arrays if a not in known])
        raise PlanError(f"assemble() has no array for {listing(missing)}; expected one per leaf of the target.{hint}")
    surplus = sorted((path for path in arrays if path not in known), key=natural)
    if surplus:
        raise PlanError(
            f"assemble() got arrays that the target has no leaf for: {listing(surplus)}."
            f"{nearest_hint(surplus[0], list(known))}"
        )
    if isinstance(target, Model):
        return target._replace(params=_place(target.params, arrays), extra=_place(target.extra, arrays))
    return _place(target, arrays)


def _place(tree: Any, arrays: Mapping[str, Any]) -> Any:
    flat, treedef = flatten(tree)
    return jax.tree.unflatten(treedef, [arrays[path] for path, _ in flat])
