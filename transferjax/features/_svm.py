"""The linear support vector machine as a read-out."""

from __future__ import annotations

from typing import Any

from transferjax.features._logistic import fit_linear
from transferjax.features._readout import Readout
from transferjax.features._targets import CLASSES, LABELS, as_strengths, as_training
from transferjax.numerics._lbfgs import squared_hinge_loss

STRENGTHS = tuple(10.0**power for power in range(-1, 6))


def svm(
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
    """A linear support vector machine with squared hinge loss, one against the rest, all strengths in one program.

    For each column it minimises ``sum(weights * max(0, 1 - sign * output)**2) + .5 * strength * (sum(kernel**2) +
    bias**2)`` in float64: scikit-learn's ``LinearSVC(loss="squared_hinge", dual=False)`` with ``C = 1 / strength``,
    whose bias is penalised too. The strength with the least loss on left-out folds is taken.

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
      A :class:`Readout`.

    Raises:
      DataError: an argument cannot be used, the labels are targets, or a class has too few examples for folds.

    Source: Fan et al., LIBLINEAR, JMLR 9 (2008).

    >>> import numpy as np
    >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
    >>> readout = svm(x, np.array([0, 0, 1, 1]), strengths=0.1)
    >>> readout.predict(readout.params, x).argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    instead = "For targets write ridge(), gaussian_process() or knn()."
    takes = (CLASSES, LABELS)
    training = as_training(features, labels, weights, num_classes, name="svm", takes=takes, instead=instead)
    return fit_linear(
        training,
        as_strengths(strengths),
        "Linear support vector machine",
        loss=squared_hinge_loss,
        curvature=(0.1, 1.0),
        free_bias=False,
        standardise=standardise,
        folds=folds,
        seed=seed,
        tolerance=tolerance,
        iterations=iterations,
    )
