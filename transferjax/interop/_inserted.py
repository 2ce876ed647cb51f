"""Small trainable layers at the outputs of a frozen network's modules: bottlenecks, scales and shifts, prompts."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import TransferError, describe, is_whole
from transferjax._types import Array, Model, PyTree
from transferjax.interop._extend import extend, insert, map_inputs
from transferjax.tree import Selector, glob, natural

At = Selector | str | Iterable[Selector | str]
PADDING = {"input_ids": 0, "attention_mask": 1, "token_type_ids": 0}
"""What stands in a text's inputs where a soft prompt takes the place of the embedding."""


def bottleneck(
    model: Model,
    inputs: Any,
    at: At,
    size: int,
    *,
    key: Array,
    name: str = "bottleneck",
    activation: Callable[[Array], Array] = jax.nn.gelu,
) -> Model:
    """The Model with a bottleneck adapter behind modules: ``h + activation(h @ down) @ up``.

    At first it computes what it did, as ``up`` is zero. Behind the attention and the MLP of every transformer layer,
    in front of the residual sums, these are Houlsby's adapters; behind the MLPs alone they are Pfeiffer's. Train them
    with ``tj.train("aux/bottleneck/**")``.

    Args:
      model: any Model; extended ones too.
      inputs: one batch as ``model.apply`` takes it, arrays or ``jax.ShapeDtypeStruct``: for the widths.
      at: selects modules whose output is one array ``[..., width]``: ``["layers/*/attention", "layers/*/mlp"]``.
      size: features of the bottleneck.
      key: for ``down`` (LeCun normal); consumed.
      name: of the weights, ``aux/<name>/<module path>/{down,up}/{kernel,bias}``.
      activation: between the two layers.

    Returns:
      The extended Model.

    Raises:
      TransferError: ``size`` is no whole number of at least 1, or a module's output is no single floating-point array.
      SelectionError: ``at`` matches no module, or the name is taken.

    >>> import jax, jax.numpy as jnp
    >>> from transferjax.interop import mark, pure
    >>> model = pure(lambda params, x: mark("body", x * params["scale"]), {"scale": jnp.ones(4)})
    >>> tuned = bottleneck(model, jnp.ones((2, 4)), "body", 2, key=jax.random.key(0))
    >>> jax.tree.map(jnp.shape, tuned.params["aux"]["bottleneck"]["body"]["down"])
    {'bias': (2,), 'kernel': (4, 2)}

    Source: Houlsby et al., arXiv:1902.00751; Pfeiffer et al., arXiv:2005.00247.
    """
    if not is_whole(size):
        raise TransferError(f"bottleneck() expects a whole number of at least 1 as size, got {size!r}.")

    def weights(path: str, output: Any) -> PyTree:
        width = output.shape[-1]
        down = jax.nn.initializers.lecun_normal()(_key(key, path), (width, size), jnp.float32)
        return {
            "down": {"kernel": down, "bias": jnp.zeros(size)},
            "up": {"kernel": jnp.zeros((size, width)), "bias": jnp.zeros(width)},
        }

    def change(own: Mapping[str, Any], output: Array) -> Array:
        down, up = own["down"], own["up"]
        hidden = activation(output @ down["kernel"] + down["bias"])
        return (output + hidden @ up["kernel"] + up["bias"]).astype(output.dtype)

    return _behind(model, inputs, at, name, weights, change, "bottleneck")


def scale_and_shift(model: Model, inputs: Any, at: At, *, name: str = "ssf") -> Model:
    """The Model with a factor and an offset per feature behind modules: ``h * scale + shift`` (SSF).

    At first scale is one and shift zero. Train them with ``tj.train("aux/ssf/**")``.

    Args:
      model: any Model; extended ones too.
      inputs: one batch as ``model.apply`` takes it, arrays or ``jax.ShapeDtypeStruct``: for the widths.
      at: selects modules whose output is one array ``[..., width]``.
      name: of the weights, ``aux/<name>/<module path>/{scale,shift}`` of shape ``[width]``.

    Returns:
      The extended Model.

    Raises:
      TransferError: a module's output is no single floating-point array.
      SelectionError: ``at`` matches no module, or the name is taken.

    >>> import jax.numpy as jnp
    >>> from transferjax.interop import mark, pure
    >>> model = pure(lambda params, x: mark("body", x * params["scale"]), {"scale": jnp.ones(4)})
    >>> sorted(scale_and_shift(model, jnp.ones((2, 4)), "body").params["aux"]["ssf"]["body"])
    ['scale', 'shift']

    Source: Lian et al., arXiv:2210.08823.
    """
    weights = lambda path, output: {"scale": jnp.ones(output.shape[-1]), "shift": jnp.zeros(output.shape[-1])}
    change = lambda own, output: (output * own["scale"] + own["shift"]).astype(output.dtype)
    return _behind(model, inputs, at, name, weights, change, "scale_and_shift")


def visual_prompts(
    model: Model, inputs: Any, at: str, length: int, *, key: Array, deep: At = (), name: str = "prompt"
) -> Model:
    """The Model with learnt tokens behind those of its input (visual prompt tuning).

    They are appended, so the class token stays the first. With ``deep``, the appended tokens are replaced by others
    behind each of those modules (all blocks but the last): VPT-deep. Train them with ``tj.train("aux/prompt/**")``.

    Args:
      model: a transformer whose blocks take any number of tokens; extended ones too.
      inputs: one batch as ``model.apply`` takes it, arrays or ``jax.ShapeDtypeStruct``.
      at: path of the module that returns the tokens ``[B, T, width]``, positions added.
      length: how many tokens.
      key: for their values, normal with a standard deviation of 0.02; consumed.
      deep: modules behind which the appended tokens are replaced.
      name: of the weights, ``aux/<name>/<module path>`` of shape ``[length, width]``.

    Returns:
      The extended Model.

    Raises:
      TransferError: ``length`` is no whole number of at least 1, or a module's output is no array of tokens.
      SelectionError: no such module, or the name is taken.

    >>> import jax, jax.numpy as jnp
    >>> from transferjax.interop import mark, pure
    >>> model = pure(lambda params, x: mark("embed", x * params["scale"]), {"scale": jnp.ones(4)})
    >>> tuned = visual_prompts(model, jnp.ones((2, 3, 4)), "embed", 5, key=jax.random.key(0))
    >>> tuned.apply(tuned.params, {}, jnp.ones((2, 3, 4)))[0].shape
    (2, 8, 4)

    Source: Jia et al., arXiv:2203.12119.
    """
    shapes = _outputs(model, inputs, at, "visual_prompts") | (
        _outputs(model, inputs, deep, "visual_prompts") if deep else {}
    )
    tokens = _tokens(shapes, length, key, "visual_prompts")
    model = extend(model, name, tokens)
    for path in shapes:
        change = _append if path == at else _replace_last
        model = insert(model, glob(path), functools.partial(_with_own, (name, path), change))
    return model


def soft_prompt(model: Model, inputs: Mapping[str, Any], at: str, length: int, *, key: Array, name: str = "prompt"):
    """The Model of texts with learnt embeddings behind those of its tokens (prompt tuning).

    ``length`` places are added at the end of ``input_ids``, ``attention_mask`` and ``token_type_ids``; there, the
    module's output is replaced. The first token stays the first. Positions that the model knows must suffice. Train
    the embeddings with ``tj.train("aux/prompt/**")``.

    Args:
      model: a model that takes a dict with ``input_ids [B, T]``; extended ones too.
      inputs: one batch of it, arrays or ``jax.ShapeDtypeStruct``.
      at: path of the module that returns token embeddings ``[B, T, width]``: ``"embeddings"``.
      length: how many.
      key: for their values, normal with a standard deviation of 0.02; consumed.
      name: of the weights, ``aux/<name>/<module path>`` of shape ``[length, width]``.

    Returns:
      The extended Model, which takes what the model took; outputs per token have ``length`` tokens more.

    Raises:
      TransferError: ``length`` is no whole number of at least 1, ``inputs`` is no dict with ``input_ids``, or the
        module's output is no array of tokens.
      SelectionError: no such module, or the name is taken.

    >>> import jax, jax.numpy as jnp
    >>> from transferjax.interop import mark, pure
    >>> model = pure(lambda params, x: mark("embed", params["table"][x["input_ids"]]), {"table": jnp.ones((9, 4))})
    >>> text = {"input_ids": jnp.ones((2, 3), int)}
    >>> tuned = soft_prompt(model, text, "embed", 5, key=jax.random.key(0))
    >>> tuned.apply(tuned.params, {}, text)[0].shape
    (2, 8, 4)

    Source: Lester et al., arXiv:2104.08691.
    """
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        raise TransferError(
            f"soft_prompt() expects inputs as a dict with 'input_ids' [B, T], got {describe(inputs)}. For arrays of "
            "images use visual_prompts()."
        )
    tokens = _tokens(_outputs(model, inputs, at, "soft_prompt"), length, key, "soft_prompt")
    model = extend(map_inputs(model, functools.partial(_padded, length)), name, tokens)
    return insert(model, glob(at), functools.partial(_with_own, (name, at), _replace_last))


def _behind(model: Model, inputs: Any, at: At, name: str, weights: Any, change: Any, verb: str) -> Model:
    """The model with weights of their own, and a function that uses them, behind each selected module."""
    shapes = _outputs(model, inputs, at, verb)
    model = extend(model, name, _nested({path: weights(path, output) for path, output in shapes.items()}))
    for path in shapes:
        model = insert(model, glob(path), functools.partial(_with_own, (name, path), change))
    return model


def _with_own(place: tuple[str, str], change: Any, aux: Mapping[str, Any], output: Any) -> Any:
    own = aux[place[0]]
    for part in place[1].split("/"):
        own = own[part]
    return change(own, output)


def _outputs(model: Model, inputs: Any, at: At, verb: str) -> dict[str, Any]:
    """The shape of each selected module's output, from input to output of the tree's order."""
    selected = (at,) if isinstance(at, Selector | str) else tuple(at)
    run = lambda params, extra, inputs: model.capture(params, extra, inputs, selected)[2]
    found = jax.eval_shape(run, model.params, model.extra, inputs)
    for path, output in found.items():
        if "#" in path or output.ndim < 1 or not jnp.issubdtype(output.dtype, jnp.inexact):
            raise TransferError(
                f"{verb}() at '{path}': its output is {describe(output)}. Expected modules that are called once and "
                "return one floating-point array [..., width]."
            )
    return {path: found[path] for path in sorted(found, key=natural)}


def _tokens(shapes: Mapping[str, Any], length: int, key: Array, verb: str) -> PyTree:
    if not is_whole(length):
        raise TransferError(f"{verb}() expects a whole number of at least 1 as length, got {length!r}.")
    for path, output in shapes.items():
        if output.ndim != 3:
            raise TransferError(
                f"{verb}() at '{path}': its output is {describe(output)}. Expected tokens [B, T, width]."
            )
    draw = lambda path, output: 0.02 * jax.random.normal(_key(key, path), (length, output.shape[-1]))
    return _nested({path: draw(path, output) for path, output in shapes.items()})


def _append(own: Array, output: Array) -> Array:
    wide = jnp.broadcast_to(own.astype(output.dtype), (output.shape[0], *own.shape))
    return jnp.concatenate([output, wide], axis=1)


def _replace_last(own: Array, output: Array) -> Array:
    return _append(own, output[:, : output.shape[1] - own.shape[0]])


def _padded(length: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
    widen = lambda name, x: jnp.pad(x, ((0, 0), (0, length)), constant_values=PADDING[name])
    return {name: widen(name, x) if name in PADDING and x is not None else x for name, x in inputs.items()}


def _key(key: Array, path: str) -> Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _nested(leaves: Mapping[str, PyTree]) -> PyTree:
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = out
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = {**node.get(last, {}), **leaf} if isinstance(leaf, dict) else leaf
    return out
