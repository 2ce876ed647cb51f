"""Git Re-Basin: the hidden units of one network in the order of another's, so that the two can be averaged.

Source: Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries",
arXiv:2209.04836. Assignments are solved by ``scipy.optimize.linear_sum_assignment``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from transferjax._errors import DataError, SelectionError, TransferError, describe, is_whole, listing
from transferjax._report import Report
from transferjax.merging._permutations import Group, Spec, apply_permutations, leaves_of, resolve
from transferjax.merging._trees import check_alike

Orders = dict[str, np.ndarray]


class Rebasin(NamedTuple):
    """What :func:`rebasin` returns.

    Attributes:
      aligned: the other network, its units in the reference's order: the same kind and the same values.
      permutations: ``{group: integers [units]}``, for :func:`apply_permutations` on whatever else has these axes.
      report: one row per group.
    """

    aligned: Any
    permutations: dict[str, np.ndarray]
    report: Report


def rebasin(
    reference: Any, other: Any, spec: Spec, *, orders: int = 1, seed: int = 0, iterations: int = 100
) -> Rebasin:
    """Align the hidden units of a network to those of a reference by their weights (Git Re-Basin, weight matching).

    Two networks that were trained apart compute alike features in different units, so the mean of their weights is
    worse than either. One group of units at a time is matched, by a linear assignment, while the others stay as they
    are, until no group improves the squared distance of the weights. The search starts from the order that there is,
    and once more from a matching that looks at sorted weights wherever the other units are not matched yet (it finds
    any copy with permuted units again); the best result is kept. Statistics (``extra/...``) follow their units and
    are not compared.

    A network with BatchNorm needs the statistics of its mean weights (REPAIR, Jordan et al., arXiv:2211.08403):
    average, then call ``transferjax.interop.reestimate_statistics(model, params, batches)``.

    Args:
      reference: a tree, or a Model; stays as it is.
      other: a network of the same architecture, a tree or a Model.
      spec: which axes belong together, from :func:`permutation_spec` or written by hand:
        ``{"P0": [("dense1/kernel", 1), ("dense1/bias", 0), ("dense2/kernel", 0)]}``. Paths may be globs; those under
        ``extra/`` need Models, or trees ``{**params, "extra": extra}``.
      orders: in how many orders the groups are visited from each start: the spec's, then random ones.
      seed: of the random orders.
      iterations: at most so many passes over all groups from each start.

    Returns:
      A :class:`Rebasin`: the aligned network, the permutations, and a Report.

    Raises:
      DataError: the networks differ in paths, shapes or dtypes, or weights are not finite.
      SelectionError: the spec does not fit them, see :func:`apply_permutations`, or a group has no weights.
      TransferError: ``orders`` or ``iterations`` is below 1.

    >>> reference = {"dense1": np.array([[1.0, 2.0]]), "dense2": np.array([[3.0], [4.0]])}
    >>> other = {"dense1": np.array([[2.1, 0.9]]), "dense2": np.array([[4.0], [3.0]])}
    >>> found = rebasin(reference, other, {"P0": [("dense1", 1), ("dense2", 0)]})
    >>> found.aligned["dense1"].tolist(), found.permutations["P0"].tolist()
    ([[0.9, 2.1]], [1, 0])
    """
    if not is_whole(orders) or not is_whole(iterations):
        raise TransferError(
            f"rebasin() expects orders and iterations of at least 1, got orders={orders}, iterations={iterations}."
        )
    mine, yours = leaves_of(reference), leaves_of(other)
    check_alike({"the reference": mine, "the other network": yours})
    groups = resolve(spec, mine)
    weights = _weights(groups, mine, yours)
    unmoved = {name: np.arange(group.size) for name, group in groups.items()}
    best, start, passes = unmoved, "none", 0
    nearest = before = weights.distance(unmoved)
    random = np.random.default_rng(seed)
    sequences = [list(groups), *(list(random.permutation(list(groups))) for _ in range(orders - 1))]
    for label, first in (("sorted weights", _anchored(weights)), ("as it is", unmoved)):
        for sequence in sequences:
            if nearest == 0:
                break
            found, turns = _descend(weights, first, sequence, iterations)
            passes += turns
            distance = weights.distance(found)
            if distance < nearest:
                best, nearest, start = found, distance, label
    rows = [
        (name, group.size, len({place.path for place in group.places}), int((best[name] != unmoved[name]).sum()),
         weights.cosine(name, unmoved), weights.cosine(name, best))
        for name, group in groups.items()
    ]  # fmt: skip
    columns = ("group", "units", "leaves", "moved", "cosine before", "cosine after")
    facts = {"squared distance before": before, "squared distance after": nearest, "start": start, "passes": passes}
    return Rebasin(apply_permutations(other, spec, best), best, Report("Re-basin", columns, tuple(rows), facts))


def match_activations(reference: Mapping[str, Any], other: Mapping[str, Any]) -> Orders:
    """Match units by the correlation of what they compute on the same inputs (activation matching).

    Args:
      reference: ``{group: [..., units]}``, activations of the reference, for example from ``model.capture``; the
        leading axes (examples, positions) are one.
      other: the same of the other network, on the same inputs.

    Returns:
      ``{group: integers [units]}`` for :func:`apply_permutations`: the assignment with the largest sum of
      correlations. A unit that never changes correlates 0 with every other.

    Raises:
      DataError: the groups or shapes differ, there are fewer than two rows, or an activation is not finite.

    >>> hidden = np.array([[0.0, 1.0], [1.0, 5.0], [2.0, 2.0]])
    >>> match_activations({"P0": hidden}, {"P0": hidden[:, ::-1]})["P0"].tolist()
    [1, 0]
    """
    lone = sorted(reference.keys() ^ other.keys())
    if lone:
        raise DataError(f"activations of {listing(lone)} are of one network only. Expected the same groups of both.")
    return {name: _assign(-_correlation(name, found, other[name])) for name, found in reference.items()}


def _correlation(name: str, reference: Any, other: Any) -> np.ndarray:
    """Of each unit of the reference with each of the other, ``[units, units]`` float64."""
    if np.shape(reference) != np.shape(other) or np.ndim(reference) < 2:
        raise DataError(
            f"activations of '{name}' are {describe(reference)} and {describe(other)}. "
            "Expected equal shapes [..., units]: capture both on the same inputs."
        )
    tables = [np.asarray(one, np.float64).reshape(-1, np.shape(one)[-1]) for one in (reference, other)]
    if len(tables[0]) < 2 or not all(np.isfinite(table).all() for table in tables):
        raise DataError(
            f"activations of '{name}' have {len(tables[0])} rows, or some that are not finite. "
            "Expected at least 2 rows of finite numbers."
        )
    centred = [table - table.mean(0) for table in tables]
    norms = [np.sqrt((table**2).sum(0)) for table in centred]
    a, b = (table / np.where(norm > 0, norm, 1.0) for table, norm in zip(centred, norms, strict=True))
    return a.T @ b


def _assign(costs: np.ndarray) -> np.ndarray:
    """For each unit of the reference the other's unit, so that the sum of costs is smallest."""
    from scipy.optimize import linear_sum_assignment  # takes longer to import than to run

    return linear_sum_assignment(costs)[1]


class _View(NamedTuple):
    """A leaf of both networks in float64, reshaped so that each group permutes whole axes: ``(group, axis)``."""

    reference: np.ndarray
    other: np.ndarray
    axes: tuple[tuple[str, int], ...]

    def of(self, name: str) -> list[int]:
        """The axes that a group permutes."""
        return [axis for group, axis in self.axes if group == name]

    def but(self, axis: int) -> list[tuple[str, int]]:
        """The other axes."""
        return [one for one in self.axes if one[1] != axis]


class _Weights(NamedTuple):
    """What is compared: the groups, and every leaf that they permute."""

    groups: dict[str, Group]
    views: dict[str, _View]

    def near(self, name: str) -> _Weights:
        """The same with the leaves that a group permutes only."""
        return _Weights(self.groups, {path: view for path, view in self.views.items() if view.of(name)})

    def distance(self, orders: Orders) -> float:
        """The squared distance of all weights when the other's units are in these orders."""
        return float(sum(((view.reference - _ordered(view, orders)) ** 2).sum() for view in self.views.values()))

    def cosine(self, name: str, orders: Orders) -> float:
        """Of a group's weights in both networks."""
        pairs = [(view.reference, _ordered(view, orders)) for view in self.near(name).views.values()]
        inner, a, b = (sum(float((pair[i] * pair[j]).sum()) for pair in pairs) for i, j in ((0, 1), (0, 0), (1, 1)))
        return inner / (a * b) ** 0.5 if a * b > 0 else 0.0


def _weights(groups: dict[str, Group], mine: Mapping[str, Any], yours: Mapping[str, Any]) -> _Weights:
    places: dict[str, list[tuple[str, Any]]] = {}
    for name, group in groups.items():
        compared = [place for place in group.places if not place.path.startswith("extra/")]
        if not compared:
            raise SelectionError(
                f"group '{name}' has only statistics (extra/...), and units are compared by their weights. "
                "Add the entries of its params."
            )
        for place in compared:
            places.setdefault(place.path, []).append((name, place))
    views = {}
    for path, found in places.items():
        both = [np.asarray(side[path]).astype(np.float64) for side in (mine, yours)]
        if not all(np.isfinite(leaf).all() for leaf in both):
            raise DataError(f"'{path}' holds NaN or infinite weights: they match nothing. Expected finite weights.")
        views[path] = _view(both, found, groups)
    return _Weights(groups, views)


def _view(both: list[np.ndarray], found: list[tuple[str, Any]], groups: dict[str, Group]) -> _View:
    """Both leaves with every permuted part of an axis as an axis of its own."""
    shape: list[int] = []
    axes: list[tuple[str, int]] = []
    for axis, size in enumerate(both[0].shape):
        here = sorted((one for one in found if one[1].axis == axis), key=lambda one: -one[1].inner)
        for name, place in here:  # from the outermost
            units = groups[name].size
            shape += [size // (units * place.inner), units]
            axes.append((name, len(shape) - 1))
            size = place.inner
        shape.append(size)
    return _View(both[0].reshape(shape), both[1].reshape(shape), tuple(axes))


def _ordered(view: _View, orders: Orders, axes: Sequence[tuple[str, int]] | None = None) -> np.ndarray:
    """The other's leaf with the units along these axes (default: all) in these orders."""
    leaf = view.other
    for name, axis in view.axes if axes is None else axes:
        if name in orders:
            leaf = np.take(leaf, orders[name], axis=axis)
    return leaf


def _costs(weights: _Weights, name: str, orders: Orders) -> np.ndarray:
    """Squared distances of each unit of the reference from each of the other, ``[units, units]``.

    Along the units of groups without an order, weights are sorted: so they compare in whichever order they are.
    Inner products would give the same assignment, but not tell units apart whose weights are next to nothing.
    """
    size = weights.groups[name].size
    total = np.zeros((size, size))
    for view in weights.near(name).views.values():
        for axis in view.of(name):
            loose = [place for group, place in view.but(axis) if group not in orders]
            a, b = _rows(view.reference, axis, loose), _rows(_ordered(view, orders, view.but(axis)), axis, loose)
            total += (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return total


def _rows(leaf: np.ndarray, axis: int, loose: list[int]) -> np.ndarray:
    """``[units, weights of a unit]``, sorted along the axes that are ``loose``."""
    kept = [place for place in range(leaf.ndim) if place != axis and place not in loose]
    table = leaf.transpose(axis, *kept, *loose)
    if loose:
        split = 1 + len(kept)
        table = np.sort(table.reshape(*table.shape[:split], -1), axis=-1)
    return table.reshape(len(table), -1)


def _anchored(weights: _Weights) -> Orders:
    """A first matching: group after group, from those whose other units are known; see :func:`_costs`."""
    orders: Orders = {}
    while len(orders) < len(weights.groups):
        left = [name for name in weights.groups if name not in orders]
        name = max(left, key=lambda one: _known(weights, one, orders))
        orders[name] = _assign(_costs(weights, name, orders))
    return orders


def _known(weights: _Weights, name: str, orders: Orders) -> float:
    """The share of a group's weights that belong to no other group without an order."""
    known = total = 0
    for view in weights.near(name).views.values():
        total += view.other.size
        known += view.other.size * all(group == name or group in orders for group, _ in view.axes)
    return known / total


def _descend(weights: _Weights, orders: Orders, sequence: list[str], iterations: int) -> tuple[Orders, int]:
    """Coordinate descent: one group at a time is matched, until none gets better; and the passes that it took."""
    orders, stale = dict(orders), set(sequence)
    for turn in range(1, iterations + 1):
        for name in sequence:
            if name not in stale:
                continue
            stale.discard(name)
            tried = {**orders, name: _assign(_costs(weights, name, orders))}
            near = weights.near(name)
            if near.distance(tried) < near.distance(orders):
                orders = tried
                met = [view.but(axis) for view in near.views.values() for axis in view.of(name)]
                stale.update(group for axes in met for group, _ in axes)
        if not stale:
            return orders, turn
    return orders, iterations
