"""Logistic regression as a read-out, and the path of linear models that it shares with the SVM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from transferjax.features._readout import Readout
from transferjax.features._targets import (
    CLASSES,
    LABELS,
    Targets,
    Training,
    as_strengths,
    as_training,
    fold_numbers,
    linear,
    linear_params,
    path_report,
    quality,
    standardisation,
)
from transferjax.numerics._lbfgs import LinearPath, linear_path, sigmoid_loss, softmax_loss

STRENGTHS = tuple(10.0**power for power in range(-2, 5))


def logistic(
    features: Any,
    labels: Any,
    *,
    strengths: Any = STRENGTHS,
    weights: Any = None,
    num_classes: int | None = None,
    standardise: bool = True,
    folds: int = 5,
    seed: int = 0,
    tolerance: float = 1e-8,
    iterations: int = 1000,
) -> Readout:
    """Logistic regression, all strengths in one program, the strength chosen by stratified folds.

    It minimises ``sum(weights * loss) + .5 * strength * sum(kernel**2)``, the bias free, in float64: cross-entropy
    over the classes, or for several labels the sum of their binary cross-entropies. With ``strength = 1 / C`` this is
    scikit-learn's objective; for two classes, which have one column each here, ``strength = 2 / C``. The strength with
    the least loss on left-out folds is taken, each fold standardised by its own training part.

    Args:
      features: ``[N, d]``.
      labels: classes, integers ``[N]``, or several labels, booleans or zeros and ones ``[N, K]``.
      strengths: positive numbers ``[S]``, or one: then nothing is left out.
      weights: ``[N]``, how often each example counts; ``None``: once.
      num_classes: columns of the outputs for classes; ``None``: the largest label plus one.
      standardise: give every column mean 0 and variance 1 first.
      folds: how many.
      seed: which.
      tolerance: of the L2 norm of the gradient, divided by the sum of the weights.
      iterations: at most this many.

    Returns:
      A :class:`Readout` whose outputs are logits.

    Raises:
      DataError: an argument cannot be used, the labels are targets, or a class has too few examples for folds.

    Source: Cox, J. R. Stat. Soc. B 20 (1958); Liu and Nocedal, Mathematical Programming 45 (1989).

    >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
    >>> readout = logistic(x, np.array([0, 0, 1, 1]), strengths=0.1)
    >>> readout.predict(readout.params, x).argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    instead = "For targets write ridge() or gaussian_process()."
    takes = (CLASSES, LABELS)
    training = as_training(features, labels, weights, num_classes, name="logistic", takes=takes, instead=instead)
    softmax = training.targets.kind == CLASSES
    count = training.targets.matrix.shape[1]
    return fit_linear(
        training,
        as_strengths(strengths),
        "Logistic regression",
        loss=softmax_loss if softmax else sigmoid_loss,
        curvature=(1e-4, 1 / count if softmax else 0.25),
        free_bias=True,
        standardise=standardise,
        folds=folds,
        seed=seed,
        tolerance=tolerance,
        iterations=iterations,
    )


def fit_linear(
    training: Training,
    strengths: np.ndarray,
    title: str,
    *,
    loss: Callable[[Any, Any], Any],
    folds: int,
    seed: int,
    standardise: bool,
    **solver: Any,
) -> Readout:
    """The linear read-out of the strength whose loss on left-out folds is least."""
    table, targets, counts = training
    solver = {"loss": loss, "standardise": standardise, **solver}
    rows: Sequence[Sequence[Any]] = [(float(strength),) for strength in strengths]
    columns, chosen, how = ("strength",), 0, "the only one"
    if len(strengths) > 1:
        numbers = fold_numbers(targets, folds, seed)
        outputs = np.empty((len(strengths), *targets.matrix.shape))
        for fold in range(folds):
            left = numbers == fold
            found = _fit(table, targets, np.where(left, 0.0, counts), strengths, **solver)
            outputs[:, left] = _outputs(table[left], *found[:2], found[2])
        losses = [float(np.average(np.asarray(loss(scores, targets.matrix)), weights=counts)) for scores in outputs]
        qualities = [quality(targets, outputs[number], counts) for number in range(len(strengths))]
        rows = list(zip(strengths.tolist(), losses, qualities))
        columns, chosen = ("strength", "left-out loss", "left-out accuracy"), int(np.argmin(losses))
        how = f"{folds} stratified folds, seed {seed}"
    shift, scale, path = _fit(table, targets, counts, strengths[[chosen]], **solver)
    facts = {
        "examples": len(table),
        "iterations": int(path.iterations[0]),
        "gradient norm": float(path.gradients[0]),
        "converged": bool(path.gradients[0] <= solver["tolerance"]),
    }
    report = path_report(title, columns, rows, chosen, how, **facts)
    return Readout(linear, linear_params(targets, shift, scale, path.kernels[0], path.biases[0]), report)


def _fit(
    table: np.ndarray, targets: Targets, counts: np.ndarray, strengths: np.ndarray, standardise: bool, **solver: Any
) -> tuple[np.ndarray, np.ndarray, LinearPath]:
    """Standardisation and linear models from the examples that weigh something."""
    there = counts > 0
    free = solver["free_bias"]
    shift, scale = standardisation(table[there], counts[there], standardise, centre=free)
    x = (table - shift) * scale
    # A free bias takes up what centring changes.
    centre = np.average(x, axis=0, weights=counts) if free else np.zeros(x.shape[1])
    path = linear_path(x - centre, targets.matrix, counts, strengths, **solver)
    return shift, scale, path._replace(biases=path.biases - centre @ path.kernels)


def _outputs(table: np.ndarray, shift: np.ndarray, scale: np.ndarray, path: LinearPath) -> np.ndarray:
    return ((table - shift) * scale) @ path.kernels + path.biases[:, None]
