"""One read-out of a learned mixture of layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, listing
from transferjax._report import Report
from transferjax.features._choice import side_by_side
from transferjax.features._readout import Readout
from transferjax.features._table import FeatureTable
from transferjax.features._targets import (
    CLASSES,
    TARGETS,
    Targets,
    as_strengths,
    fold_numbers,
    quality,
    quality_name,
    standardisation,
    to_float32,
    widen,
)
from transferjax.numerics._lbfgs import minimise, sigmoid_loss, softmax_loss

STRENGTHS = (1.0, 10.0, 100.0)


def layer_mixing(
    table: FeatureTable,
    labels: Any = None,
    *,
    layers: Sequence[str] | None = None,
    strengths: Any = STRENGTHS,
    folds: int = 5,
    seed: int = 0,
    iterations: int = 200,
) -> Readout:
    """A linear read-out of a weighted mean of layers, the weights learned with it.

    The features are ``sum_l softmax(w)_l * layer_l``, each layer standardised first; ``w`` and the
    linear read-out minimise ``sum(loss) + .5 * strength * sum(kernel**2)`` together, by L-BFGS from equal weights: the
    cross-entropy over classes, the binary one for several labels, half the squared error for targets.

    Args:
      table: of :func:`extract`; the layers must be equally wide, as those of a transformer are.
      labels: classes ``[N]``, several labels ``[N, K]`` or targets; ``None``: those of the table.
      layers: names; ``None``: all of the table.
      strengths: positive numbers, of which the one with the best left-out quality is taken; or one.
      folds: how many.
      seed: which.
      iterations: of L-BFGS, at most.

    Returns:
      A :class:`Readout` on the layers side by side, ``table.concatenated(layers)``; its report has the weight of each
      layer.

    Raises:
      SelectionError: a layer is not in the table.
      DataError: the layers differ in width, or labels or strengths cannot be used.

    Source: Peters et al., "Deep contextualized word representations" (ELMo), arXiv:1802.05365, section 3.2.

    >>> x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    >>> table = FeatureTable({"first": x, "second": x[::-1]}, np.arange(60))
    >>> found = layer_mixing(table, (x[:, 0] > 0).astype(int), strengths=1.0)
    >>> found.report.rows[0][1] > 0.9
    True
    """
    names, widths, x, _, targets = side_by_side(table, labels, layers)
    if len(set(widths)) > 1:
        raise DataError(
            f"layers have the widths {listing([f'{n} {w}' for n, w in zip(names, widths)])}; expected equal ones, as a "
            "mean of layers is taken. For layers of any width write head2toe() or best_layer()."
        )
    path, ones = as_strengths(strengths), np.ones(len(x))
    fit = lambda rows, strength: _fit(x[rows], targets, targets.matrix[rows], widths[0], strength, iterations)
    left_out: list[float] = []
    if len(path) > 1:
        numbers = fold_numbers(targets, folds, seed)
        for strength in path:
            outputs = np.zeros(targets.matrix.shape)
            for fold in range(folds):
                found = fit(numbers != fold, strength)
                here = np.asarray(_mixed(found, x[numbers == fold])).reshape((numbers == fold).sum(), -1)
                outputs[numbers == fold] = here[:, targets.columns] if targets.kind == CLASSES else here
            left_out.append(quality(targets, outputs, ones))
    strength = float(path[int(np.argmax(left_out))] if left_out else path[0])
    params = fit(np.arange(len(x)), strength)
    shares = np.asarray(jax.nn.softmax(params["mixture"]))
    facts: dict[str, Any] = {"strength": strength}
    if left_out:
        facts[f"left-out {quality_name(targets)}"] = max(left_out)
        facts["chosen by"] = f"{folds} stratified folds, seed {seed}"
    rows = tuple((name, float(share)) for name, share in zip(names, shares))
    return Readout(_mixed, params, Report("Layer mixing", ("layer", "weight"), rows, facts))


def _fit(
    x: np.ndarray, targets: Targets, wanted: np.ndarray, width: int, strength: float, iterations: int
) -> dict[str, Any]:
    shift, scale = standardisation(x, np.ones(len(x)), True)
    standard = (((x - shift) * scale).reshape(len(x), -1, width)).astype(np.float32)
    loss = {CLASSES: softmax_loss, TARGETS: _squared}.get(targets.kind, sigmoid_loss)
    mixture, kernel, bias = _solve(
        jnp.asarray(standard), jnp.asarray(wanted, jnp.float32), float(strength), loss=loss, iterations=iterations
    )
    wide = {"kernel": widen(targets, np.asarray(kernel), 0.0), "bias": widen(targets, np.asarray(bias), -np.inf)}
    return to_float32({"shift": shift, "scale": scale, "mixture": np.asarray(mixture), **wide})


@functools.partial(jax.jit, static_argnames=("loss", "iterations"))
def _solve(x: Any, wanted: Any, strength: Any, *, loss: Any, iterations: int) -> Any:
    def total(point):
        mixture, kernel, bias = point
        hidden = jnp.einsum("nld,l->nd", x, jax.nn.softmax(mixture), precision="highest")
        scores = jnp.matmul(hidden, kernel, precision="highest") + bias
        return (loss(scores, wanted).sum() + 0.5 * strength * (kernel**2).sum()) / len(x)

    zeros = jnp.zeros((x.shape[2], wanted.shape[1])), jnp.zeros(wanted.shape[1])
    return minimise(total, (jnp.zeros(x.shape[1]), *zeros), iterations=iterations, tolerance=1e-5).point


def _squared(scores: Any, wanted: Any) -> Any:
    return 0.5 * ((scores - wanted) ** 2).sum(-1)


@jax.jit
def _mixed(params: Any, features: Any) -> Any:
    x = (jnp.asarray(features, jnp.float32) - params["shift"]) * params["scale"]
    shares = jax.nn.softmax(params["mixture"])
    hidden = jnp.einsum("nld,l->nd", x.reshape(len(x), len(shares), -1), shares, precision="highest")
    return jnp.matmul(hidden, params["kernel"], precision="highest") + params["bias"]
