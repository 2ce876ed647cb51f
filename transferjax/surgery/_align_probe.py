"""Candidate plans told apart by what their target computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import PlanError, listing
from transferjax._types import Model
from transferjax.surgery._plan import Plan
from transferjax.surgery._trees import assemble, leaves

AGREES = 1e-3
"""Relative error below which outputs are the same."""


class Probe:
    """The original network's outputs for a batch of inputs, to be compared with those of a target.

    Args:
      source: the network, ``inputs -> outputs``.
      inputs: a batch.
      read: its arrays, ``name -> array`` or a mapping.
      target: a Model.

    Raises:
      PlanError: ``inputs`` or ``read`` is missing, or the target is no Model.
    """

    def __init__(
        self,
        source: Callable[[Any], Any],
        inputs: Any,
        read: Callable[[str], Any] | Mapping[str, Any] | None,
        target: Any,
    ):
        if read is None or inputs is None or not isinstance(target, Model):
            raise PlanError(
                "align() compares outputs with all of source, probe, read and a Model as target; it got "
                f"{'a Model' if isinstance(target, Model) else type(target).__name__} as target, "
                f"{'no probe' if inputs is None else 'a probe'} and {'no read' if read is None else 'read'}."
            )
        self._read, self._inputs, self._target = read, inputs, target
        self._wanted = _arrays(source(inputs))
        self._apply = jax.jit(lambda params, extra, batch: target.apply(params, extra, batch)[0])

    def error(self, plan: Plan) -> float:
        """The largest difference of outputs under a plan, relative to the largest output; infinite if shapes differ.

        Raises:
          PlanError: the plan leaves leaves of the target fresh.
        """
        fresh = [move.target for move in plan.moves if move.source is None]
        if fresh:
            raise PlanError(
                "align() cannot compare the outputs of source with those of a target of which leaves are fresh: "
                f"{listing([repr(path) for path in fresh])}. Leave their layer out of the target (num_classes=0 in "
                "the zoo) and let source return what goes into it; its rules are fresh(...) beside the others."
            )
        arrays = jax.tree.map(jnp.asarray, plan.apply(self._read, leaves(self._target)))
        filled = assemble(self._target, arrays)
        return _error(self._wanted, _arrays(self._apply(filled.params, filled.extra, self._inputs)))


def disagreeing(errors: Sequence[float]) -> PlanError:
    """The error for outputs to which not exactly one of the candidates agrees."""
    agreeing = sum(error <= AGREES for error in errors)
    return PlanError(
        f"align() tried {len(errors)} candidate plans on the probe, and {agreeing or 'none'} of them gave the outputs "
        f"of source to {AGREES:g} relative; expected exactly one. The smallest errors are "
        f"{', '.join(f'{error:.1e}' for error in sorted(errors)[:3])}. "
        "Check that source and target see the same inputs in inference mode, probe with several examples, "
        "or pass the pairs that you know in rules=(rename(...),)."
    )


def _arrays(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(outputs)]


def _error(wanted: Sequence[np.ndarray], came: Sequence[np.ndarray]) -> float:
    if [a.shape for a in wanted] != [b.shape for b in came]:
        return float("inf")
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(wanted, came, strict=True)]
    errors = [np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-30) for a, b in pairs if a.size]
    return float(np.max(errors)) if errors and np.all(np.isfinite(errors)) else float("inf")
