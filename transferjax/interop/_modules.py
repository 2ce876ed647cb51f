"""Which modules a Model has."""

from __future__ import annotations

from typing import Any

import jax

from transferjax._types import Model
from transferjax.interop._extend import strip
from transferjax.interop._forward import Hooks, forward_of, owner
from transferjax.tree import natural, paths


def module_paths(model: Model, inputs: Any = None) -> dict[str, tuple[str, ...]]:
    """The modules of a Model and the leaves that each of them owns.

    Args:
      model: a Model of this library.
      inputs: arrays or ``jax.ShapeDtypeStruct``; a Linen module or plain function shows modules without
        weights (dropout) only when it is traced with inputs. Nothing is computed.

    Returns:
      ``{module path: paths of its own params and extra}`` in natural order; the root is ``""``.

    >>> from transferjax.interop import mark, pure
    >>> module_paths(pure(lambda params, x: mark("body", x * params["body"]["scale"]), {"body": {"scale": 2.0}}))
    {'': (), 'body': ('body/scale',)}
    """
    forward = forward_of(model, "module_paths")
    leaves = [*paths(strip(model.params)), *paths(model.extra)]
    known = forward.modules()
    if known is None and inputs is not None:
        found: list[str] = []

        def trace(params, extra, given):
            found.extend(forward(params, extra, given, Hooks()).modules)

        jax.eval_shape(trace, model.params, model.extra, inputs)
        known = tuple(found)
    if known is None:
        parts = {leaf.rpartition("/")[0] for leaf in leaves}
        known = ("", *("/".join(p.split("/")[:depth]) for p in parts for depth in range(1, p.count("/") + 2) if p))
    owned: dict[str, list[str]] = {path: [] for path in sorted(set(known), key=natural)}
    for leaf in leaves:
        owned[owner(leaf, owned)].append(leaf)
    return {path: tuple(names) for path, names in owned.items()}
