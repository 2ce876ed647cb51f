"""The few places where jaxprs are looked at by names that JAX does not promise to keep."""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core as jex

# Effects that order nothing and keep nothing alive: the axis names of `shard_map`, and reads.
_HARMLESS = ("NamedAxisEffect", "ReadEffect")
_GPU = ("gpu", "cuda", "rocm")


def has_effects(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation must run even when nobody uses its results (callbacks, prints, writes)."""
    return any(type(effect).__name__ not in _HARMLESS for effect in eqn.effects)


def open_jaxpr(value: Any) -> jex.Jaxpr:
    """The ``Jaxpr`` inside a ``ClosedJaxpr``, or the one that is given."""
    return value.jaxpr if isinstance(value, jex.ClosedJaxpr) else value


def bodies(eqn: jex.JaxprEqn) -> list[jex.Jaxpr]:
    """Every jaxpr among the parameters of an equation, in the order of their names."""
    found: list[jex.Jaxpr] = []
    for name in sorted(eqn.params):
        leaves = jax.tree.leaves(eqn.params[name], is_leaf=_is_jaxpr)
        found.extend(open_jaxpr(leaf) for leaf in leaves if _is_jaxpr(leaf))
    return found


def platform_branch(eqn: jex.JaxprEqn, platform: str | None) -> int | None:
    """Which branch of ``jax.lax.platform_dependent`` runs on ``platform``; ``None`` for any other equation."""
    table = eqn.params.get("branches_platforms")
    if not table or platform is None:
        return None
    names = _GPU if platform in ("gpu",) else (platform, "gpu") if platform in _GPU else (platform,)
    for number, accepted in enumerate(table):
        if accepted is None or any(name in accepted for name in names):
            return number
    return None


def called(eqn: jex.JaxprEqn) -> tuple[jex.ClosedJaxpr, int] | None:
    """The body of a ``jit`` or ``closed_call`` equation and 0; ``None`` where opening it would lose something.

    That is so for every other primitive, and for a ``jit`` that says where its arrays lie.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "closed_call":
        return params["call_jaxpr"], 0
    if name not in ("jit", "pjit"):
        return None
    unspecified = lambda shardings: all(type(one).__name__ == "UnspecifiedValue" for one in shardings)
    placed = not (unspecified(params["in_shardings"]) and unspecified(params["out_shardings"]))
    return None if placed else (params["jaxpr"], 0)


def call_name(eqn: jex.JaxprEqn) -> str:
    """The name of the function that a ``jit`` equation calls; ``""`` where there is none."""
    name = eqn.params.get("name")
    return name if isinstance(name, str) else ""


def devices_of(eqn: jex.JaxprEqn) -> int:
    """How many times the body of a ``shard_map`` equation runs: once for every device of its mesh."""
    return int(getattr(eqn.params.get("mesh"), "size", 1)) if eqn.primitive.name == "shard_map" else 1


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr))
