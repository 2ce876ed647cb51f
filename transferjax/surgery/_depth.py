"""Depth: parameters of a deeper or shallower network from the layers of another."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from transferjax._errors import PlanError, listing
from transferjax._types import Model
from transferjax.surgery._checks import check_layers
from transferjax.surgery._interpolation import module_of
from transferjax.surgery._patterns import compiled, raw
from transferjax.surgery._resize import whole
from transferjax.tree import Selector, as_selector, nest, paths


def map_layers(tree: Any, pattern: str, layers: Sequence[int], *, zero: Selector | str | None = None) -> Any:
    r"""The tree of a network whose layer ``k`` is a copy of layer ``layers[k]``; deepens and shortens alike.

    Args:
      tree: nested dicts with string keys, or ``{path: array}``; ``{"params": ..., "extra": ...}`` holds both.
      pattern: a regular expression over full paths with the group ``(?P<i>\d+)`` for the number of the layer.
      layers: for each new layer the old one.
      zero: leaves to set to zero in layers that come for a second time and later, by their new paths.

    Returns:
      A tree of the same kind; leaves that the pattern does not match are as they were. Copies are arrays of
      their own.

    Raises:
      PlanError: the tree holds other containers, the pattern matches nothing or lacks its group, a layer does not
        exist, or ``zero`` selects nothing.

    >>> map_layers({"blocks": {"0": {"w": 1.0}, "1": {"w": 2.0}}}, r"blocks/(?P<i>\d+)/.*", [1, 1, 0])
    {'blocks': {'0': {'w': 2.0}, '1': {'w': 2.0}, '2': {'w': 1.0}}}
    """
    flat, numbered = _layered(tree, pattern)
    known = {old for old, _ in numbered.values()}
    table = check_layers(layers, "layers")
    strange = [layer for layer in table if not whole(layer) or layer not in known]
    if strange or not table:
        told = repr(strange[0]) if strange else "none"
        raise PlanError(f"layers name {told}; expected at least one of the layers {_told(known)}.")
    copies = {new for new, old in enumerate(table) if old in table[:new]}
    chosen, zeroed, out = None if zero is None else as_selector(zero), 0, {}
    for path, leaf in flat.items():
        if path not in numbered:
            out[path] = leaf
            continue
        old, (start, stop) = numbered[path]
        for new in (new for new, layer in enumerate(table) if layer == old):
            name = f"{path[:start]}{new}{path[stop:]}"
            to_zero = new in copies and chosen is not None and chosen(name, leaf)
            zeroed += to_zero
            # Copies are arrays of their own: two leaves that are one array would be taken for a tie.
            out[name] = module_of(leaf).zeros_like(leaf) if to_zero else copy.copy(leaf) if new in copies else leaf
    if chosen is not None and not zeroed:
        raise PlanError(f"zero={chosen!r} selects no leaf of a copied layer. Write the paths of the last projections.")
    return nest(paths(out)) if _nested(tree) else paths(out)


def insert_identity(tree: Any, pattern: str, after: Sequence[int], zero: Selector | str) -> Any:
    r"""A deeper residual network that computes the same: copies of layers that add nothing yet.

    A copy of layer ``k`` follows it, with the last projection of each residual branch at zero. Exact for
    ``x + f(x)`` (ResNet without an activation after the sum, or with ReLU after non-negative sums; pre-LayerNorm
    transformers, both branches). Where a BatchNorm ends the branch, its scale and bias are to be zero, as the kernel
    before it is not enough. Not exact for post-LayerNorm transformers, whose blocks normalise once more. Parameters
    at zero get gradients, and those before them once these have moved.

    Args:
      tree: as for :func:`map_layers`.
      pattern: as for :func:`map_layers`.
      after: the layers to follow with a copy.
      zero: the leaves that end the residual branches: kernel and bias, or scale and bias of a last BatchNorm.

    Returns:
      A tree of the same kind.

    Raises:
      PlanError: as :func:`map_layers`.

    >>> import numpy as np
    >>> tree = {"0": {"out": np.ones(2)}, "1": {"out": np.full(2, 5.0)}}
    >>> insert_identity(tree, r"(?P<i>\d+)/.*", after=[0], zero="*/out")
    {'0': {'out': array([1., 1.])}, '1': {'out': array([0., 0.])}, '2': {'out': array([5., 5.])}}

    Source: T. Chen et al., "Net2Net", 2016 (Net2DeeperNet); P. Goyal et al., 2017, for zero at the end of a branch.
    """
    _, numbered = _layered(tree, pattern)
    known = sorted({old for old, _ in numbered.values()})
    after = check_layers(after, "after")
    strange = [layer for layer in after if layer not in known]
    if strange:
        raise PlanError(f"after names layer {strange[0]!r}; expected some of the layers {_told(known)}.")
    return map_layers(tree, pattern, [n for old in known for n in [old] * (1 + (old in after))], zero=zero)


def stack_layers(tree: Any, pattern: str, times: int = 2) -> Any:
    r"""A network on top of its copy: layers 0 .. n-1, then 0 .. n-1 again. The function is not preserved.

    Args:
      tree: as for :func:`map_layers`.
      pattern: as for :func:`map_layers`.
      times: how often all layers come.

    Returns:
      A tree of the same kind.

    Raises:
      PlanError: as :func:`map_layers`; ``times`` is below 2.

    >>> stack_layers({"0": {"w": 1.0}, "1": {"w": 2.0}}, r"(?P<i>\d+)/.*")
    {'0': {'w': 1.0}, '1': {'w': 2.0}, '2': {'w': 1.0}, '3': {'w': 2.0}}

    Source: L. Gong et al., "Efficient Training of BERT by Progressively Stacking", 2019 (StackBERT).
    """
    return map_layers(tree, pattern, _all(tree, pattern) * _times(times))


def interleave_layers(tree: Any, pattern: str, times: int = 2) -> Any:
    r"""Each layer several times in a row: 0, 0, 1, 1, .... The function is not preserved.

    Args:
      tree: as for :func:`map_layers`.
      pattern: as for :func:`map_layers`.
      times: how often each layer comes.

    Returns:
      A tree of the same kind.

    Raises:
      PlanError: as :func:`map_layers`; ``times`` is below 2.

    >>> interleave_layers({"0": {"w": 1.0}, "1": {"w": 2.0}}, r"(?P<i>\d+)/.*")
    {'0': {'w': 1.0}, '1': {'w': 1.0}, '2': {'w': 2.0}, '3': {'w': 2.0}}

    Source: B. Chang et al., "Multi-level Residual Networks from Dynamical Systems View", 2018.
    """
    return map_layers(tree, pattern, [old for old in _all(tree, pattern) for _ in range(_times(times))])


def drop_layers(tree: Any, pattern: str, layers: Sequence[int]) -> Any:
    r"""A network without some of its layers, the others numbered anew; a start for a student.

    Args:
      tree: as for :func:`map_layers`.
      pattern: as for :func:`map_layers`.
      layers: the layers to leave out.

    Returns:
      A tree of the same kind.

    Raises:
      PlanError: as :func:`map_layers`; a layer does not exist.

    >>> drop_layers({"0": {"w": 1.0}, "1": {"w": 2.0}, "2": {"w": 3.0}}, r"(?P<i>\d+)/.*", [1])
    {'0': {'w': 1.0}, '1': {'w': 3.0}}

    Source: H. Sajjad et al., "On the Effect of Dropping Layers of Pre-trained Transformer Models", 2023.
    """
    known = _all(tree, pattern)
    layers = check_layers(layers, "layers")
    strange = [layer for layer in layers if layer not in known]
    if strange:
        raise PlanError(f"layers to drop name {strange[0]!r}; expected some of the layers {_told(known)}.")
    return map_layers(tree, pattern, [old for old in known if old not in layers])


def _layered(tree: Any, pattern: str) -> tuple[dict[str, Any], dict[str, tuple[int, tuple[int, int]]]]:
    """Leaves by path, and of those that the pattern matches the layer and where its number stands."""
    made = compiled(f"the pattern {raw(pattern)}", pattern, "")
    if "i" not in made.groupindex:
        raise PlanError(f"{raw(pattern)} has no group i. Write (?P<i>\\d+) where the layer's number stands.")
    if isinstance(tree, Model):
        raise PlanError(
            "a Model came; expected its arrays. Write the layers of {'params': model.params, 'extra': model.extra} "
            r"anew, with r'(params|extra)/...' in the pattern."
        )
    flat = paths(tree)
    rebuilt = nest(flat) if _nested(tree) else flat
    if not isinstance(tree, Mapping) or jax.tree.structure(rebuilt) != jax.tree.structure(tree):
        raise PlanError(
            f"layers of a {type(tree).__name__} of such containers cannot be numbered anew: expected nested dicts "
            "with string keys, or {path: array}. Write tree.nest(tree.paths(params))."
        )
    found = {path: match for path in flat if (match := made.fullmatch(path))}
    if not found:
        raise PlanError(f"{raw(pattern)} matches none of {len(flat):,} paths ({listing(list(flat), 3)}).")
    return flat, {path: (_number(match), match.span("i")) for path, match in found.items()}


def _number(match: re.Match[str]) -> int:
    if not (match["i"] or "").isdecimal():
        raise PlanError(f"group i of the pattern matches {match['i']!r} in '{match[0]}'; expected digits: (?P<i>\\d+).")
    return int(match["i"])


def _all(tree: Any, pattern: str) -> list[int]:
    return sorted({old for old, _ in _layered(tree, pattern)[1].values()})


def _times(times: Any) -> int:
    if not whole(times) or times < 2:
        raise PlanError(f"times is {times!r}; expected a whole number of at least 2.")
    return times


def _nested(tree: Any) -> bool:
    return isinstance(tree, Mapping) and any(isinstance(value, Mapping) for value in tree.values())


def _told(layers: Any) -> str:
    return listing([str(layer) for layer in sorted(layers)], 8)
