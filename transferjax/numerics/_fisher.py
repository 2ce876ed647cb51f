"""The diagonal of the Fisher information of a classifier: squared gradients, example by example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, describe


def diagonal_fisher(
    logits: Callable[[Any, Any, Any], Any],
    params: Any,
    rest: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    verb: str,
    targets: Callable[[Any, Any], jax.Array] | None = None,
    key: jax.Array | None = None,
    examples: int = 1,
) -> Any:
    """``mean over x of E over y of (d log p(y | x) / d w)^2``, from one gradient per example.

    Args:
      logits: ``(params, rest, inputs) -> [B, C]``, each example for itself.
      params: what is differentiated: a pytree of arrays.
      rest: what else the network takes; any pytree.
      batches: dicts with ``inputs`` and optionally ``weight`` ``[B]``, by which the mean is weighted.
      verb: the function that asks, for errors.
      targets: ``(batch, logits as a shape) -> [B, C]``, the labels as distributions; ``None``: the network's own, y is
        drawn from ``p(y | x)``.
      key: draws one label per example; ``None``: the mean over all ``C`` labels, ``C`` backward passes. Without
        ``targets`` only.
      examples: whose gradients are computed, and kept, at once.

    Returns:
      A pytree like ``params`` of float64 numpy arrays.

    Raises:
      DataError: there is no example, or outputs are no logits.

    >>> logits = lambda params, rest, inputs: inputs @ params
    >>> batches = [{"inputs": jnp.ones((4, 3))}]
    >>> diagonal_fisher(logits, jnp.zeros((3, 2)), (), batches, verb="fisher")[0].tolist()
    [0.25, 0.25]
    """
    step = jax.jit(lambda *parts: _summed(logits, examples, *parts))
    leaves, treedef = jax.tree.flatten(params)
    total = [np.zeros(np.shape(leaf), np.float64) for leaf in leaves]
    count = 0.0
    for number, batch in enumerate(batches):
        inputs = jax.tree.map(jnp.asarray, batch["inputs"])
        size = len(jax.tree.leaves(inputs)[0])
        weight = jnp.asarray(batch.get("weight", np.ones(size, np.float32)), jnp.float32)
        outputs = jax.eval_shape(logits, params, rest, inputs)
        if getattr(outputs, "ndim", 0) != 2:
            raise DataError(f"the model's outputs are {describe(outputs)}; {verb} needs logits [B, C], one per class.")
        wanted = None if targets is None else targets(batch, outputs)
        drawn = None if key is None else jax.random.fold_in(key, number)
        found = step(params, rest, inputs, weight, wanted, drawn)
        total = [old + np.asarray(new, np.float64) for old, new in zip(total, jax.tree.leaves(found), strict=True)]
        count += float(weight.sum())
    if not count:
        raise DataError(f"{verb} got no example. Expected batches with inputs; was an iterator read before?")
    return jax.tree.unflatten(treedef, [leaf / count for leaf in total])


def _summed(
    logits: Any, examples: int, params: Any, rest: Any, inputs: Any, weight: Any, targets: Any, key: Any
) -> Any:
    """The weighted sum over a batch of the squared gradients of the log-probabilities, in the shape of ``params``."""
    square = lambda gradient: jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), gradient)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)

    def example(parts: Any) -> Any:
        one, target, number = parts

        def log_probabilities(values: Any) -> Any:
            outputs = logits(values, rest, jax.tree.map(lambda x: x[None], one))
            return jax.nn.log_softmax(outputs[0].astype(jnp.float32))

        log, pull = jax.vjp(log_probabilities, params)
        if target is not None:
            return square(pull(target)[0])
        of = lambda label: square(pull(jax.nn.one_hot(label, len(log), dtype=log.dtype))[0])
        if key is not None:
            return of(jax.random.categorical(jax.random.fold_in(key, number), log))
        each = lambda total, label: (jax.tree.map(lambda t, s: t + jnp.exp(log[label]) * s, total, of(label)), None)
        return jax.lax.scan(each, zeros, jnp.arange(len(log)))[0]

    def chunk(total: Any, parts: Any) -> tuple[Any, None]:
        one, target, number, share = parts
        squares = jax.vmap(lambda *rows: example(rows))(one, target, number)
        return jax.tree.map(lambda t, s: t + jnp.tensordot(share, s, 1), total, squares), None

    size = len(weight)
    width = min(examples, size)
    rows = jnp.arange(-(-size // width) * width)  # the last chunk is filled up with examples that count nothing
    share = jnp.where(rows < size, weight[rows % size], 0.0)
    filled = jax.tree.map(lambda x: x[rows % size], (inputs, targets, jnp.arange(size)))
    chunks = jax.tree.map(lambda x: x.reshape(-1, width, *x.shape[1:]), (*filled, share))
    return jax.lax.scan(chunk, zeros, chunks)[0]
