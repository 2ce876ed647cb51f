"""A small trainable network beside a frozen one, which reads its insides and whose gradient never enters it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import TransferError, describe, is_whole
from transferjax._types import Array, Extra, Model, Params, PyTree
from transferjax.interop._extend import Layer, extend
from transferjax.interop._forward import Hooks, Insert, Pass, forward_of, rebuild
from transferjax.interop._inserted import At, _key, _nested, _outputs
from transferjax.tree import glob

TEMPERATURE = 0.1
"""Of the gates, as in ladder side-tuning."""


def side_network(
    model: Model,
    inputs: Any,
    at: At,
    size: int,
    *,
    key: Array,
    name: str = "side",
    activation: Callable[[Array], Array] = jax.nn.gelu,
) -> Model:
    """The Model with a ladder of small layers beside it: side-tuning.

    Each selected module is a rung: its output ``f``, without gradient, is projected to ``size`` features and mixed
    with the side state of the rung before, ``h = g * down(f) + (1 - g) * h`` with ``g = sigmoid(gate / 0.1)``, and
    passes a layer, ``h = h + activation(h @ mix)``. What the last rung has is added to that module's output,
    ``f + h @ up``, and the model goes on from there. At first it computes what it did, as ``up`` is zero.

    Training it (``tj.train("aux/side/**")``, and a head behind it) needs no backward pass through the modules in
    front of the last rung, unlike layers that are inserted between them.

    Args:
      model: any Model; extended ones too.
      inputs: one batch as ``model.apply`` takes it, arrays or ``jax.ShapeDtypeStruct``: for the shapes.
      at: selects modules whose outputs are arrays ``[..., width]`` that differ at most in width: ``"layers/*"``. The
        rungs follow the order in which the model calls them.
      size: features of the side network.
      key: for ``down`` and ``mix`` (LeCun normal); consumed.
      name: of the weights, ``aux/<name>/rungs/<module path>/{down,mix}/{kernel,bias}``, ``.../gate`` (a scalar, of
        all rungs but the first) and ``aux/<name>/up/{kernel,bias}``.
      activation: of each rung's layer.

    Returns:
      The extended Model.

    Raises:
      TransferError: ``size`` is no whole number of at least 1, a module's output is no single floating-point array, or
        the outputs differ in more than their width.
      SelectionError: ``at`` matches no module, or the name is taken.

    >>> import jax, jax.numpy as jnp
    >>> from transferjax.interop import mark, pure
    >>> body = lambda params, x: mark("second", mark("first", x * params["scale"]) + 1)
    >>> tuned = side_network(pure(body, {"scale": jnp.ones(4)}), jnp.ones((2, 4)), "*", 3, key=jax.random.key(0))
    >>> sorted(tuned.params["aux"]["side"]["rungs"]["second"]), tuned.params["aux"]["side"]["up"]["kernel"].shape
    (['down', 'gate', 'mix'], (3, 4))

    Source: Zhang et al., "Side-Tuning", arXiv:1912.13503; Sung et al., "LST: Ladder Side-Tuning for Parameter and
    Memory Efficient Transfer Learning", arXiv:2206.06522, for rungs and gates (there the rungs are pruned transformer
    layers, and the side state replaces the backbone's).
    """
    if not is_whole(size):
        raise TransferError(f"side_network() expects a whole number of at least 1 as size, got {size!r}.")
    shapes = _outputs(model, inputs, at, "side_network")
    order = _called(model, inputs, tuple(shapes))
    for path in order:
        if shapes[path].shape[:-1] != shapes[order[0]].shape[:-1]:
            raise TransferError(
                f"side_network() expects outputs that differ only in width; '{order[0]}' gives "
                f"{describe(shapes[order[0]])} and '{path}' {describe(shapes[path])}. Select modules of one resolution."
            )
    draw = lambda path, *shape: jax.nn.initializers.lecun_normal()(_key(key, path), shape, jnp.float32)
    dense = lambda path, wide: {"kernel": draw(path, wide, size), "bias": jnp.zeros(size)}
    rungs = {}
    for path in order:
        gate = {} if path == order[0] else {"gate": jnp.zeros(())}
        wide = shapes[path].shape[-1]
        rungs[path] = {"down": dense(f"{path}/down", wide), "mix": dense(f"{path}/mix", size), **gate}
    last = shapes[order[-1]].shape[-1]
    up = {"kernel": jnp.zeros((size, last)), "bias": jnp.zeros(last)}
    model = extend(model, name, {"rungs": _nested(rungs), "up": up})
    return rebuild(model, _Side(forward_of(model, "side_network"), name, order, activation))


@dataclasses.dataclass(frozen=True)
class _Side(Layer):
    name: str
    order: tuple[str, ...]
    activation: Callable[[Array], Array]

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        ladder = _Ladder(self)  # of this pass only, as what is captured is
        rungs = tuple(Insert((glob(path),), functools.partial(ladder.rung, path)) for path in self.order)
        return self.inner(params, extra, inputs, dataclasses.replace(hooks, inserts=(*rungs, *hooks.inserts)))


class _Ladder:
    """The side state on its way through one forward pass."""

    def __init__(self, side: _Side):
        self.side, self.state = side, None

    def rung(self, path: str, aux: Mapping[str, PyTree], output: Array) -> Array:
        side, weights = self.side, aux[self.side.name]
        own = weights["rungs"]
        for part in path.split("/"):
            own = own[part]
        state = _dense(own["down"], jax.lax.stop_gradient(output))
        if self.state is not None:
            gate = jax.nn.sigmoid(own["gate"] / TEMPERATURE)
            state = gate * state + (1 - gate) * self.state
        self.state = state + side.activation(_dense(own["mix"], state))
        if path != side.order[-1]:
            return output
        return (output + _dense(weights["up"], self.state)).astype(output.dtype)


def _dense(own: Mapping[str, Array], x: Array) -> Array:
    return x @ own["kernel"] + own["bias"]


def _called(model: Model, inputs: Any, chosen: tuple[str, ...]) -> tuple[str, ...]:
    """The selected modules in the order in which a forward pass calls them."""
    order: list[str] = []

    def note(path: str, aux: Any, output: Any) -> Any:
        order.append(path)
        return output

    inserts = tuple(Insert((glob(path),), functools.partial(note, path)) for path in chosen)
    forward = forward_of(model, "side_network")
    run = lambda params, extra, inputs: forward(params, extra, inputs, Hooks(inserts=inserts)).outputs
    jax.eval_shape(run, model.params, model.extra, inputs)
    return tuple(order)
