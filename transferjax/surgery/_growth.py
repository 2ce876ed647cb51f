"""Width: parameters of a wider or narrower network from those of another, and what that changed in its outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from transferjax._errors import PlanError, describe
from transferjax._report import Report
from transferjax.surgery._checks import check_key, check_tolerance
from transferjax.surgery._interpolation import module_of
from transferjax.surgery._patterns import compiled, raw
from transferjax.surgery._resize import whole
from transferjax.surgery._units import Axes, Numbers, checked_units, map_units, resolved, unit_map
from transferjax.tree import flatten


def widen(tree: Any, axes: Axes, width: int, key: Any = None, *, count: int | None = None, uneven: float = 0.0) -> Any:
    """A layer with more units that computes the same (Net2WiderNet); in transformers bert2BERT's FPI.

    Exact up to rounding: hidden units of dense layers, channels of convolutions (BatchNorm and depthwise between
    them too), inner units of a feed-forward block, attention heads. The width of a residual stream with LayerNorm is
    exact when ``width`` is a multiple of the old one and ``key`` is ``None``, and otherwise near. The size of a head
    is never exact: it is under a softmax.

    Args:
      tree: any pytree of arrays.
      axes: as for :func:`map_units`.
      width: number of units, at least the old one.
      key: PRNG key that draws the units to copy; default: in turn.
      count: as for :func:`map_units`.
      uneven: 0 gives copies equal shares, and then gradient descent keeps them equal for ever; 0 < uneven < 1 draws
        shares that differ by about this part (needs ``key``), which preserves the function as exactly.

    Returns:
      A tree of the same structure.

    Raises:
      PlanError: as :func:`map_units`; ``uneven`` is out of range or lacks its key, or ``key`` is no PRNG key.

    >>> import numpy as np
    >>> tree = {"a": np.ones((4, 3)), "b": np.ones((3, 2))}
    >>> grown = widen(tree, {"a": (1, "outgoing"), "b": (0, "incoming")}, 5)
    >>> x = np.ones((1, 4))
    >>> bool(np.allclose(x @ grown["a"] @ grown["b"], x @ tree["a"] @ tree["b"])), grown["a"].shape
    (True, (4, 5))
    """
    if not 0.0 <= uneven < 1.0 or (uneven and key is None):
        raise PlanError(f"uneven is {uneven}; expected at least 0 and below 1, and a key when it is above 0.")
    check_key(key)
    _, count = resolved(tree, axes, count)
    if key is None or not uneven:
        return map_units(tree, axes, unit_map(count, width, key), count=count)
    choose, draw = jax.random.split(key)
    units = unit_map(count, width, choose)
    weights = 1.0 + uneven * np.asarray(jax.random.uniform(draw, (width,), minval=-1.0), dtype=np.float64)
    return map_units(
        tree, axes, units, count=count, shares=weights / np.bincount(units, weights, minlength=count)[units]
    )


def widen_aki(tree: Any, axes: Axes, width: int, pattern: str, key: Any = None, *, count: int | None = None) -> Any:
    r"""More units per layer, the new ones from the layer above (bert2BERT's advanced knowledge initialisation).

    As :func:`widen`, but in each outgoing leaf the entries of new units are those that the same leaf of the next
    layer has at these places. It breaks the symmetry between copies; the function is *not* preserved (the first
    ``count`` units of each layer read and make what they did, the others add to their sums).

    Args:
      tree: any pytree of arrays.
      axes: as for :func:`map_units`, of all layers.
      width: number of units.
      pattern: a regular expression over full paths with the group ``(?P<i>\d+)`` for the number of the layer. Leaves
        that it does not match, and those of the last layer, are widened as by :func:`widen`.
      key: as for :func:`widen`.
      count: as for :func:`map_units`.

    Returns:
      A tree of the same structure.

    Raises:
      PlanError: as :func:`map_units`; the pattern lacks its group, or no leaf has a next layer.

    >>> import numpy as np
    >>> tree = {f"blocks/{i}/up": np.array([[1.0 + i, 5.0 + i]]) for i in range(2)}
    >>> grown = widen_aki(tree, {"blocks/*/up": (1, "outgoing")}, 3, r"blocks/(?P<i>\d+)/.*")
    >>> grown["blocks/0/up"].tolist(), grown["blocks/1/up"].tolist()
    ([[1.0, 5.0, 2.0]], [[2.0, 6.0, 2.0]])

    Source: C. Chen et al., "bert2BERT: Towards Reusable Pretrained Language Models", 2022, section 3.3.
    """
    made = compiled(f"widen_aki(..., {raw(pattern)})", pattern, "")
    if "i" not in made.groupindex:
        raise PlanError(f"{raw(pattern)} has no group i. Write (?P<i>\\d+) where the layer's number stands.")
    found, count = resolved(tree, axes, count)
    flat, treedef = flatten(widen(tree, axes, width, key, count=count))
    wide = dict(flat)
    grown = dict(wide)
    is_new = np.arange(width) >= count
    borrowed = 0
    for path, leaf in flat:
        above = _above(made, path)
        if path not in found or found[path].kind != "outgoing" or above not in found:
            continue
        if wide[above].shape != leaf.shape or found[above] != found[path]:
            raise PlanError(
                f"'{path}' and '{above}' of the next layer differ: {describe(leaf)} and {describe(wide[above])} when "
                "widened. Expected layers of one form; leave other leaves out of the pattern."
            )
        at = found[path]
        mask = at.per_entry(is_new).reshape([-1 if axis == at.axis else 1 for axis in range(leaf.ndim)])
        grown[path] = module_of(leaf).where(mask, wide[above], leaf)
        borrowed += 1
    if not borrowed:
        raise PlanError(f"no outgoing leaf that {raw(pattern)} matches has a next layer. Write widen(...) instead.")
    return jax.tree.unflatten(treedef, list(grown.values()))


def narrow(tree: Any, axes: Axes, units: int | Numbers, *, count: int | None = None) -> Any:
    """A layer with fewer units: the strongest, or given ones. A start for a student, not the same function.

    Args:
      tree: any pytree of arrays.
      axes: as for :func:`map_units`.
      units: the old units to keep, in their new order; or how many: those with the largest L2 norm over the outgoing
        leaves of at least two axes, in their old order.
      count: as for :func:`map_units`.

    Returns:
      A tree of the same structure.

    Raises:
      PlanError: as :func:`map_units`; more units are asked for than there are, one comes twice, or no kernel is
        outgoing and so there is no norm.

    >>> import numpy as np
    >>> tree = {"a": np.array([[1.0, 3.0, 2.0]]), "b": np.array([[1.0], [3.0], [2.0]])}
    >>> narrow(tree, {"a": (1, "outgoing"), "b": (0, "incoming")}, 2)["a"].tolist()
    [[3.0, 2.0]]
    """
    found, total = resolved(tree, axes, count)
    if not whole(units):
        chosen = checked_units(units, total)
        if len(set(chosen.tolist())) != len(chosen):
            raise PlanError("a unit comes twice in units. Expected each at most once; write map_units(...) to copy.")
        return map_units(tree, axes, chosen, count=total)
    if not 1 <= units <= total:  # type: ignore[operator]
        raise PlanError(f"{units} units are asked for; expected 1 to {total}. Write widen(...) for more.")
    norms = np.zeros(total)
    kernels = [(found[path], leaf) for path, leaf in flatten(tree)[0] if path in found and leaf.ndim > 1]
    kernels = [(at, leaf) for at, leaf in kernels if at.kind == "outgoing"]
    if not kernels:
        raise PlanError("no outgoing leaf has two axes or more, so units have no norm. Give the units to keep.")
    for at, leaf in kernels:
        squares = np.square(np.moveaxis(np.asarray(leaf, np.float64), at.axis, 0)).reshape(leaf.shape[at.axis], -1)
        shape = (at.repeats, total) if at.layout == "interleaved" else (total, at.repeats)
        norms += squares.sum(1).reshape(shape).sum(0 if at.layout == "interleaved" else 1)
    return map_units(tree, axes, np.sort(np.argsort(-norms, kind="stable")[:units]), count=total)


def growth_report(
    old: Any,
    new: Any,
    probe: Any,
    apply: Callable[[Any, Any], Any],
    apply_new: Callable[[Any, Any], Any] | None = None,
    *,
    tolerance: float = 1e-5,
) -> Report:
    """How two networks compare: sizes, and the largest difference of their outputs on a batch.

    Args:
      old: tree of the one network.
      new: tree of the other.
      probe: a batch of inputs.
      apply: ``(tree, probe) -> outputs`` of the old network; outputs may be any tree of arrays. Of a Model over its
        params: ``lambda params, x: model.apply(params, model.extra, x)[0]``.
      apply_new: the same of the new network; default: ``apply``.
      tolerance: the largest difference at which the function counts as preserved.

    Returns:
      A ``Report`` with the columns quantity, old, new; its metadata hold the difference, the tolerance, and whether
      the function is preserved.

    Raises:
      PlanError: the outputs differ in structure or shape; ``apply`` is no function, or ``tolerance`` no number.

    >>> import numpy as np
    >>> apply = lambda tree, x: x @ tree["a"] @ tree["b"]
    >>> old = {"a": np.ones((4, 3)), "b": np.ones((3, 2))}
    >>> new = widen(old, {"a": (1, "outgoing"), "b": (0, "incoming")}, 6)
    >>> print(growth_report(old, new, np.ones((1, 4)), apply))
    Growth: 18 -> 36 parameters
    quantity             old  new
    -------------------  ---  ---
    leaves                 2    2
    parameters            18   36
    largest |output|      12   12
    max |f_old - f_new|         0
    max |f_old - f_new|: 0
    tolerance: 1e-05
    function preserved: yes
    """
    check_tolerance(tolerance)
    if not callable(apply) or not (apply_new is None or callable(apply_new)):
        wrong = apply_new if callable(apply) else apply
        raise PlanError(f"growth_report() expects apply(tree, probe) as a function, got {describe(wrong)}.")
    before, after = flatten(apply(old, probe))[0], flatten((apply_new or apply)(new, probe))[0]
    shapes = [[(path, tuple(np.shape(value))) for path, value in side] for side in (before, after)]
    if shapes[0] != shapes[1]:
        odd = next((pair for pair in zip(*shapes) if pair[0] != pair[1]), None)
        told = f"{odd[0]} and {odd[1]}" if odd else f"{len(before)} and {len(after)} arrays"
        raise PlanError(f"the outputs of the two networks differ in form: {told}. Expected the same paths and shapes.")
    values = [[np.asarray(value, np.float64) for _, value in side] for side in (before, after)]
    largest = [_largest(side) for side in values]
    gap = _largest([a - b for a, b in zip(*values)])
    leaves = [[leaf for _, leaf in flatten(tree)[0]] for tree in (old, new)]
    sizes = [sum(int(np.size(leaf)) for leaf in side) for side in leaves]
    rows = (
        ("leaves", len(leaves[0]), len(leaves[1])),
        ("parameters", *sizes),
        ("largest |output|", *largest),
        ("max |f_old - f_new|", None, gap),
    )
    facts = {"max |f_old - f_new|": gap, "tolerance": tolerance, "function preserved": gap <= tolerance}
    return Report(f"Growth: {sizes[0]:,} -> {sizes[1]:,} parameters", ("quantity", "old", "new"), rows, facts)


def _above(pattern: re.Pattern[str], path: str) -> str | None:
    """The path of the same leaf in the next layer."""
    found = pattern.fullmatch(path)
    if found is None or not (found["i"] or "").isdecimal():
        return None
    start, stop = found.span("i")
    return f"{path[:start]}{int(found['i']) + 1}{path[stop:]}"


def _largest(arrays: Sequence[np.ndarray]) -> float:
    """The largest absolute value, NaN when there is one."""
    return float(np.abs(np.concatenate([np.zeros(1), *map(np.ravel, arrays)])).max())
