"""The laws of a score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from transferjax._errors import LawError, describe
from transferjax.testing._compare import broken

Score = Callable[[Any, Any], float]


def check_score(
    score: Score,
    features: Any,
    labels: Any,
    *,
    rotation: bool = False,
    renaming: bool = True,
    rtol: float = 1e-6,
    atol: float = 1e-8,
) -> None:
    """The laws of a score: what makes the numbers of two sources comparable.

    Args:
      score: ``(features, labels) -> float``, higher is better.
      features: numbers ``[N, d]``, or whatever the score takes in their place, one row per example.
      labels: ``[N]``, the classes of the same examples.
      rotation: whether the score may not change when the features are rotated.
      renaming: whether labels are names of classes. Turn it off where they are numbers.
      rtol: relative tolerance of equal scores.
      atol: absolute tolerance of equal scores.

    Raises:
      LawError: a law is broken: it returns a finite Python float; it leaves its arguments as they were; equal calls
        give equal values; neither the order of the examples nor the names of the classes matter; and, with
        ``rotation``, nor does a rotation of the features.

    >>> from transferjax.scores import logme
    >>> check_score(logme, [[1.0, 0.1], [2.0, 0.3], [4.0, 0.2], [3.0, 0.0]], [5, 5, 2, 2], rotation=True)
    """
    table, names = np.array(features), np.array(labels)
    kept = table.copy(), names.copy()
    rng = np.random.default_rng(0)
    found = _value(score, table, names)
    if not (np.array_equal(table, kept[0]) and np.array_equal(names, kept[1])):
        broken("a score leaves its arguments as they were", "the features or labels changed during the call.")
    again = _value(score, kept[0].copy(), kept[1].copy())
    if again != found:
        broken("equal calls give equal scores", f"got {found!r}, then {again!r}. Draw from a key or seed, not at will.")
    close = lambda law, a, b: _require_close(law, found, _value(score, a, b), rtol, atol)
    order = rng.permutation(len(table))
    close("the order of the examples does not matter", kept[0][order], kept[1][order])
    if renaming:
        values, codes = np.unique(kept[1], return_inverse=True)
        fresh = 3 * rng.permutation(len(values)) - len(values)  # gaps, negative numbers, another order
        close("the names of the classes do not matter", kept[0].copy(), fresh[codes.reshape(-1)])
    if rotation:
        basis = np.linalg.qr(rng.standard_normal((table.shape[1],) * 2))[0]
        close("a rotation of the features does not matter", kept[0].astype(np.float64) @ basis, kept[1].copy())


def _value(score: Score, features: Any, labels: Any) -> float:
    law = "a score returns a finite Python float"
    found = score(features, labels)
    if type(found) is not float:
        broken(law, f"got {describe(found)}. Write float(...).")
    if not np.isfinite(found):
        broken(law, f"got {found}.")
    return found


def _require_close(law: str, expected: float, found: float, rtol: float, atol: float) -> None:
    if abs(found - expected) > atol + rtol * abs(expected):
        raise LawError(
            f"the law '{law}' is broken: expected {expected!r}, got {found!r}, apart by {abs(found - expected):.3g} "
            f"(allowed {atol + rtol * abs(expected):.3g})."
        )
