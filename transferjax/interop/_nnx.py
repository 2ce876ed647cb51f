"""Flax NNX modules as Models."""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transferjax._context import tracing_inference
from transferjax._errors import TransferError
from transferjax._types import Extra, Model, Params, Preprocess, PyTree
from transferjax.interop._forward import (
    FLAGS,
    Hooks,
    Pass,
    arguments,
    build,
    flag_value,
    frozen_array,
    missing_key,
    owner,
    unnest,
)
from transferjax.tree import nest, path_string

OUTPUTS, CONTEXT, MIXED = "_transferjax_outputs", "_transferjax_context", "_transferjax_mixed"


def nnx_model(
    module: nnx.Module, preprocess: Preprocess | None = None, *, train_argument: str | None = "train"
) -> Model:
    """A Flax NNX module as a Model.

    The module is read once and never changed; changing it later does not change the Model. A Variable that is shared
    appears once, under its first path, and stays shared. Random streams are no part of ``extra``: each call seeds
    them from its ``key``. Which modules are in training mode is decided by ``train`` alone, by module path: flags
    ``deterministic``, ``use_running_average`` and ``update_stats`` given at construction or at call time are
    overridden. ``extra`` changes only below modules in training mode, an ``nnx.Cache`` always.

    Args:
      module: any ``nnx.Module``; its arrays may be abstract (made under ``nnx.eval_shape``).
      preprocess: travels with the Model.
      train_argument: a boolean argument of ``__call__`` (of any module) that means training mode; ``None``: none.

    Returns:
      A :class:`~transferjax.Model`: ``params`` holds every ``nnx.Param``, ``extra`` every other array.

    Raises:
      TransferError: ``module`` is no ``nnx.Module``.

    >>> from flax import nnx
    >>> import transferjax.interop
    >>> model = transferjax.interop.nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> outputs, extra = model.apply(model.params, model.extra, jax.numpy.ones((4, 2)))
    >>> sorted(model.params), outputs.shape, extra
    (['bias', 'kernel'], (4, 3), {})
    """
    if not isinstance(module, nnx.Module):
        hint = " For Flax Linen write tj.interop.linen(module, variables)." if hasattr(module, "init") else ""
        raise TransferError(f"nnx() expects a flax.nnx.Module, got {type(module).__name__}.{hint}")
    if jax.tree.leaves(nnx.state(module, nnx.Intermediate)):
        module = nnx.clone(module)
        nnx.pop(module, nnx.Intermediate)
    graphdef, state = nnx.split(module)
    flat = list(nnx.to_flat_state(state))
    modules = tuple(sorted(_join(keys) for keys, _ in _modules(module)))
    network = _Network(graphdef, flat, modules, (*FLAGS, train_argument) if train_argument else FLAGS)
    return build(network, network.read(flat, "params"), network.read(flat, "extra", "cache"), preprocess)


class _Leaf(NamedTuple):
    """Where one Variable's value lives.

    Attributes:
      keys: its place in the module.
      kind: ``params``, ``extra``, ``cache`` (in ``extra`` too), ``rng`` or ``static`` (no array).
      names: the paths of its arrays.
      treedef: the form of its value.
      empty: the Variable without its value; ``None`` for an array that is in no Variable.
      value: of a static one; the shape of a stream's key or counter.
    """

    keys: tuple[Any, ...]
    kind: str
    names: tuple[str, ...]
    treedef: Any
    empty: Any
    value: Any

    def filled(self, value: Any) -> Any:
        """The Variable with another value; an array that is no Variable stays none."""
        return value if self.empty is None else self.empty.replace(value)


class _Network:
    """The graph of a module, taken apart once. Compares by identity."""

    def __init__(self, graphdef: Any, flat: list[tuple[Any, Any]], modules: tuple[str, ...], flags: tuple[str, ...]):
        self.graphdef, self.paths, self.flags = graphdef, modules, flags
        self.leaves = tuple(_leaf(keys, variable) for keys, variable in flat)
        self.owners = {name: owner(name, modules) for leaf in self.leaves for name in leaf.names}

    def modules(self) -> tuple[str, ...]:
        return self.paths

    def read(self, flat: list[tuple[Any, Any]], *kinds: str) -> PyTree:
        """The arrays of some kinds as they are in the module; the network itself keeps none."""
        found: dict[str, Any] = {}
        for leaf, (_, variable) in zip(self.leaves, flat, strict=True):
            if leaf.kind in kinds:
                found.update(zip(leaf.names, map(frozen_array, jax.tree.leaves(_value(variable))), strict=True))
        return nest(found)

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        given = {
            **unnest(params, self._names("params"), "params"),
            **unnest(extra, self._names("extra", "cache"), "extra"),
        }
        module = self._merge(given, hooks)
        momenta = {_join(keys): one.momentum for keys, one in _modules(module) if isinstance(one, nnx.BatchNorm)}
        taps = _instrument(module, self.flags, hooks)
        args, kwargs = arguments(inputs)
        with tracing_inference(hooks.only_infer):
            outputs = module(*args, **kwargs)
        captured = {
            path: list(getattr(one, OUTPUTS).get_value()) for path, one in taps.items() if hasattr(one, OUTPUTS)
        }
        called = {path for path, calls in captured.items() if calls}
        called |= {path for path, one in taps.items() if hasattr(one, CONTEXT) and getattr(one, CONTEXT).used}
        after = self._extra(module, given, momenta, hooks)
        return Pass(outputs, after, captured, self.paths, frozenset(called), frozenset(momenta))

    def _names(self, *kinds: str) -> list[str]:
        return [name for leaf in self.leaves if leaf.kind in kinds for name in leaf.names]

    def _merge(self, given: dict[str, Any], hooks: Hooks) -> Any:
        state, seeds = [], _seeds([leaf for leaf in self.leaves if leaf.kind == "rng"], hooks.key)
        for leaf in self.leaves:
            if leaf.kind == "rng":
                value = seeds[leaf.keys]
            elif leaf.names:
                value = jax.tree.unflatten(leaf.treedef, [given[name] for name in leaf.names])
            else:
                value = leaf.value
            state.append((leaf.keys, leaf.filled(value)))
        return nnx.merge(self.graphdef, nnx.from_flat_state(state), copy=True)

    def _extra(self, module: Any, given: dict[str, Any], momenta: dict[str, float], hooks: Hooks) -> Extra:
        after = dict(nnx.to_flat_state(nnx.state(module)))
        found: dict[str, Any] = {}
        for leaf in self.leaves:
            if leaf.kind not in ("extra", "cache"):
                continue
            values, treedef = jax.tree.flatten(_value(after[leaf.keys])) if leaf.keys in after else ([], None)
            for number, name in enumerate(leaf.names):
                moves = leaf.kind == "cache" or hooks.on(self.owners[name])
                if moves and treedef != leaf.treedef:
                    raise TransferError(
                        f"'{_join(leaf.keys)}' changed its structure during the forward pass. Expected the arrays of "
                        "`extra` to keep their number and nesting: allocate them when the module is made."
                    )
                found[name] = values[number] if moves else given[name]
                if moves and self.owners[name] in momenta:
                    found[name] = hooks.averaged(momenta[self.owners[name]], given[name], values[number])
        return nest(found)


def _leaf(keys: tuple[Any, ...], variable: Any) -> _Leaf:
    value = _value(variable)
    flat, treedef = jax.tree_util.tree_flatten_with_path(value)
    empty = variable.replace(None) if isinstance(variable, nnx.Variable) else None
    if isinstance(variable, nnx.RngState):
        return _Leaf(keys, "rng", (), treedef, empty, jax.ShapeDtypeStruct(value.shape, value.dtype))
    if not all(_is_array(leaf) for _, leaf in flat):
        return _Leaf(keys, "static", (), treedef, empty, value)
    kind = "params" if isinstance(variable, nnx.Param) else "cache" if isinstance(variable, nnx.Cache) else "extra"
    names = tuple("/".join(filter(None, (_join(keys), path_string(inner)))) for inner, _ in flat)
    return _Leaf(keys, kind, names, treedef, empty, None)


def _value(variable: Any) -> Any:
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | complex) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


def _join(keys: tuple[Any, ...]) -> str:
    return "/".join(map(str, keys))


def _modules(module: nnx.Module) -> list[tuple[tuple[Any, ...], Any]]:
    """Every module that computes something: not the lists and dicts that only hold others."""
    return [(keys, one) for keys, one in nnx.iter_modules(module) if not isinstance(one, nnx.List | nnx.Dict)]


def _seeds(leaves: list[_Leaf], key: Any) -> dict[tuple[Any, ...], Any]:
    """The states of random streams: keys derived from the pass's key and the stream's path, counters at zero.

    All keys are derived at once: one by one, each would be a loop of its own to compile.
    """
    is_key = lambda leaf: jnp.issubdtype(leaf.value.dtype, jax.dtypes.prng_key)
    seeds = {leaf.keys: jnp.zeros(leaf.value.shape, leaf.value.dtype) for leaf in leaves if not is_key(leaf)}
    streams = [leaf for leaf in leaves if is_key(leaf)]
    if key is None:  # never drawn from: _Silent raises first
        return seeds | {leaf.keys: jnp.broadcast_to(jax.random.key(0), leaf.value.shape) for leaf in streams}
    if not streams:
        return seeds
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    paths = np.array([zlib.crc32(_join(leaf.keys[:-1]).encode()) for leaf in streams], np.uint32)
    for leaf, own in zip(streams, jax.vmap(jax.random.fold_in, (None, 0))(key, paths), strict=True):
        seeds[leaf.keys] = jax.random.split(own, leaf.value.shape) if leaf.value.shape else own
    return seeds


def _instrument(module: Any, flags: tuple[str, ...], hooks: Hooks) -> dict[str, Any]:
    """Sets modes, momentum, insertions and recorders on a merged module; returns the tapped modules by path."""
    tapped: dict[str, Any] = {}
    if hooks.key is None:
        for _, one in nnx.iter_graph(module):
            if type(one) is nnx.RngStream:
                one.__class__ = _Silent
    for keys, one in _modules(module):
        path = _join(keys)
        on, inserts, capturing = hooks.on(path), hooks.inserted(path), hooks.capturing(path)
        for name in flags:
            if isinstance(inspect.getattr_static(one, name, 0), bool | None):
                setattr(one, name, flag_value(name, on))
        if isinstance(one, nnx.BatchNorm) and hooks.forced_momentum is not None:
            one.momentum = hooks.forced_momentum
        if inserts:
            setattr(one, CONTEXT, _Context([functools.partial(insert.function, hooks.aux) for insert in inserts]))
        if capturing:
            setattr(one, OUTPUTS, nnx.Intermediate(()))
        if inserts or capturing:
            tapped[path] = one
        mixing = isinstance(one, nnx.BatchNorm) and hooks.mixes(path)
        if mixing:
            setattr(one, MIXED, _Mixed(hooks, path))
        one.__class__ = _specialised(type(one), flags, on, path in tapped, mixing)
    return tapped


class _Silent(nnx.RngStream):
    """A random stream of a pass without a key."""

    def __call__(self) -> jax.Array:
        raise missing_key(self.tag)


class _Context:
    """Functions on a module's outputs. Compares by identity, so that no trace made with others is taken for this."""

    def __init__(self, functions: list[Callable[[Any], Any]]):
        self.functions = functions
        self.used = False

    def __call__(self, outputs: Any) -> Any:
        self.used = True
        return functools.reduce(lambda value, function: function(value), self.functions, outputs)


class _Mixed:
    """How a BatchNorm chooses between two statistics in this pass. Compares by identity."""

    def __init__(self, hooks: Hooks, path: str):
        self.hooks, self.path = hooks, path

    def __call__(self, axis: Any, by_running: Any, by_batch: Any) -> Any:
        return self.hooks.mixed(self.path, axis, by_running, by_batch)


@functools.cache
def _specialised(cls: type, flags: tuple[str, ...], on: bool, tapped: bool, mixing: bool = False) -> type:
    """The class with its mode flags forced, whatever the model passes at call time.

    A subclass per class and mode, made once, and not a closure per instance: transformations such as ``nnx.remat``
    take modules apart and compare their classes to decide whether an earlier trace can be used again.
    """
    namespace: dict[str, Any] = {}
    for name, method in inspect.getmembers_static(cls, inspect.isroutine):
        if isinstance(method, staticmethod | classmethod) or (name.startswith("__") and name != "__call__"):
            continue
        forced = tuple((flag, flag_value(flag, on)) for flag in flags if flag in _parameters(method))
        if forced and name not in ("set_view", "set_attributes", "train", "eval"):
            namespace[name] = _forced(method, forced)
    call = inspect.getattr_static(cls, "__call__", None)
    if mixing:
        still = tuple((flag, flag_value(flag, False)) for flag in flags if flag in _parameters(call))
        namespace["__call__"] = _mixing(_forced(call, still), namespace.get("__call__", call))
    if tapped:
        namespace["__call__"] = _tapped(namespace.get("__call__", call))
    if not namespace:
        return cls
    namespace |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls)(cls.__name__, (cls,), namespace, pytree=cls._pytree__is_pytree)  # type: ignore[call-arg]


def _parameters(method: Any) -> dict[str, Any]:
    try:
        return dict(inspect.signature(method).parameters)
    except (TypeError, ValueError):
        return {}


def _forced(method: Any, flags: tuple[tuple[str, bool], ...]) -> Any:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        bound = signature.bind_partial(self, *args, **kwargs)
        bound.arguments.update(flags)
        return method.__get__(self, type(self))(*bound.args[1:], **bound.kwargs)

    return call


def _mixing(still: Any, moving: Any) -> Any:
    """The call of a BatchNorm by both statistics: by the running ones first, as the other call moves them."""

    @functools.wraps(moving)
    def call(self, *args, **kwargs):
        self.use_running_average = True
        by_running = still(self, *args, **kwargs)
        self.use_running_average = False
        return getattr(self, MIXED)(self.axis, by_running, moving(self, *args, **kwargs))

    return call


def _tapped(method: Any) -> Any:
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        outputs = method.__get__(self, type(self))(*args, **kwargs)
        if hasattr(self, CONTEXT):
            outputs = getattr(self, CONTEXT)(outputs)
        if hasattr(self, OUTPUTS):
            recorder = getattr(self, OUTPUTS)
            recorder.set_value((*recorder.get_value(), outputs))
        return outputs

    return call
