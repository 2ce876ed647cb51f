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


@jax.tree_util.register_dataclass  # flattened without a call of Python, unlike register_static
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

    def __repr__(self) -> str:
        parts = [counted(self.params), f"extra {counted(self.extra, sizes=False)}"]
        if self.preprocess is not None:
            parts.append(f"size {tuple(self.preprocess.size)}")
        return f"Model({', '.join(parts)})"


def counted(tree: PyTree, *, sizes: bool = True) -> str:
    """How many leaves and parameters a tree has, in words; arrays, shapes and anything else will do.

    >>> import numpy as np
    >>> counted({"kernel": np.ones((20, 100)), "bias": np.ones(5)})
    '2 leaves, 2.0 K parameters'
    """
    leaves = jax.tree.leaves(tree)
    text = f"{len(leaves)} {'leaf' if len(leaves) == 1 else 'leaves'}"
    if not sizes:
        return text
    size = sum(int(getattr(leaf, "size", 1)) for leaf in leaves)
    for unit, name in ((10**9, " G"), (10**6, " M"), (10**3, " K")):
        if size >= unit:
            return f"{text}, {size / unit:.1f}{name} parameters"
    return f"{text}, {size} {'parameter' if size == 1 else 'parameters'}"


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
    """A callable pytree (``jax.tree_util.Partial``): its arrays are leaves and enter jit as arguments.

    It is called as ``objective(params, extra, batch, key, train)``, all five by position:

    Args:
      params: the merged parameters, nested dicts as in ``Model.params``; trainable leaves carry gradients.
      extra: as in ``Model.extra`` (BatchNorm statistics); its new value goes into the ``Loss``.
      batch: a dict with ``inputs`` (``[B, H, W, C]`` for images, or a dict of arrays), mostly ``labels`` (``[B]``
        integers, or ``[B, ...]``), ``id`` (``[B]``) and optionally ``weight`` (``[B]``): means are weighted by it.
      key: typed PRNG key of this step, or ``None``.
      train: ``False``, ``True``, or a ``Selector`` over module paths; pass it on to ``apply``.

    Returns:
      ``Loss(value, metrics, extra)``: a scalar mean over the batch, a dict of scalars, and the new ``extra``.

    >>> import jax, jax.numpy as jnp, transferjax as tj
    >>> def absolute_error(apply, params, extra, batch, key, train):
    ...     outputs, extra = apply(params, extra, batch["inputs"], key=key, train=train)
    ...     errors = jnp.abs(outputs - batch["labels"])  # [B]
    ...     weight = batch.get("weight", jnp.ones(errors.shape))
    ...     value = jnp.sum(weight * errors) / jnp.sum(weight)
    ...     return tj.Loss(value, {"largest_error": jnp.max(errors)}, extra)
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params["head"], extra)
    >>> objective = jax.tree_util.Partial(absolute_error, jax.tree_util.Partial(apply))
    >>> batch = {"inputs": jnp.ones(2), "labels": jnp.array([1.0, 3.0])}
    >>> float(objective({"head": jnp.ones(())}, {}, batch, None, True).value)
    1.0
    """

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

    def check(self, frozen: Any, program: str) -> None: ...

    def holds(self, ids: Any) -> bool: ...

    def cached(self, batches: Any, compute: Any) -> Any: ...
