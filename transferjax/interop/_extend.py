"""Layers around a Model: weights it does not have, functions on its insides, ties, BatchNorm momentum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from transferjax._errors import SelectionError, TransferError, describe, listing, nearest_hint
from transferjax._types import Array, Extra, Model, Params, PyTree
from transferjax.interop._forward import (
    Forward,
    Hooks,
    Insert,
    Pass,
    as_selectors,
    check_called,
    check_used,
    forward_of,
    rebuild,
)
from transferjax.tree import Selector, nest, paths
from transferjax.tree._modules import AUX, MODEL, Auxiliary, is_extended


def extend(model: Model, name: str, init: PyTree | Callable[[Array], PyTree], *, key: Array | None = None) -> Model:
    """The Model with weights that it does not have beside its own: a projector, a discriminator, a prompt.

    ``params`` becomes ``{"model": ..., "aux": {name: ...}}``. ``apply`` and ``capture`` compute what they did;
    :func:`insert` uses the new weights inside the model, an objective reads them with
    ``transferjax.tree.auxiliary(params, name)``, and ``train("aux/**")`` selects them. Module paths stay as they are.

    Args:
      model: any Model; one that is extended already gets one name more.
      name: of the new weights.
      init: an array or nested dicts of arrays with string keys; or a function ``key -> such a tree``.
      key: consumed by ``init`` when that is a function.

    Returns:
      The extended Model.

    Raises:
      SelectionError: the name is taken or contains ``/``, or the tree has other containers than dicts.
      TransferError: ``init`` is a function and ``key`` is missing, or the model is none of this library.

    >>> import jax.numpy as jnp
    >>> from transferjax.interop import pure
    >>> model = extend(pure(lambda params, x: x * params["scale"], {"scale": 2.0}), "shift", jnp.zeros(3))
    >>> sorted(paths(model.params))
    ['aux/shift', 'model/scale']
    """
    forward = forward_of(model, "extend")
    if not isinstance(name, str) or not name or "/" in name:
        raise SelectionError(f"extend() expects a name without '/', got {name!r}.")
    if callable(init):
        if key is None:
            raise TransferError(
                f"extend(): init is a function of a key. Pass one: extend(model, {name!r}, init, key=key)."
            )
        init = init(key)
    _check_plain(init, name)
    extended = any(isinstance(layer, _Extended) for layer in _layers(forward))
    own, aux = (model.params[MODEL], model.params[AUX]) if extended else (model.params, {})
    if name in aux:
        raise SelectionError(
            f"the model has auxiliary weights '{name}' already. Choose another name than {listing([*aux])}."
        )
    params = {MODEL: own, AUX: {**aux, name: init}}
    return rebuild(model, forward if extended else _Extended(forward), params=params)


def strip(params: Params) -> Params:
    """The params without the weights that :func:`extend` added; params that have none are returned as they are.

    Args:
      params: of an extended model, or of any other.

    Returns:
      ``params["model"]``: what the model took before it was extended.

    >>> strip({"model": {"kernel": 1.0}, "aux": {"projector": 2.0}})
    {'kernel': 1.0}
    """
    return params[MODEL] if is_extended(params) else params


def insert(
    model: Model, at: Selector | str | Iterable[Selector | str], function: Callable[[Mapping[str, PyTree], Any], Any]
) -> Model:
    """The Model with a function on the outputs of some of its modules.

    Args:
      model: any Model.
      at: selects module paths, not parameters: ``"blocks/3"``.
      function: ``(aux, output) -> output``, pure; ``aux`` holds the weights added by :func:`extend` under their
        names, whether that came before or after.

    Returns:
      A Model with the same params; what is captured from the module is the new output.

    Raises:
      SelectionError: no such module; when a model's modules show only in its forward pass, at the first of them.

    >>> import jax.numpy as jnp
    >>> from transferjax.interop import mark, pure
    >>> model = pure(lambda params, x: mark("body", x * params["scale"]) + 1, {"scale": 2.0})
    >>> float(insert(model, "body", lambda aux, output: -output).apply(model.params, {}, jnp.ones(()))[0])
    -1.0
    """
    forward = forward_of(model, "insert")
    if not callable(function):
        raise TransferError(f"insert() expects a function (aux, output) -> output, got {type(function).__name__}.")
    one = Insert(as_selectors(at), function)
    known = forward.modules()
    if known is not None:
        check_used(one.at, tuple(path for path in known if path), "insert()")
    return rebuild(model, _Inserted(forward, one))


def tie(model: Model, ties: Mapping[str, str]) -> Model:
    """The Model in which some leaves are one: the duplicate leaves ``params`` and follows the kept one.

    NNX modules that share a Variable need no ``tie``: the graph keeps them one.

    Args:
      model: any Model.
      ties: ``{path of the duplicate: path of the leaf that is kept}``.

    Returns:
      A Model with fewer params and the same outputs.

    Raises:
      SelectionError: a path does not exist, a kept leaf is a duplicate itself, or two tied leaves differ.

    >>> from transferjax.interop import pure
    >>> model = pure(lambda params, x: x @ params["embed"] @ params["head"].T, {"embed": 1.0, "head": 1.0})
    >>> tie(model, {"head": "embed"}).params
    {'embed': 1.0}
    """
    forward = forward_of(model, "tie")
    found = paths(model.params)
    for duplicate, kept in ties.items():
        for path in (duplicate, kept):
            if path not in found:
                raise SelectionError(f"tie(): there is no parameter '{path}'.{nearest_hint(path, found)}")
        if kept in ties:
            raise SelectionError(f"tie(): '{kept}' is kept and a duplicate. Tie all of them to one leaf that is kept.")
        if not _equal(found[duplicate], found[kept]):
            raise SelectionError(
                f"tie(): '{duplicate}' {describe(found[duplicate])} and '{kept}' {describe(found[kept])} differ. "
                "Expected equal leaves: copy one onto the other first."
            )
    params = nest({path: leaf for path, leaf in found.items() if path not in ties})
    return rebuild(model, _Tied(forward, tuple(sorted(ties.items()))), params=params)


def batch_norm_momentum(model: Model, momentum: float) -> Model:
    """The Model whose BatchNorms move their statistics by another momentum, whatever they were built with.

    Without it, the momentum m of a BatchNorm follows the number of training steps in a step of
    ``transferjax.make_step``: ``min(m, (1 + step) / (10 + step))``; elsewhere it is the module's own.

    Args:
      model: any Model; a plain function reads it from :func:`momentum_in_use`.
      momentum: in [0, 1], static: ``new = momentum * old + (1 - momentum) * batch``; 0 keeps the last batch's.

    Returns:
      A Model with the same params and extra.

    Raises:
      TransferError: momentum is no number in [0, 1].

    >>> from transferjax.interop import pure
    >>> model = batch_norm_momentum(pure(lambda params, x: x, {}), 0.9)
    """
    if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum <= 1:
        shown = momentum if isinstance(momentum, int | float) else type(momentum).__name__
        raise TransferError(f"batch_norm_momentum() expects a static number in [0, 1], got {shown}.")
    return rebuild(model, _Momentum(forward_of(model, "batch_norm_momentum"), float(momentum)))


def map_inputs(model: Model, function: Callable[[Any], Any]) -> Model:
    """The Model with a function in front of it, inside the same program: preprocessing on the device, say.

    Args:
      model: any Model.
      function: ``inputs -> inputs``; pure, and one object (or equal ones) for one program.

    Returns:
      A Model with the same params and extra, whose ``apply`` and ``capture`` take what ``function`` takes.

    Raises:
      TransferError: the function is none.

    >>> from transferjax.interop import pure
    >>> model = map_inputs(pure(lambda params, x: x * params, 2.0), lambda x: x + 1)
    >>> model.apply(model.params, model.extra, 3.0)[0]
    8.0
    """
    if not callable(function):
        raise TransferError(f"map_inputs() expects a function inputs -> inputs, got {type(function).__name__}.")
    return rebuild(model, _Mapped(forward_of(model, "map_inputs"), function))


@dataclasses.dataclass(frozen=True)
class Layer:
    """Base of a forward pass around another."""

    inner: Forward

    def modules(self) -> tuple[str, ...] | None:
        return self.inner.modules()


@dataclasses.dataclass(frozen=True)
class _Extended(Layer):
    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        if not is_extended(params):
            got = listing([str(key) for key in params]) if isinstance(params, Mapping) else type(params).__name__
            raise SelectionError(f"the model is extended and expects params {{'model': ..., 'aux': ...}}, got {got}.")
        return self.inner(params[MODEL], extra, inputs, dataclasses.replace(hooks, aux=Auxiliary(params[AUX])))


@dataclasses.dataclass(frozen=True)
class _Inserted(Layer):
    insert: Insert

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        inserts = (self.insert, *hooks.inserts)  # the outermost layer comes first here and acts last
        passed = self.inner(params, extra, inputs, dataclasses.replace(hooks, inserts=inserts))
        check_called(self.insert.at, passed, "insert()")
        return passed


@dataclasses.dataclass(frozen=True)
class _Tied(Layer):
    ties: tuple[tuple[str, str], ...]

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        for duplicate, kept in self.ties:
            params = _with(params, duplicate.split("/"), _leaf(params, kept))
        return self.inner(params, extra, inputs, hooks)


@dataclasses.dataclass(frozen=True)
class _Momentum(Layer):
    momentum: float

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        momentum = self.momentum if hooks.momentum is None else hooks.momentum
        return self.inner(params, extra, inputs, dataclasses.replace(hooks, momentum=momentum))


@dataclasses.dataclass(frozen=True)
class _Mapped(Layer):
    function: Callable[[Any], Any]

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        return self.inner(params, extra, self.function(inputs), hooks)


def _layers(forward: Any) -> Iterator[Any]:
    while isinstance(forward, Layer):
        yield forward
        forward = forward.inner


def _check_plain(tree: Any, path: str) -> None:
    """Raises unless a tree is an array or nested dicts of arrays with string keys."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            if not isinstance(key, str):
                raise SelectionError(f"extend() expects string keys, got {key!r} below '{path}'. Write str(key).")
            _check_plain(child, f"{path}/{key}")
    elif not (hasattr(tree, "shape") and hasattr(tree, "dtype")):
        raise SelectionError(
            f"extend() expects an array or nested dicts of arrays, got {type(tree).__name__} at '{path}'. "
            "Write a list as {'0': ..., '1': ...}, and take an NNX module's weights from tj.interop.nnx(module).params."
        )


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if describe(a) != describe(b):
        return False
    abstract = any(isinstance(x, jax.ShapeDtypeStruct | Tracer) for x in (a, b))
    return abstract or bool(np.array_equal(np.asarray(a), np.asarray(b)))


def _leaf(tree: Params, path: str) -> Any:
    for key in path.split("/"):
        if not isinstance(tree, Mapping) or key not in tree:
            raise SelectionError(f"params lack '{path}', to which another leaf is tied.")
        tree = tree[key]
    return tree


def _with(tree: Any, keys: list[str], leaf: Any) -> Any:
    """The nested dicts with one leaf more; nothing is changed in place."""
    return leaf if not keys else {**tree, keys[0]: _with(tree.get(keys[0], {}), keys[1:], leaf)}
