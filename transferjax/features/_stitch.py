"""Stitching: the front of one network, a map between their features, and the back of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from transferjax._errors import DataError, SelectionError, TransferError, describe
from transferjax._report import Report
from transferjax._types import Model
from transferjax.features._maps import FeatureMap
from transferjax.features._table import FeatureTable, flatten
from transferjax.numerics._cka import linear_hsic
from transferjax.numerics._tables import as_features
from transferjax.tree import Selector, as_selector, auxiliary

STITCH = "stitch"


def match_layers(front: FeatureTable, back: FeatureTable) -> tuple[dict[str, str], Report]:
    """For each layer of one network the layer of another that is most alike, by linear CKA.

    Args:
      front: features of some examples from one network.
      back: features from the other; the examples that both tables hold are compared.

    Returns:
      ``({layer of front: layer of back}, report)``; the report has a row per pair of layers: their CKA.

    Raises:
      DataError: fewer than two examples are in both tables, or features cannot be used.
      SelectionError: a table holds no layer.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, 2019, arXiv:1905.00414.

    >>> x = np.random.default_rng(0).normal(size=(20, 6))
    >>> table = FeatureTable({"a": x[:, :3], "b": x[:, 3:]}, np.arange(20))
    >>> match_layers(table, FeatureTable({"c": x[:, 5:], "d": x[:, :2]}, np.arange(20)))[0]
    {'a': 'd', 'b': 'c'}
    """
    if not front.arrays or not back.arrays:
        raise SelectionError("match_layers() got a table without layers. Expected at least one in each.")
    one, other = front.beside(back)
    ours, theirs = (
        {name: as_features(flatten(np.asarray(array)), f"'{name}'", least=2) for name, array in table.arrays.items()}
        for table in (one, other)
    )
    rows, best = [], {}
    for name, x in ours.items():
        found = {partner: _cka(x, y) for partner, y in theirs.items()}
        rows += [(name, partner, value) for partner, value in found.items()]
        best[name] = max(found, key=lambda partner: found[partner])
    return best, Report("Layers alike", ("front", "back", "linear CKA"), tuple(rows), {"examples": len(one)})


def receive(aux: Mapping[str, Any], output: Any) -> Any:
    """What a stitched network inserts where the back begins: the mapped features in place of the module's output.

    Raises:
      DataError: they have another shape.

    >>> float(receive({"stitch": np.ones(())}, np.zeros(())))
    1.0
    """
    value = aux[STITCH]
    if np.shape(value) != np.shape(output):
        raise DataError(
            f"the map between the networks gives {describe(value)}, and the module makes {describe(output)}. Expected "
            "equal shapes: fit the map on the features of these two modules, positions and all."
        )
    return value


def stitch(front: Model, back: Model, found: FeatureMap, at: Selector | str) -> Model:
    """One network out of two: the front of one up to a module, a map, the back of another from a module on.

    The back is told where it begins with the surgery of ``tj.interop``::

        back = tj.extend(other, "stitch", jnp.zeros(()))
        back = tj.interop.insert(back, "blocks/3", tj.features.receive)
        stitched = tj.features.stitch(model, back, found, at="blocks/2")

    Both networks get the same inputs; what lies behind the front and before the back is never computed in a compiled
    program in inference mode.

    Args:
      front: any Model that can capture.
      back: a Model extended by ``stitch`` whose beginning receives it.
      found: a map from the front's features to the back's, of the last axis: ``ridge_map(x, y)``.
      at: the module of the front whose output is mapped.

    Returns:
      A Model with params ``{"front": ..., "back": ..., "map": ...}`` and extra ``{"front": ..., "back": ...}``;
      modules are those of the back.

    Raises:
      TransferError: the front cannot capture.
      SelectionError: the back was not extended; (when called) ``at`` is not one array.
      DataError: (when called) the mapped features do not fit the back.

    Source: Lenc & Vedaldi, Understanding image representations by measuring their equivariance and equivalence, 2015,
      arXiv:1411.5908; Bansal et al., Revisiting Model Stitching, 2021, arXiv:2106.07682.

    >>> import jax.numpy as jnp, transferjax as tj
    >>> from transferjax.features._maps import procrustes
    >>> model = tj.interop.pure(lambda params, x: tj.interop.mark("body", x @ params) + 1.0, jnp.eye(2))
    >>> back = tj.interop.insert(tj.extend(model, "stitch", jnp.zeros(())), "body", receive)
    >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    >>> stitched = stitch(model, back, procrustes(x, x), at="body")
    >>> np.round(stitched.apply(stitched.params, stitched.extra, np.ones((1, 2)))[0], 3).tolist()
    [[2.0, 2.0]]
    """
    if front.capture is None:
        raise TransferError("stitch() expects a front that can say what its modules make; capture is None.")
    auxiliary(back.params, STITCH)
    params = {"front": front.params, "back": _without(back.params), "map": found.params}
    joined = _Joined(front.capture, back.apply, back.capture, found.apply, as_selector(at))
    return Model(joined.run, joined.capture, params, {"front": front.extra, "back": back.extra}, back.preprocess)


@dataclasses.dataclass(frozen=True)
class _Joined:
    """Both networks; hashable, so that one program serves all calls."""

    front: Any
    back: Any
    back_capture: Any
    mapped: Any
    at: Selector

    def run(self, params, extra, inputs, *, key=None, train=False):
        filled, ahead = self._filled(params, extra, inputs, key, train)
        outputs, behind = self.back(filled, extra["back"], inputs, key=key, train=train)
        return outputs, {"front": ahead, "back": behind}

    def capture(self, params, extra, inputs, at, *, key=None, train=False):
        filled, ahead = self._filled(params, extra, inputs, key, train)
        outputs, behind, caught = self.back_capture(filled, extra["back"], inputs, at, key=key, train=train)
        return outputs, {"front": ahead, "back": behind}, caught

    def _filled(self, params, extra, inputs, key, train):
        """The back's params with the mapped features among them, and the front's new extra."""
        _, ahead, caught = self.front(params["front"], extra["front"], inputs, self.at, key=key, train=train)
        if len(caught) != 1:
            raise SelectionError(f"stitch(): at selects {len(caught)} arrays. Expected one module with one output.")
        (value,) = caught.values()
        back = params["back"]
        return {**back, "aux": {**back["aux"], STITCH: self.mapped(params["map"], value)}}, ahead


def _without(params: Any) -> Any:
    """The params of the back without the place of the mapped features."""
    return {**params, "aux": {name: tree for name, tree in params["aux"].items() if name != STITCH}}


def _cka(x: np.ndarray, y: np.ndarray) -> float:
    across, own, other = linear_hsic(x, y)
    return float(across / np.sqrt(own * other)) if own * other > 0 else 0.0
