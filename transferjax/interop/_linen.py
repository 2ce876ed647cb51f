"""Flax Linen modules as Models."""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import core, errors
from flax import linen as nn

from transferjax._context import tracing_inference
from transferjax._errors import SelectionError, TransferError, listing
from transferjax._types import Extra, Model, Params, Preprocess
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
from transferjax.tree import nest

RECORD = "transferjax_outputs"
TRANSIENT = "intermediates"
CACHE = "cache"


def linen_model(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    train_argument: str | None = "train",
    preprocess: Preprocess | None = None,
) -> Model:
    """A Flax Linen module and its variables as a Model.

    Which modules are in training mode is decided by ``train`` alone, by module path: flags ``deterministic``,
    ``use_running_average`` and ``update_stats`` given at construction or at call time are overridden. ``extra``
    changes only below modules in training mode, the collection ``cache`` always. Values sown into ``intermediates``
    are no state and are left out.

    Args:
      module: any ``flax.linen.Module``.
      variables: what ``module.init`` returns; its arrays may be abstract (``jax.eval_shape(module.init, ...)``).
      train_argument: a boolean argument of ``__call__`` (of any module) that means training mode, passed where it
        is accepted; ``"deterministic"`` and the like mean inference mode; ``None``: none.
      preprocess: travels with the Model.

    Returns:
      A :class:`~transferjax.Model`: ``params`` is the collection of that name, ``extra`` all others in one tree of
      module paths (``BatchNorm_0/mean``). A collection whose paths collide with another's is put below its name.

    Raises:
      TransferError: ``module`` is no Linen module, or ``variables`` has no collections.

    >>> import jax, flax.linen as nn
    >>> import transferjax.interop
    >>> module = nn.Dense(3)
    >>> variables = module.init(jax.random.key(0), jax.numpy.ones((4, 2)))
    >>> model = transferjax.interop.linen(module, variables)
    >>> outputs, extra = model.apply(model.params, model.extra, jax.numpy.ones((4, 2)))
    >>> sorted(model.params), outputs.shape, extra
    (['bias', 'kernel'], (4, 3), {})
    """
    if not isinstance(module, nn.Module):
        raise TransferError(f"linen() expects a flax.linen.Module, got {type(module).__name__}.")
    collections = nn.meta.unbox(core.unfreeze(dict(variables) if isinstance(variables, Mapping) else {}))
    if not collections or not all(isinstance(tree, Mapping) for tree in collections.values()):
        raise TransferError(
            "linen() expects the variables that module.init returns, {'params': {...}, ...}. "
            "For bare parameters write {'params': params}."
        )
    network = _Network(module, collections, (*FLAGS, train_argument) if train_argument else FLAGS)
    params = {name: frozen_array(_get(collections, keys)) for name, keys in network.params.items()}
    extra = {name: frozen_array(_get(collections, keys)) for name, keys in network.extra.items()}
    return build(network, nest(params), nest(extra), preprocess)


class _Network:
    """A module with the places of its variables. Compares by identity."""

    def __init__(self, module: nn.Module, collections: Mapping[str, Any], flags: tuple[str, ...]):
        self.module = module.clone(parent=None)
        self.flags = flags
        self.params = {"/".join(keys): ("params", *keys) for keys in _keys(collections.get("params", {}))}
        self.extra = _extra_places(collections, self.params)
        self.collections = sorted({keys[0] for keys in self.extra.values()})
        inside = {name: name.split("/")[:-1] for name in self.params}
        inside |= {name: list(keys[1:-1]) for name, keys in self.extra.items()}
        self.known = {"/".join(keys[:depth]) for keys in inside.values() for depth in range(len(keys) + 1)} | {""}

    def modules(self) -> None:
        return None

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        state = unnest(extra, self.extra, "extra")
        variables = _place({**unnest(params, self.params, "params"), **state}, {**self.params, **self.extra})
        watch = _Watch(self.flags, hooks)
        args, kwargs = arguments(inputs)
        mutable = [*self.collections, *([TRANSIENT] if hooks.at else [])]
        try:
            # Linen's scopes forbid the loop that numerics.map_chunks would put around its modules.
            with tracing_inference(False), nn.intercept_methods(watch):
                result = self.module.apply(variables, *args, **kwargs, rngs=_streams(hooks.key), mutable=mutable)
        except errors.InvalidRngError as error:
            if hooks.key is not None:
                raise
            raise missing_key(str(error).partition('PRNG for "')[2].partition('"')[0]) from None
        outputs, updated = result
        modules = tuple(sorted(self.known | watch.seen))
        moved = {name: self._moved(name, value, updated, hooks, watch) for name, value in state.items()}
        captured = _recorded(updated, {path for path in watch.called if hooks.capturing(path)})
        return Pass(outputs, nest(moved), captured, modules, frozenset(watch.called), frozenset(watch.momenta))

    def _moved(self, name: str, value: Any, updated: Mapping[str, Any], hooks: Hooks, watch: _Watch) -> Any:
        keys = self.extra[name]
        path = owner("/".join(keys[1:]), watch.seen)
        if keys[0] == CACHE:
            return _get(updated, keys)
        if not hooks.on(path):
            return value
        new = _get(updated, keys)
        return hooks.averaged(watch.momenta[path], value, new) if path in watch.momenta else new


class _Watch:
    """The interceptor of one pass: forces modes, applies insertions, records outputs."""

    def __init__(self, flags: tuple[str, ...], hooks: Hooks):
        self.flags, self.hooks = flags, hooks
        self.seen: set[str] = set()
        self.called: set[str] = set()
        self.momenta: dict[str, Any] = {}
        self.inside: list[str] = []
        self.still: set[str] = set()

    def __call__(self, next_function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module, method = context.module, context.method_name
        if method == "setup" or module.scope is None:
            return next_function(*args, **kwargs)
        path = "/".join(module.path)
        self.seen.add(path)
        # A call of `super().__call__`, or the body of a lifted module, is the same call once more.
        outermost = method == "__call__" and path not in self.inside
        self.inside.append(path)
        call = functools.partial(self._forced, next_function, args, kwargs, module, method)
        try:
            if outermost and isinstance(module, nn.BatchNorm) and self.hooks.mixes(path):
                outputs = self._both(call, module, path)
            else:
                outputs = call(self.hooks.on(path) and path not in self.still)
        finally:
            self.inside.pop()
        return self._tapped(outputs, module, path) if outermost else outputs

    def _both(self, call: Any, module: Any, path: str) -> Any:
        """The call of a BatchNorm by both statistics: by the running ones first, as the other call moves them."""
        self.still.add(path)
        try:
            by_running = call(False)
        finally:
            self.still.discard(path)
        object.__setattr__(module, "scope", module.scope.rewound())  # as Linen does where a module is called again
        return self.hooks.mixed(path, module.axis, by_running, call(True))

    def _forced(self, next_function, args, kwargs, module, method, on):
        """The call with its flags forced: in the module's fields and in the arguments."""
        signature = _signature(type(module), method)
        changed: dict[str, Any] = {
            name: flag_value(name, on) for name in self.flags if isinstance(vars(module).get(name, 0), bool | None)
        }
        passed: dict[str, Any] = {
            name: flag_value(name, on) for name in self.flags if signature and name in signature.parameters
        }
        for name in changed.keys() & passed.keys():
            # Linen's `merge_param` wants exactly one of the two to be set.
            default = signature.parameters[name].default
            if default is None:
                passed[name] = None
            elif default is inspect.Parameter.empty:
                changed[name] = None
        if isinstance(module, nn.BatchNorm):
            self.momenta.setdefault("/".join(module.path), module.momentum)
            if self.hooks.forced_momentum is not None:
                changed["momentum"] = self.hooks.forced_momentum
        if passed:
            bound = signature.bind_partial(module, *args, **kwargs)
            bound.arguments.update(passed)
            args, kwargs = bound.args[1:], bound.kwargs
        before = {name: getattr(module, name) for name in changed}
        try:
            for name, value in changed.items():
                object.__setattr__(module, name, value)
            return next_function(*args, **kwargs)
        finally:
            for name, value in before.items():
                object.__setattr__(module, name, value)

    def _tapped(self, outputs, module, path):
        self.called.add(path)
        for insert in self.hooks.inserted(path):
            outputs = insert.function(self.hooks.aux, outputs)
        if self.hooks.capturing(path):
            # Sown, not kept aside: what is computed inside nn.remat or nn.scan leaves it only as a variable.
            module.sow(TRANSIENT, RECORD, outputs)
        return outputs


def _extra_places(collections: Mapping[str, Any], taken: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Path to ``(collection, *keys)`` for every leaf that is no parameter."""
    used, out = set(taken), {}
    for collection in sorted(collections.keys() - {"params", TRANSIENT}):
        names = {"/".join(keys): (collection, *keys) for keys in _keys(collections[collection])}
        if _overlap(used, names):
            names = {f"{collection}/{name}": keys for name, keys in names.items()}
        if _overlap(used, names):
            raise SelectionError(
                f"the collection '{collection}' has paths of other variables: {listing(sorted(names), 3)}. "
                "Expected one path per variable: rename the collection or a module."
            )
        used |= names.keys()
        out |= names
    return out


def _overlap(used: set[str], names: Mapping[str, Any]) -> bool:
    """Whether a path is in both, or lies below one of the other side."""
    above_used = {above for name in used for above in _above(name)}
    return any(name in used or name in above_used or not used.isdisjoint(_above(name)) for name in names)


def _above(name: str) -> list[str]:
    segments = name.split("/")
    return ["/".join(segments[:depth]) for depth in range(1, len(segments))]


def _keys(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found.extend(_keys(value, (*prefix, key)))
        elif value is not None:
            found.append((*prefix, key))
    return found


def _get(tree: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], keys, tree)


def _place(leaves: Mapping[str, Any], places: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Linen's variables: each leaf under its collection and its own keys, which may contain a ``/``."""
    out: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *outer, last = places[name]
        functools.reduce(lambda node, key: node.setdefault(key, {}), outer, out)[last] = leaf
    return out


def _streams(key: Any) -> dict[str, Any] | None:
    """Random streams; Linen falls back to ``params`` for every name that is not here."""
    if key is None:
        return None
    return {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in ("params", "dropout")}


def _recorded(updated: Mapping[str, Any], wanted: set[str]) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {}
    for path in sorted(wanted):
        try:
            out[path] = list(_get(updated, (TRANSIENT, *path.split("/"), RECORD)))
        except KeyError:
            raise TransferError(
                f"the outputs of '{path}' cannot leave the transformation that it runs in. "
                "Let nn.scan or nn.vmap carry them: variable_axes={'intermediates': 0}."
            ) from None
    return out


@functools.cache
def _signature(cls: type, method: str) -> Any:
    try:
        return inspect.signature(getattr(cls, method))
    except (TypeError, ValueError, AttributeError):
        return None
