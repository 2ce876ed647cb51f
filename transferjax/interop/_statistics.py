"""BatchNorm statistics after a change of data: a momentum that forgets in time, and exact re-estimation."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, TransferError, listing
from transferjax._types import Array, Batch, Extra, Model, Params
from transferjax.interop._extend import batch_norm_momentum
from transferjax.interop._forward import Hooks, Train, forward_of, run
from transferjax.tree import Selector, as_selector, nest, paths


def momentum_for_steps(steps: int, remaining: float = 0.001) -> float:
    """The BatchNorm momentum with which ``steps`` updates forget the source's statistics.

    ``min(0.99, remaining ** (1 / steps))``: what is left of the old statistics is ``momentum ** steps``. With the
    usual .99, 75 steps leave 47 % of them, and a network that fits its training batches fails in inference mode.
    The default leaves a thousandth rather than a hundredth: the weights move too, and where source and target
    statistics are far apart one percent of the source's was measured to cost several points of accuracy.

    Args:
      steps: updates that will be made.
      remaining: the share of the old statistics that may be left.

    Returns:
      A number in (0, 0.99].

    Raises:
      TransferError: ``steps`` is below 1, or ``remaining`` not between 0 and 1.

    >>> round(momentum_for_steps(75), 3), momentum_for_steps(10_000)
    (0.912, 0.99)
    """
    if steps < 1 or not 0 < remaining < 1:
        raise TransferError(
            f"momentum_for_steps() expects steps >= 1 and 0 < remaining < 1, got steps={steps}, remaining={remaining}."
        )
    return min(0.99, remaining ** (1 / steps))


def reestimate_statistics(
    model: Model,
    params: Params,
    batches: Iterable[Batch],
    *,
    extra: Extra | None = None,
    train: Train = True,
    key: Array | None = None,
) -> Extra:
    """BatchNorm statistics of given data under given weights: precise BatchNorm, or AdaBN on a target domain.

    Every batch passes in training mode, so that each layer sees inputs normalised by that batch. The means are
    averaged over the batches, weighted by their numbers of examples; the variance is that of all of them pooled,
    ``mean(E[x^2]) - mean(x)^2``, computed without the cancellation. One batch gives exactly its own statistics.

    Args:
      model: the Model.
      params: its weights; the tuned ones after fine-tuning, the source's for AdaBN.
      batches: dicts with ``inputs``; examples of ``weight`` 0 are left out. Read once.
      extra: what to start from; default ``model.extra``.
      train: which modules' statistics are estimated; the others keep theirs and normalise by them.
      key: consumed; needed when dropout and the like are selected too.

    Returns:
      ``extra`` with new leaves ``mean`` and ``var`` in the selected BatchNorms, and everything else as it was.

    Raises:
      DataError: there is no batch, or one without inputs or examples.
      TransferError: no BatchNorm is selected.

    References:
      Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021; Li et al., Revisiting Batch Normalization For Practical
      Domain Adaptation, 2016.

    >>> import numpy as np
    >>> from flax import nnx
    >>> import transferjax.interop
    >>> model = transferjax.interop.nnx(nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
    >>> inputs = np.array([[1.0], [3.0]], np.float32)
    >>> extra = reestimate_statistics(model, model.params, [{"inputs": inputs}])
    >>> extra["mean"].tolist(), extra["var"].tolist()
    ([2.0], [1.0])
    """
    forward = forward_of(batch_norm_momentum(model, 0.0), "reestimate_statistics")
    start = model.extra if extra is None else extra
    train = as_selector(train) if isinstance(train, str) else train
    places = _batch_norms(start, train)
    pooled: dict[str, tuple[Array, Array]] | None = None
    seen = 0
    for number, batch in enumerate(batches):
        inputs, count = _examples(batch, number)
        own = None if key is None else jax.random.fold_in(key, number)
        share = jnp.float32(count / (seen + count))
        pooled = _pool(forward, train, places, params, start, inputs, own, pooled, share)
        seen += count
    if pooled is None:
        raise DataError("reestimate_statistics() expects at least one batch, got none.")
    new = dict(paths(start))
    for place, (mean, var) in pooled.items():
        new[_at(place, "mean")], new[_at(place, "var")] = mean, var
    return nest(new)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pool(forward, train, places, params, extra, inputs, key, pooled, share):
    """One batch more in the running mean and pooled variance of each BatchNorm (Chan, Golub and LeVeque, 1979)."""
    passed = run(forward, params, extra, inputs, Hooks(key=key, train=train, running=0.0))
    strange = [place for place in places if passed.batch_norms is not None and place not in passed.batch_norms]
    if strange:
        raise TransferError(
            f"reestimate_statistics() cannot set the momentum of {listing(strange)}: no BatchNorm of flax. "
            "Select the others, for example train='**/bn', and estimate these by a pass of your own."
        )
    leaves = paths(passed.extra)
    out = {}
    for place in places:
        mean, var = leaves[_at(place, "mean")], leaves[_at(place, "var")]
        if pooled is not None:
            old_mean, old_var = pooled[place]
            step = mean - old_mean
            var = (1 - share) * old_var + share * var + share * (1 - share) * step**2
            mean = old_mean + share * step
        out[place] = (mean, var)
    return out


def _batch_norms(extra: Extra, train: bool | Selector) -> tuple[str, ...]:
    """The module paths of ``extra`` that have both ``mean`` and ``var`` and are selected."""
    names = set(paths(extra))
    found = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == "mean"}
    places = sorted(place for place in found if _at(place, "var") in names)
    on = [place for place in places if (train if isinstance(train, bool) else train(place))]
    if not on:
        raise TransferError(
            f"reestimate_statistics() found {len(places)} BatchNorms (leaves mean and var in extra) and "
            f"train={train!r} selects none of them. Write for example train='**/bn', or leave train=True."
        )
    return tuple(on)


def _at(place: str, leaf: str) -> str:
    return f"{place}/{leaf}" if place else leaf


def _examples(batch: Batch, number: int) -> tuple[Any, int]:
    """The inputs of a batch without its examples of weight 0, and how many there are."""
    if not isinstance(batch, Mapping) or "inputs" not in batch:
        got = type(batch).__name__ if not isinstance(batch, Mapping) else f"keys {sorted(batch)}"
        raise DataError(f"batch {number}: expected a dict with 'inputs', got {got}.")
    inputs = batch["inputs"]
    weight = batch.get("weight")
    if weight is not None:
        keep = np.flatnonzero(np.asarray(weight))
        if len(keep) < len(np.asarray(weight)):
            inputs = jax.tree.map(lambda x: x[keep], inputs)
    count = len(jax.tree.leaves(inputs)[0])
    if count == 0:
        raise DataError(f"batch {number} has no example to estimate statistics from. Drop it.")
    return inputs, count
