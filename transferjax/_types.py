"""The nouns that every floor shares: Hole, Tuning, Model, Loss, and the protocols."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

Array = jax.Array
PyTree = Any
Params = PyTree
Extra = PyTree
Batch = Mapping[str, Any]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Hole:
    """The place of a leaf that lives in another tree: a pytree node without leaves.

    A ``Hole`` is seen by no gradient, optimizer or checkpoint; ``transferjax.fill`` puts the leaf back.

    >>> import jax
    >>> jax.tree.leaves({"kernel": Hole(), "bias": 1.0})
    [1.0]
    """

    def __repr__(self) -> str:
        return "Hole"


def is_hole(value: Any) -> bool:
    """Whether ``value`` is a :class:`Hole`; use it as ``is_leaf``."""
    return isinstance(value, Hole)


class Tuning(NamedTuple):
    """What learns, and how the learnt part becomes parameters again.

    Attributes:
      init: ``(key, params) -> (trainable, frozen)``; traces under ``jax.eval_shape``.
      merge: ``(trainable, frozen) -> params``; ``merge(*init(key, params)) == params``. A ``Hole`` of
        ``frozen`` for which ``trainable`` has no leaf stays a ``Hole``, so that tunings chain.
      lifted: ``(trainable, frozen) -> params`` whose adapted leaves are objects with ``.dense()``, or ``None``.
    """

    init: Any
    merge: Any
    lifted: Any = None


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How raw inputs become what the network was trained on, and what its outputs are called.

    Attributes:
      size: ``(height, width)`` in pixels at which the weights were trained.
      mean: per-channel mean, subtracted after scaling pixels to [0, 1].
      std: per-channel standard deviation, divided by after the mean is subtracted.
      interpolation: ``"bilinear"``, ``"bicubic"`` or ``"nearest"``.
      class_names: the name of each output, in order; empty when unknown.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    interpolation: str = "bicubic"
    class_names: tuple[str, ...] = ()


class Model(NamedTuple):
    """A network as pure functions and two trees; never an argument of ``jax.jit`` (its parts are).

    Attributes:
      apply: ``(params, extra, inputs, *, key=None, train=False) -> (outputs, extra)``.
      capture: ``(params, extra, inputs, at, *, key=None, train=False) -> (outputs, extra, {path: array})``,
        in one forward pass; ``at`` selects module paths.
      params: nested dicts with string keys: what gradients may learn.
      extra: nested dicts with string keys: what gradients do not learn (BatchNorm statistics).
      preprocess: a :class:`Preprocess`, or ``None``.
    """

    apply: Any
    capture: Any
    params: Params
    extra: Extra
    preprocess: Preprocess | None = None


class Loss(NamedTuple):
    """What an :class:`Objective` returns.

    Attributes:
      value: scalar, differentiated with respect to the trainable leaves.
      metrics: dict of scalars, each a mean over the batch.
      extra: the model's new ``extra``.
      weight: how much this batch counts in a mean over several, which accumulation needs to be exact: the denominator
        of the means, or ``{"loss" or a metric's name: denominator}`` where they differ. ``None``, and names left out:
        the sum of ``batch["weight"]``, or the number of examples.
    """

    value: Array
    metrics: dict[str, Array]
    extra: Extra
    weight: Any = None


@runtime_checkable
class Objective(Protocol):
    """A callable pytree (``jax.tree_util.Partial``): its arrays are leaves and enter jit as arguments."""

    def __call__(self, params: Params, extra: Extra, batch: Batch, key: Array | None, train: Any) -> Loss: ...


@runtime_checkable
class Apply(Protocol):
    """The form of ``Model.apply``."""

    def __call__(
        self, params: Params, extra: Extra, inputs: Any, *, key: Array | None = None, train: Any = False
    ) -> tuple[Any, Extra]: ...


@runtime_checkable
class Checkpoint(Protocol):
    """A file or directory of named arrays, opened lazily."""

    format: str
    metadata: Mapping[str, Any]

    @property
    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]: ...

    def __getitem__(self, path: str) -> Any: ...

    def read(self, path: str, index: Any = None) -> Any: ...

    def fingerprint(self) -> str: ...


@runtime_checkable
class Cache(Protocol):
    """Arrays computed once per example, kept by example id."""

    def get(self, ids: Any) -> Any: ...

    def put(self, ids: Any, values: Any) -> None: ...
