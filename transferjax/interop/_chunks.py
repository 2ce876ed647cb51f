"""Inference in chunks that stay in the processor's cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from transferjax._context import in_inference
from transferjax._errors import TransferError, is_whole
from transferjax._types import Extra, Model, Params
from transferjax.interop._extend import Layer
from transferjax.interop._forward import Hooks, Pass, forward_of, rebuild
from transferjax.numerics import map_chunks


def in_chunks(model: Model, examples: int = 8) -> Model:
    """The Model that, in inference mode and compiled for CPU, takes its batch a few examples at a time.

    What a convolutional network computes between two layers is many times larger than its input. In chunks it stays in
    cache, and the program needs that many times less temporary memory. GPU and TPU get the whole batch at once, as does
    training, where examples may meet in a BatchNorm, and a pass that captures or changes what modules return.

    Args:
      model: any Model whose outputs have the batch as their first axis, and whose ``extra`` inference leaves alone (no
        decoding cache). That of a plain function is taken whole; inside it, use :func:`chunked`.
      examples: the most in a chunk; a batch that no number from half of it up to it divides is taken whole.

    Returns:
      A Model with the same params, extra and outputs.

    Raises:
      TransferError: ``examples`` is no whole number of at least 1.

    >>> import jax
    >>> from flax import nnx
    >>> from transferjax import interop
    >>> model = in_chunks(interop.nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0))), 2)
    >>> jax.jit(model.apply)(model.params, model.extra, jax.numpy.ones((4, 3)))[0].shape
    (4, 2)
    """
    _check(examples, "in_chunks")
    return rebuild(model, _Chunked(forward_of(model, "in_chunks"), examples))


def chunked(function: Callable[[Any], Any], inputs: Any, examples: int = 8) -> Any:
    """A part of a network that, in inference mode and compiled for CPU, takes its batch a few examples at a time.

    For use inside an NNX module or a plain function: the early layers of an image network compute much from little and
    want small chunks, the late ones have many weights and want large ones. It is ``function(inputs)`` outside of a
    Model's pass, in a Linen module, on GPU and TPU, in training mode and where outputs of modules are captured or
    changed.

    Args:
      function: ``inputs -> outputs``, each example for itself; in inference mode it writes to no variable.
      inputs: array ``[B, ...]`` or a pytree of them.
      examples: the most in a chunk; a batch that no number from half of it up to it divides is taken whole.

    Returns:
      What ``function(inputs)`` returns: every leaf ``[B, ...]``.

    Raises:
      TransferError: ``examples`` is no whole number of at least 1.

    >>> import jax
    >>> from transferjax.interop import pure
    >>> model = pure(lambda params, x: chunked(lambda part: part * params, x, 2) + 1, 2.0)
    >>> jax.jit(model.apply)(model.params, model.extra, jax.numpy.arange(4.0))[0].tolist()
    [1.0, 3.0, 5.0, 7.0]
    """
    _check(examples, "chunked")
    return map_chunks(function, inputs, examples) if in_inference() else function(inputs)


@dataclasses.dataclass(frozen=True)
class _Chunked(Layer):
    examples: int

    def __call__(self, params: Params, extra: Extra, inputs: Any, hooks: Hooks) -> Pass:
        modules = self.inner.modules()
        if modules is None or not hooks.only_infer:
            return self.inner(params, extra, inputs, hooks)
        whole = lambda part: self.inner(params, extra, part, hooks).outputs
        return Pass(map_chunks(whole, inputs, self.examples), extra, {}, modules)


def _check(examples: int, verb: str) -> None:
    if not is_whole(examples):
        raise TransferError(f"{verb}() expects a whole number of at least 1 example in a chunk, got {examples!r}.")
