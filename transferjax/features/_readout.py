"""What every read-out returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from transferjax._report import Report


class Readout(NamedTuple):
    """A small model on top of features, fitted exactly.

    Attributes:
      predict: ``(params, features [N, d]) -> outputs``, pure, and fit for ``jax.jit``. ``[N, C]`` for classes, the
        largest is the prediction, column c is class c; ``[N, K]`` for several yes-or-no labels (positive is yes) and
        for targets ``[N, K]``; ``[N]`` for targets ``[N]``.
      params: a dict of arrays, standardisation included.
      report: what was tried and what was chosen: one row per strength (or number of neighbours, and so on), the
        choice and how it was made in the metadata.

    >>> import jax.numpy as jnp
    >>> readout = Readout(lambda params, x: x @ params["kernel"], {"kernel": jnp.eye(2)}, Report("none", (), ()))
    >>> readout.predict(readout.params, jnp.ones((1, 2))).tolist()
    [[1.0, 1.0]]
    """

    predict: Callable[[Any, Any], Any]
    params: Any
    report: Report
