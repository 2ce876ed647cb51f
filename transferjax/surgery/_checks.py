"""What is given to surgery, or returned by rules of one's own, checked where it comes in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import PlanError, describe
from transferjax.surgery._ops import Op, Spec, check_op
from transferjax.surgery._resize import whole
from transferjax.surgery._rules import Lead, Naming, Rule, Transform


def listed(rules: Any, taker: str) -> list[Rule]:
    """Rules as a list.

    Raises:
      PlanError: they are a single rule or no iterable, or one of them is no rule.
    """
    if isinstance(rules, Rule):
        raise PlanError(f"{taker} takes several rules, and {rules!r} is one. Write ({rules!r},), a tuple.")
    if isinstance(rules, (str, bytes)) or not isinstance(rules, Iterable):
        raise PlanError(f"{taker} takes a tuple of rules; {describe(rules)} came. Write (rename(...), fresh(...)).")
    found = list(rules)
    for number, rule in enumerate(found):
        if not isinstance(rule, Rule):
            raise PlanError(f"rule {number} given to {taker} is {describe(rule)}; expected one such as fresh(...).")
    return found


def led(rule: Naming, name: str, came: Spec) -> tuple[Lead, ...] | None:
    """What ``rule.leads`` returns, its operations in their plain form.

    Raises:
      PlanError: it is neither ``None`` nor a tuple of Leads, or an operation in it is malformed.
    """
    found = rule.leads(name, came)
    if found is None:
        return None
    if not isinstance(found, (tuple, list)) or not all(map(_is_lead, found)):
        raise PlanError(
            f"{rule!r} leads '{name}' to {found!r}; expected a tuple of surgery.Lead(target path, ...), or None for a "
            "name that the rule is not for."
        )
    if all(lead.cut is lead.join is None for lead in found):
        return tuple(found)
    return tuple(lead._replace(cut=_plain(rule, lead.cut), join=_plain(rule, lead.join)) for lead in found)


def op_of(rule: Transform, came: Spec, expected: Spec) -> Op | None:
    """What ``rule.op_for`` returns, in its plain form.

    Raises:
      PlanError: it is neither ``None`` nor an operation.
    """
    return _plain(rule, rule.op_for(came, expected))


def check_key(key: Any) -> None:
    """Raises a PlanError unless ``key`` is ``None`` or a PRNG key, new or old in style."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    new = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if key is not None and not new and not (dtype == np.uint32 and shape == (2,)):
        raise PlanError(f"key is {describe(key)}; expected a PRNG key, jax.random.key(0), or None.")


def check_tolerance(tolerance: Any) -> None:
    """Raises a PlanError unless ``tolerance`` is a number of at least 0."""
    number = isinstance(tolerance, (int, float, np.number)) and not isinstance(tolerance, bool)
    if not number or math.isnan(tolerance) or tolerance < 0:
        raise PlanError(f"tolerance is {tolerance!r}; expected a number of at least 0, such as 1e-4.")


def check_layers(layers: Any, what: str) -> list[Any]:
    """Numbers of layers as a list.

    Raises:
      PlanError: they are a single number, or no list of them.
    """
    if whole(layers):
        raise PlanError(f"{what} is the number {layers}; expected a list of layers. Write [{layers}].")
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise PlanError(f"{what} is {layers!r}; expected a list of layers, such as [0, 2].")
    return list(layers)


def _is_lead(found: Any) -> bool:
    return isinstance(found, Lead) and isinstance(found.target, str) and whole(found.order)


def _plain(rule: Rule, op: Any) -> Op | None:
    try:
        return None if op is None else check_op(op)
    except PlanError as error:
        raise PlanError(f"{rule!r} makes no operation that is known here: {error}") from None
