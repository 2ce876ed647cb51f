"""Modules as paths: which of them train, and the weights beside a model's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from transferjax._errors import SelectionError, listing
from transferjax.tree._paths import SEPARATOR
from transferjax.tree._select import Selector

MODEL, AUX = "model", "aux"
"""The two parts of the params of an extended model."""


def training_selector(param_paths: Iterable[str], trained_paths: Iterable[str]) -> Selector:
    """Selects the modules that are in training mode when only some parameters learn.

    A module that owns parameters is selected when at least one of its own learns. One that owns none directly
    (dropout, a BatchNorm without scale and bias, a block of modules) follows its surroundings: it is selected when
    something learns beneath the nearest module, itself included, that contains any parameter. Weights added by
    ``extend`` belong to no module, and the ``model/`` in front of the others is no part of a module path.

    Args:
      param_paths: the paths of all parameters of the model.
      trained_paths: those that learn themselves; not the ones that merely carry an adapter.

    Returns:
      A :class:`Selector` over module paths; the root is ``""``. It may select nothing.

    Raises:
      SelectionError: a trained path is no path of the model.

    >>> on = training_selector(["stem/kernel", "stem/bn/scale", "head/kernel"], ["head/kernel"])
    >>> [path for path in ("", "stem", "stem/bn", "stem/dropout", "head", "head/dropout") if on(path)]
    ['', 'head', 'head/dropout']
    """
    known, learns = tuple(dict.fromkeys(param_paths)), frozenset(trained_paths)
    strange = sorted(learns - set(known))
    if strange:
        raise SelectionError(
            f"{len(strange)} trained paths are no parameters of the model: {listing(strange)}. "
            "Pass paths of the model without a group's name in front and without an adapter's behind."
        )
    trained = tuple(path for path in known if path in learns)
    return Selector(f"modules of {len(trained)} trained leaves", TrainedModules(_bare(known), _bare(trained, known)))


class TrainedModules:
    """The predicate of :func:`training_selector`; compares by its paths and hashes in constant time."""

    __slots__ = ("_containers", "_containers_on", "_hash", "_owners", "_owners_on", "params", "trained")

    def __init__(self, params: tuple[str, ...], trained: tuple[str, ...]):
        self.params, self.trained = params, trained
        self._owners, self._containers = _owners(params), _containers(params)
        self._owners_on, self._containers_on = _owners(trained), _containers(trained)
        self._hash = hash((params, trained))

    def __call__(self, path: str, leaf: Any = None) -> bool:
        if path in self._owners:
            return path in self._owners_on
        while path and path not in self._containers:
            path = path.rpartition(SEPARATOR)[0]
        return path in self._containers_on

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainedModules) and (self.params, self.trained) == (other.params, other.trained)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"TrainedModules({listing(self.trained)})"


def auxiliary(params: Any, name: str) -> Any:
    """The weights that ``extend(model, name, init)`` put beside a model's own.

    Args:
      params: the params of an extended model.
      name: which of them.

    Returns:
      The tree ``params["aux"][name]``.

    Raises:
      SelectionError: the model was not extended by this name; the line to write is named.

    >>> auxiliary({"model": {"head": 1.0}, "aux": {"projector": 2.0}}, "projector")
    2.0
    """
    return Auxiliary(params[AUX] if is_extended(params) else {})[name]


def is_extended(params: Any) -> bool:
    """Whether params have the two parts ``model`` and ``aux``.

    >>> is_extended({"model": {"head": 1.0}, "aux": {}})
    True
    """
    return isinstance(params, Mapping) and set(params) == {MODEL, AUX}


@jax.tree_util.register_pytree_with_keys_class
class Auxiliary(dict):
    """``{name: tree}`` whose missing names raise with the line that adds them."""

    def __missing__(self, name: str) -> Any:
        found = f"It has {listing(sorted(self))}." if self else "It has none."
        raise SelectionError(
            f"the model has no auxiliary weights '{name}'. {found} "
            f"Add them first: model = tj.extend(model, {name!r}, init)."
        )

    def tree_flatten_with_keys(self):
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], names

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(zip(names, children, strict=True))


def _bare(paths: tuple[str, ...], known: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Paths of the model's own leaves, without the parts of an extended model's params."""
    parts = {path.partition(SEPARATOR)[0] for path in (paths if known is None else known)}
    if parts != {MODEL, AUX}:
        return paths
    return tuple(path.partition(SEPARATOR)[2] for path in paths if path.startswith(MODEL + SEPARATOR))


def _owners(paths: tuple[str, ...]) -> frozenset[str]:
    return frozenset(path.rpartition(SEPARATOR)[0] for path in paths)


def _containers(paths: tuple[str, ...]) -> frozenset[str]:
    found = {""} if paths else set()
    for path in paths:
        while SEPARATOR in path:
            path = path.rpartition(SEPARATOR)[0]
            found.add(path)
    return frozenset(found)
