"""Plain functions and equinox-style pytrees as Models."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._context import tracing_inference
from transferjax._errors import TransferError
from transferjax._types import Extra, Model, Params, Preprocess, PyTree
from transferjax.interop._forward import Hooks, Pass, build, frozen_array, owner, unnest
from transferjax.tree import flatten, nest


def pure(
    apply: Callable[..., Any], params: PyTree, extra: PyTree | None = None, preprocess: Preprocess | None = None
) -> Model:
    """A plain function as a Model.

    Inside the function, :func:`mark` names a value that can be captured or replaced, :func:`training` tells
    whether a part is in training mode, and :func:`momentum_in_use` its BatchNorm momentum.

    Args:
      apply: ``apply(params, inputs) -> outputs``; with ``extra`` ``apply(params, extra, inputs) -> (outputs,
        extra)``. ``key=`` and ``train=`` (a bool: the root's mode) are passed when it has arguments of that name.
        Inputs come as they are, a dict too.
      params: any pytree; the function gets it back in this form, the Model shows nested dicts.
      extra: any pytree of what gradients do not learn; ``None``: there is none.
      preprocess: travels with the Model.

    Returns:
      A :class:`~transferjax.Model`.

    Raises:
      TransferError: ``apply`` is no function.

    >>> model = pure(lambda params, x: x * params[0] + params[1], [2.0, 1.0])
    >>> model.params, float(model.apply(model.params, model.extra, 3.0)[0])
    ({'0': 2.0, '1': 1.0}, 7.0)
    """
    if not callable(apply):
        raise TransferError(f"pure() expects a function apply(params, inputs), got {type(apply).__name__}.")
    network = _Function(apply, params, extra)
    return build(network, nest(dict(flatten(params)[0])), nest(dict(flatten(extra)[0])), preprocess)


def equinox(
    module: PyTree, *, call: Callable[[Any, Any, Any], Any] | None = None, preprocess: Preprocess | None = None
) -> Model:
    """An equinox-style module as a Model: a callable pytree whose floating-point arrays are its parameters.

    A boolean leaf ``inference`` (equinox's dropout has one) is set by the module path that it lies in. Modules with
    equinox ``State`` are not supported; wrap those with :func:`pure`, the state as ``extra``.

    Args:
      module: a callable pytree.
      call: ``(module, inputs, key) -> outputs`` on a batch; default: the module on each example, with its own key.
      preprocess: travels with the Model.

    Returns:
      A :class:`~transferjax.Model`; other arrays than floating-point ones are in ``extra`` and never change.

    Raises:
      TransferError: ``module`` cannot be called.

    >>> import jax.numpy as jnp
    >>> scale = jax.tree_util.Partial(jnp.multiply, jnp.full(3, 2.0))
    >>> model = equinox(scale)
    >>> model.apply(model.params, model.extra, jnp.ones((1, 3)))[0].tolist()
    [[2.0, 2.0, 2.0]]
    """
    if not callable(module):
        raise TransferError(f"equinox() expects a callable pytree, got {type(module).__name__}.")
    network = _Module(module, call or _per_example)
    return build(network, nest(network.params), nest(network.extra), preprocess)


def mark(path: str, value: Any) -> Any:
    """Names a value inside a plain function, so that it can be captured and replaced as a module's output can.

    Args:
      path: as a module path, ``"blocks/3"``.
      value: any pytree of arrays.

    Returns:
      The value, or what an inserted function makes of it. Outside of a Model's pass: the value.

    >>> model = pure(lambda params, x: mark("double", 2 * x) + 1, {})
    >>> {name: float(value) for name, value in model.capture({}, {}, 3.0, "double")[2].items()}
    {'double': 6.0}
    """
    current = _current()
    if current is None:
        return value
    current.seen.add(path)
    current.called.add(path)
    for one in current.hooks.inserted(path):
        value = one.function(current.hooks.aux, value)
    if current.hooks.capturing(path):
        current.captured.setdefault(path, []).append(value)
    return value


def training(path: str = "") -> bool:
    """Whether a part of a plain function is in training mode in this pass; ``False`` outside of one.

    Args:
      path: as a module path; the root is ``""``.

    >>> model = pure(lambda params, x: training("dropout"), {})
    >>> model.apply({}, {}, 0.0, train="dropout")[0]
    True
    """
    current = _current()
    if current is None:
        return False
    current.seen.add(path)
    return current.hooks.on(path)


def momentum_in_use(default: float = 0.99) -> Any:
    """The BatchNorm momentum of this pass: that of ``batch_norm_momentum``, or the default following the step.

    Args:
      default: the momentum m of the module; in a training step of the library ``min(m, (1 + step) / (10 + step))``.

    >>> momentum_in_use(0.9)
    0.9
    """
    current = _current()
    return default if current is None else current.hooks.followed(default)


class _Running(threading.local):
    """The passes of plain functions that are being traced in this thread, innermost last."""

    def __init__(self):
        self.stack: list[_Record] = []


class _Record:
    def __init__(self, hooks: Hooks):
        self.hooks = hooks
        self.seen: set[str] = {""}
        self.called: set[str] = set()
        self.captured: dict[str, list[Any]] = {}


_RUNNING = _Running()


def _current() -> _Record | None:
    return _RUNNING.stack[-1] if _RUNNING.stack else None


@contextlib.contextmanager
def _recording(hooks: Hooks) -> Iterator[_Record]:
    record = _Record(hooks)
    _RUNNING.stack.append(record)
    try:
        with tracing_inference(hooks.only_infer):
            yield record
    finally:
        _RUNNING.stack.pop()


class _Outline:
    """The form of a pytree, and how its leaves are called."""

    def __init__(self, tree: PyTree):
        flat, self.treedef = flatten(tree)
        self.names = [name for name, _ in flat]

    def rebuild(self, tree: PyTree, what: str) -> PyTree:
        leaves = unnest(tree, self.names, what)
        return jax.tree.unflatten(self.treedef, [leaves[name] for name in self.names])


class _Function:
    """A plain function and the forms of its trees. Compares by identity."""

    def __init__(self, apply: Callable[..., Any], params: PyTree, extra: PyTree | None):
        self.apply, self.stateful = apply, extra is not None
        self.params, self.extra = _Outline(params), _Outline(extra)
        parameters = inspect.signature(apply).parameters.values()
        keywords = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        self.accepts = frozenset(keywords & {"key", "train"})

    def modules(self) -> None:
        return None

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        options: dict[str, Any] = {"key": hooks.key, "train": hooks.on("")}
        options = {name: options[name] for name in self.accepts}
        weights, state = self.params.rebuild(params, "params"), self.extra.rebuild(extra, "extra")
        with _recording(hooks) as record:
            if self.stateful:
                outputs, after = self.apply(weights, state, inputs, **options)
            else:
                outputs, after = self.apply(weights, inputs, **options), state
        if jax.tree.structure(after) != self.extra.treedef:
            raise TransferError("apply() returned an `extra` of another structure than it was given.")
        moved = dict(flatten(after)[0])
        kept = unnest(extra, self.extra.names, "extra")
        new = {name: moved[name] if hooks.on(owner(name, record.seen)) else kept[name] for name in kept}
        return Pass(outputs, nest(new), record.captured, tuple(sorted(record.seen)), frozenset(record.called))


class _Module:
    """A callable pytree taken apart: arrays by path, everything else as it is. Compares by identity."""

    def __init__(self, module: PyTree, call: Callable[[Any, Any, Any], Any]):
        flat, self.treedef = flatten(module)
        self.leaves, self.call = flat, call
        arrays = {name: leaf for name, leaf in flat if hasattr(leaf, "shape") and hasattr(leaf, "dtype")}
        self.params = {n: frozen_array(a) for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.inexact)}
        self.extra = {n: frozen_array(a) for n, a in arrays.items() if n not in self.params}
        parts = {name.rpartition("/")[0] for name, _ in flat}
        self.known = {"/".join(p.split("/")[:depth]) for p in parts for depth in range(p.count("/") + 2)} | {""}

    def modules(self) -> None:
        return None

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        given = {**unnest(params, self.params, "params"), **unnest(extra, self.extra, "extra")}
        leaves = []
        for name, leaf in self.leaves:
            parent, _, last = name.rpartition("/")
            mode = last == "inference" and isinstance(leaf, bool)
            leaves.append(given[name] if name in given else not hooks.on(parent) if mode else leaf)
        with _recording(hooks) as record:
            outputs = self.call(jax.tree.unflatten(self.treedef, leaves), inputs, hooks.key)
        return Pass(outputs, extra, record.captured, tuple(sorted(self.known | record.seen)), frozenset(record.called))


def _per_example(module: Any, inputs: Any, key: Any) -> Any:
    keyed = "key" in inspect.signature(module).parameters
    if key is None or not keyed:
        return jax.vmap(module)(inputs)
    keys = jax.random.split(key, jax.tree.leaves(inputs)[0].shape[0])
    return jax.vmap(lambda one, own: module(one, key=own))(inputs, keys)
