"""The attentive probe: learned pooling over positions, then a linear layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, describe
from transferjax.features._readout import Readout
from transferjax.features._targets import (
    CLASSES,
    LABELS,
    TARGETS,
    as_strengths,
    path_report,
    standardisation,
    standardised,
    to_float32,
    training_of,
    widen,
)
from transferjax.numerics._lbfgs import minimise, sigmoid_loss, softmax_loss
from transferjax.numerics._tables import as_features, as_weights


def attentive(
    features: Any,
    labels: Any,
    *,
    strength: float = 1.0,
    weights: Any = None,
    num_classes: int | None = None,
    standardise: bool = True,
    tolerance: float = 1e-5,
    iterations: int = 300,
) -> Readout:
    """One learned query over the positions, then a linear layer, trained together by L-BFGS in one jitted loop.

    The pooled features are ``softmax(x @ query / sqrt(d)) @ x``. It minimises ``sum(weights * loss) + .5 * strength *
    (sum(kernel**2) + sum(query**2))`` in float32 from zeros, where pooling is the mean: cross-entropy for classes,
    binary cross-entropy for labels, half the squared error for targets. The function is not convex, and what is found
    is a local minimum, the same one every time.

    Args:
      features: ``[N, T, d]``, T positions.
      labels: classes, integers ``[N]``; several labels, booleans or zeros and ones ``[N, K]``; targets, floats
        ``[N]`` or ``[N, K]``.
      strength: a positive number.
      weights: ``[N]``, how often each example counts; ``None``: once.
      num_classes: columns of the outputs for classes; ``None``: the largest label plus one.
      standardise: give every column mean 0 and variance 1 over examples and positions first.
      tolerance: of the L2 norm of the gradient, divided by the sum of the weights.
      iterations: at most this many.

    Returns:
      A :class:`Readout` that takes features ``[N, T, d]``, of any T.

    Raises:
      DataError: an argument cannot be used.

    Source: Bardes et al., Revisiting feature prediction for learning visual representations from video, TMLR 2024,
    reduced to one query.

    >>> x = np.array([[[0.0], [1.0]], [[1.0], [0.0]], [[3.0], [0.0]], [[0.0], [4.0]]])
    >>> readout = attentive(x, np.array([0, 0, 1, 1]), strength=0.01)
    >>> readout.predict(readout.params, x).argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    table = np.asarray(features)
    if table.ndim != 3 or 0 in table.shape:
        raise DataError(
            f"features are {describe(table)}; expected [N, T, d]. For pooled ones write logistic() or ridge()."
        )
    flat = as_features(table.reshape(-1, table.shape[-1]))
    counts = as_weights(weights, len(table))
    takes = (CLASSES, LABELS, TARGETS)
    training = training_of(flat.reshape(table.shape), labels, counts, num_classes, "attentive", takes, "")
    table, targets, counts = training
    pull = as_strengths(strength, "strength")
    width, positions = table.shape[-1], table.shape[1]
    shift, scale = standardisation(table.reshape(-1, width), np.repeat(counts, positions), standardise)
    scaling = to_float32({"shift": shift[None], "scale": scale[None]})
    loss = {CLASSES: softmax_loss, LABELS: sigmoid_loss, TARGETS: _squared_loss}[targets.kind]
    middle = np.average(targets.matrix, axis=0, weights=counts) if targets.kind == TARGETS else 0.0
    arrays = to_float32(
        {"wanted": targets.matrix - middle, "weights": counts / counts.sum(), "pull": pull[0] / counts.sum()}
    )
    found = _train(standardised(scaling, table), arrays, float(tolerance), loss=loss, iterations=int(iterations))
    learned = {name: np.asarray(array) for name, array in found.point.items()}
    kernel, bias = widen(targets, learned["kernel"], 0.0), widen(targets, learned["bias"] + middle, -np.inf)
    params = {**scaling, **to_float32({"query": learned["query"], "kernel": kernel, "bias": bias})}
    norm = float(found.gradient)
    facts = {"iterations": int(found.iterations), "gradient norm": norm, "converged": norm <= tolerance}
    rows = [(float(pull[0]), float(found.value))]
    report = path_report(
        "Attentive probe", ("strength", "objective"), rows, 0, "the only one", examples=len(table), **facts
    )
    return Readout(_predict, params, report)


def _squared_loss(outputs: Any, wanted: Any) -> Any:
    return 0.5 * ((outputs - wanted) ** 2).sum(-1)


def _pooled(params: Any, x: Any) -> Any:
    scores = jnp.einsum("ntd,d->nt", x, params["query"], precision="highest") / x.shape[-1] ** 0.5
    return jnp.einsum("nt,ntd->nd", jax.nn.softmax(scores, axis=-1), x, precision="highest")


def _outputs(params: Any, x: Any) -> Any:
    return jnp.matmul(_pooled(params, x), params["kernel"], precision="highest") + params["bias"]


@jax.jit
def _predict(params: Any, features: Any) -> Any:
    return _outputs(params, standardised(params, features))


@functools.partial(jax.jit, static_argnames=("loss", "iterations"))
def _train(x: Any, arrays: Any, tolerance: Any, *, loss: Callable[[Any, Any], Any], iterations: int) -> Any:
    def objective(params):
        penalty = (params["kernel"] ** 2).sum() + (params["query"] ** 2).sum()
        return arrays["weights"] @ loss(_outputs(params, x), arrays["wanted"]) + 0.5 * arrays["pull"] * penalty

    columns = arrays["wanted"].shape[1]
    start = {"query": jnp.zeros(x.shape[-1]), "kernel": jnp.zeros((x.shape[-1], columns)), "bias": jnp.zeros(columns)}
    return minimise(objective, start, iterations=iterations, tolerance=tolerance)
