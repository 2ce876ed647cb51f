"""The one form of a forward pass below every Model: hooks in, outputs and what was captured out."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._context import current_step
from transferjax._errors import SelectionError, TransferError, listing, nearest_hint
from transferjax._types import Array, Extra, Model, Params, Preprocess, PyTree, is_hole
from transferjax.tree import Selector, as_selector, path_string
from transferjax.tree._modules import Auxiliary, TrainedModules

Train = bool | Selector | str

INVERSE_FLAGS = ("deterministic", "use_running_average", "inference")
"""Flags that are true in inference mode; every other flag is true in training mode."""

FLAGS = (*INVERSE_FLAGS, "update_stats")
"""The names under which modules of Flax know their mode."""


@dataclasses.dataclass(frozen=True)
class Insert:
    """A function on the output of the modules that ``at`` selects: ``function(aux, output) -> output``."""

    at: tuple[Selector, ...]
    function: Callable[[Mapping[str, PyTree], Any], Any]

    def __call__(self, path: str) -> bool:
        return chosen(self.at, path)


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What one forward pass is asked for; lives while it is traced, never longer.

    Attributes:
      key: randomness of this pass, or ``None``.
      train: ``False``, ``True`` or a selector over module paths.
      momentum: of every BatchNorm that moves its statistics, or ``None`` for the module's own.
      running: the probability with which a channel of a BatchNorm in training mode is normalised by its running
        statistics; 0 and ``None``: never.
      step: the number of training steps taken, which a BatchNorm's own momentum follows; ``None``: unknown.
      at: selectors of the module paths whose outputs are returned.
      inserts: functions on module outputs, applied in this order.
      aux: the weights that the model does not have, by name.
    """

    key: Array | None = None
    train: bool | Selector = False
    momentum: float | None = None
    running: float | None = None
    step: Any = None
    at: tuple[Selector, ...] = ()
    inserts: tuple[Insert, ...] = ()
    aux: Mapping[str, PyTree] = dataclasses.field(default_factory=Auxiliary)

    def on(self, path: str) -> bool:
        """Whether the module at ``path`` is in training mode."""
        return self.train if isinstance(self.train, bool) else self.train(path)

    @property
    def forced_momentum(self) -> float | None:
        """What the modules are told: 0, to hand out the batch's statistics, when :meth:`averaged` follows the step."""
        return 0.0 if self.momentum is None and self.step is not None else self.momentum

    def followed(self, momentum: Any) -> Any:
        """A BatchNorm's own momentum m in this pass: ``min(m, (1 + step) / (10 + step))``, the module's when the step
        is unknown. The source's statistics are forgotten within tens of steps, and long runs average as before."""
        if self.momentum is not None or self.step is None:
            return momentum if self.momentum is None else self.momentum
        return jnp.minimum(momentum, (1 + self.step) / (10 + self.step))

    def averaged(self, momentum: Any, old: Any, new: Any) -> Any:
        """A statistic after this pass from the one before and what a module with ``forced_momentum`` left."""
        if self.momentum is not None or self.step is None or not jnp.issubdtype(new.dtype, jnp.inexact):
            return new
        kept = self.followed(momentum)
        return (kept * old + (1 - kept) * new).astype(new.dtype)

    def mixes(self, path: str) -> bool:
        """Whether the BatchNorm at ``path`` normalises some channels by its running statistics, though it trains."""
        return bool(self.running) and self.on(path)

    def mixed(self, path: str, axis: Any, by_running: Any, by_batch: Any) -> Any:
        """The outputs of that BatchNorm: of each channel by the one or the other statistics."""
        if self.key is None:
            raise missing_key("stochastic_norm")
        axes = {one % by_batch.ndim for one in ((axis,) if isinstance(axis, int) else axis)}
        shape = [size if number in axes else 1 for number, size in enumerate(by_batch.shape)]
        own = jax.random.fold_in(self.key, zlib.crc32(f"stochastic_norm/{path}".encode()))
        return jnp.where(jax.random.bernoulli(own, self.running or 0.0, shape), by_running, by_batch)

    @property
    def only_infer(self) -> bool:
        """Whether nothing is in training mode, captured or changed, so that only the outputs matter."""
        return self.train is False and not self.at and not self.inserts

    def capturing(self, path: str) -> bool:
        """Whether the outputs of the module at ``path`` are asked for; the root never is: it is the output."""
        return path != "" and chosen(self.at, path)

    def inserted(self, path: str) -> tuple[Insert, ...]:
        """The functions to apply to the outputs of the module at ``path``."""
        return tuple(insert for insert in self.inserts if path != "" and insert(path))


class Pass(NamedTuple):
    """What one forward pass gives back.

    Attributes:
      outputs: of the model.
      extra: in the structure that came in.
      captured: module path to its outputs, one entry per call.
      modules: the path of every module there is.
      called: the paths of those whose outputs were captured or changed.
      batch_norms: those whose momentum can be set; ``None``: not known.
    """

    outputs: Any
    extra: Extra
    captured: dict[str, list[Any]]
    modules: tuple[str, ...]
    called: frozenset[str] = frozenset()
    batch_norms: frozenset[str] | None = None


class Forward(Protocol):
    """A network of any framework, or a layer around one; hashable, equal to itself only or by its fields."""

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass: ...

    def modules(self) -> tuple[str, ...] | None:
        """Module paths that are known without a forward pass; ``None``: unknown."""
        ...


@dataclasses.dataclass(frozen=True)
class Apply:
    """``Model.apply``: ``(params, extra, inputs, *, key=None, train=False) -> (outputs, extra)``."""

    forward: Forward

    def __call__(
        self, params: Params, extra: Extra, inputs: Any, *, key: Array | None = None, train: Train = False
    ) -> tuple[Any, Extra]:
        passed = run(self.forward, params, extra, inputs, Hooks(key=key, train=_train(train)))
        return passed.outputs, passed.extra


@dataclasses.dataclass(frozen=True)
class Capture:
    """``Model.capture``: as ``apply`` with ``at``, and returns ``(outputs, extra, {path: array})``."""

    forward: Forward

    def __call__(
        self,
        params: Params,
        extra: Extra,
        inputs: Any,
        at: Selector | str | Iterable[Selector | str],
        *,
        key: Array | None = None,
        train: Train = False,
    ) -> tuple[Any, Extra, dict[str, Array]]:
        selectors = as_selectors(at)
        if not selectors:
            raise SelectionError("capture() expects at least one module: a selector, a glob, or a list of them.")
        passed = run(self.forward, params, extra, inputs, Hooks(key=key, train=_train(train), at=selectors))
        return passed.outputs, passed.extra, _named(passed)


def build(forward: Forward, params: Params, extra: Extra, preprocess: Preprocess | None = None) -> Model:
    """A Model over one forward pass."""
    return Model(Apply(forward), Capture(forward), params, extra, preprocess)


def rebuild(model: Model, forward: Forward, **changed: Any) -> Model:
    """The same Model over another forward pass."""
    return model._replace(apply=Apply(forward), capture=Capture(forward), **changed)


def forward_of(model: Model, verb: str) -> Forward:
    """What a Model runs.

    Raises:
      TransferError: its ``apply`` was not made by ``transferjax.interop``.
    """
    if not isinstance(model, Model) or not isinstance(model.apply, Apply):
        got = type(model.apply).__name__ if isinstance(model, Model) else type(model).__name__
        raise TransferError(
            f"{verb}() expects a Model made by transferjax.interop.nnx, linen or pure, got {got}. "
            "Wrap a function of your own first: tj.interop.pure(apply, params, extra)."
        )
    return model.apply.forward


def run(forward: Forward, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
    """One forward pass, and the law that no selector is idle.

    Raises:
      SelectionError: ``train``, ``at`` or an inserted function selects no module.
    """
    passed = forward(params, extra, inputs, dataclasses.replace(hooks, step=current_step()))
    if not isinstance(hooks.train, bool) and not isinstance(hooks.train.function, TrainedModules):
        check_used((hooks.train,), passed.modules, "train=")
    check_called(hooks.at, passed, "capture()")
    return passed


def check_called(selectors: Iterable[Selector], passed: Pass, where: str) -> None:
    """Raises when one of the selectors matches no module that was called in a pass."""
    check_used(selectors, tuple(path for path in passed.modules if path), where)
    for selector in selectors:
        if not any(selector(path) for path in passed.called):
            found = listing([path for path in passed.modules if path and selector(path)])
            raise SelectionError(
                f"{where}: selector {selector!r} matched {found}, which the forward pass does not call. "
                "Select a module that is called; in a plain function, one that marks its value with "
                "transferjax.interop.mark(path, value)."
            )


def check_used(selectors: Iterable[Selector], modules: tuple[str, ...], where: str) -> None:
    """Raises when one of the selectors matches none of the modules."""
    for selector in selectors:
        if any(selector(path) for path in modules):
            continue
        if not any(modules):
            raise SelectionError(
                f"{where}: selector {selector!r} matched nothing, as the model names no modules. "
                "In a plain function name a value with transferjax.interop.mark(path, value)."
            )
        hint = nearest_hint(selector.name.strip("'"), [m for m in modules if m])
        noun = "module" if len(modules) == 1 else "modules"
        raise SelectionError(
            f"{where}: selector {selector!r} matched none of {len(modules)} {noun}.{hint} "
            "Module paths are meant ('blocks/3/bn'), not those of parameters."
        )


def chosen(selectors: tuple[Selector, ...], path: str) -> bool:
    """Whether any of the selectors selects the path."""
    return any(selector(path) for selector in selectors)


def as_selectors(value: Selector | str | Iterable[Selector | str]) -> tuple[Selector, ...]:
    """One selector, glob, or an iterable of them, as a tuple."""
    if isinstance(value, Selector | str):
        return (as_selector(value),)
    if not isinstance(value, Iterable):
        return (as_selector(value),)  # raises
    return tuple(as_selector(one) for one in value)


def flag_value(name: str, on: bool) -> bool:
    """What a mode flag is set to in a module that is (not) in training mode."""
    return not on if name in INVERSE_FLAGS else on


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as call arguments: a mapping becomes keywords."""
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def frozen_array(leaf: Any) -> Any:
    """A leaf that later writes cannot reach: JAX arrays are immutable, NumPy's and numbers are copied."""
    return leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else jnp.array(np.array(leaf))


def owner(path: str, modules: Iterable[str]) -> str:
    """The innermost module that a leaf path lies in; the root when there is none."""
    known = set(modules)
    while "/" in path:
        path = path.rpartition("/")[0]
        if path in known:
            return path
    return ""


def missing_key(stream: str) -> TransferError:
    """The error for randomness that was asked for without a key."""
    return TransferError(
        f"the model draws from its random stream '{stream}' in training mode, but key is None. "
        "Pass key=jax.random.key(seed), and another key at every step."
    )


def _train(train: Train) -> bool | Selector:
    """``train`` as a bool or Selector.

    Raises:
      SelectionError: it is neither, nor a glob.
    """
    if isinstance(train, bool):
        return train
    if isinstance(train, Selector | str):
        return as_selector(train)
    raise SelectionError(
        f"train= expects False, True, or a selector of module paths such as 'head/**', got {type(train).__name__}. "
        "It is static: mark it so in jax.jit (static_argnames='train')."
    )


def _named(passed: Pass) -> dict[str, Array]:
    """Captured outputs by name: ``path``, ``path#2`` for a second call, ``path/0`` for parts of a tuple."""
    out: dict[str, Array] = {}
    for path, calls in passed.captured.items():
        for number, value in enumerate(calls, start=1):
            name = path if number == 1 else f"{path}#{number}"
            for keys, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
                full = f"{name}/{path_string(keys)}" if keys else name
                if full in out:
                    raise SelectionError(
                        f"capture(): '{full}' names a part of the outputs of '{name}' and those of another module. "
                        "Capture one of them at a time."
                    )
                out[full] = leaf
    return out


def unnest(tree: PyTree, names: Iterable[str], what: str) -> dict[str, Any]:
    """Leaves of nested dicts by path, checked against the names that a model has.

    Raises:
      SelectionError: a leaf is missing, too many, or a ``Hole``.
    """
    found: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        for key, child in node.items():
            if isinstance(child, Mapping):
                walk(f"{prefix}{key}/", child)
            elif is_hole(child):
                raise SelectionError(
                    f"{what} have a Hole at '{prefix}{key}'. Expected whole {what}: put the other half back with "
                    "tuning.merge(trainable, frozen) or transferjax.fill(a, b)."
                )
            else:
                found[f"{prefix}{key}"] = child

    walk("", tree if isinstance(tree, Mapping) else {"": tree})
    wanted = set(names)
    if found.keys() != wanted:
        missing, surplus = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
        parts = [f"lacks {listing(missing, 3)}"] * bool(missing) + [f"has the unknown {listing(surplus, 3)}"] * bool(
            surplus
        )
        raise SelectionError(
            f"{what} {' and '.join(parts)}. Expected the {len(wanted)} leaves of the model's own {what}."
        )
    return found
