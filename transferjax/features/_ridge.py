"""Ridge regression as a read-out."""

from __future__ import annotations

from typing import Any

import numpy as np

from transferjax.features._readout import Readout
from transferjax.features._targets import (
    as_strengths,
    as_training,
    linear,
    linear_params,
    path_report,
    quality,
    quality_name,
    standardisation,
)
from transferjax.numerics._ridge import decompose_ridge, left_out_ridge, solve_ridge

STRENGTHS = tuple(10.0**power for power in range(-3, 6))


def ridge(
    features: Any,
    labels: Any,
    *,
    strengths: Any = STRENGTHS,
    weights: Any = None,
    num_classes: int | None = None,
    standardise: bool = True,
) -> Readout:
    """Ridge regression, on 1 and -1 for classes and labels, its strength chosen by exact leave-one-out.

    It minimises ``sum(weights * (y - x @ kernel - bias)**2) + strength * sum(kernel**2)`` in closed form, in float64,
    for all strengths from one eigendecomposition: of ``[d, d]``, or of ``[N, N]`` when ``d > N``. The strength with
    the least squared error on left-out examples is taken; the standardisation is that of all examples.

    Args:
      features: ``[N, d]``.
      labels: classes, integers ``[N]``; several labels, booleans or zeros and ones ``[N, K]``; targets, floats
        ``[N]`` or ``[N, K]``.
      strengths: positive numbers ``[S]``, or one.
      weights: ``[N]``, how often each example counts; ``None``: once.
      num_classes: columns of the outputs for classes; ``None``: the largest label plus one.
      standardise: give every column mean 0 and variance 1 first.

    Returns:
      A :class:`Readout`; its report has the leave-one-out error of every strength.

    Raises:
      DataError: features, labels, weights or strengths cannot be used.

    Source: Hoerl and Kennard, Technometrics 12 (1970); leave-one-out: Allen, Technometrics 16 (1974).

    >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
    >>> readout = ridge(x, np.array([0, 0, 1, 1]), strengths=[0.1, 1.0])
    >>> readout.predict(readout.params, x).argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    table, targets, counts = as_training(features, labels, weights, num_classes, name="ridge")
    path = as_strengths(strengths)
    shift, scale = standardisation(table, counts, standardise)
    open_ridge = decompose_ridge((table - shift) * scale, targets.signs, counts)
    rows = []
    for strength, outputs in zip(path, left_out_ridge(open_ridge, path)):
        error = float(np.average(((targets.signs - outputs) ** 2).mean(axis=1), weights=counts))
        rows.append((float(strength), error, quality(targets, outputs, counts)))
    chosen = int(np.argmin([row[1] for row in rows]))
    kernel, bias = solve_ridge(open_ridge, path[chosen])
    columns = ("strength", "left-out squared error", f"left-out {quality_name(targets)}")
    report = path_report("Ridge regression", columns, rows, chosen, "exact leave-one-out", examples=len(table))
    return Readout(linear, linear_params(targets, shift, scale, kernel, bias), report)
