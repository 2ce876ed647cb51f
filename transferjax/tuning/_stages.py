"""The modules of a model from input to output, read from its forward pass."""

from __future__ import annotations

import re
from typing import Any

import jax

from transferjax._errors import SelectionError, describe
from transferjax._types import Model
from transferjax.program import order_of_use
from transferjax.tree import Selector, flatten, glob, natural, regex


def stages(model: Model, inputs: Any) -> list[Selector]:
    """One selector per module that owns parameters, in the order in which the forward pass uses them.

    A parameter is used where it first meets the data; casts, transposes and merged adapters before that do not count.
    A module comes where the first of its parameters is used. Modules that the forward pass never uses come first, so
    that ``last`` takes them last of all.

    Args:
      model: a ``Model``; only the shapes of its parameters are used.
      inputs: one batch of inputs as ``model.apply`` takes them; arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      Selectors over model paths. Together they match every parameter once; each matches the leaves directly below one
      module path, for example ``'blocks/0/conv/*'``.

    Raises:
      SelectionError: the first argument is no Model, or the inputs hold no array.

    >>> import jax, jax.numpy as jnp, transferjax as tj
    >>> def apply(params, extra, inputs, *, key=None, train=False):
    ...     return inputs @ params["stem"]["kernel"] @ params["head"]["kernel"] + params["head"]["bias"], extra
    >>> params = {"head": {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}, "stem": {"kernel": jnp.ones((2, 4))}}
    >>> stages(tj.Model(apply, None, params, {}), jnp.ones((1, 2)))
    ['stem/*', 'head/*']
    """
    if not isinstance(model, Model):
        name = f"'{model}'" if isinstance(model, str) else "name"
        raise SelectionError(
            f"stages() expects a Model, got {describe(model)}. For a network by name use tj.models.stages({name})."
        )
    if not jax.tree.leaves(inputs):
        raise SelectionError("stages() expects inputs with at least one array, as model.apply takes them; got none.")
    flat, _ = flatten(model.params)
    names = [path for path, _ in flat]
    forward = lambda params, extra, inputs: model.apply(params, extra, inputs, key=None, train=False)[0]
    jaxpr = jax.make_jaxpr(forward)(model.params, model.extra, inputs)
    total = len(jaxpr.in_avals)
    used = order_of_use(jaxpr, data=range(total - len(jax.tree.leaves(inputs)), total))
    in_order = [names[number] for number in used if number < len(names)]
    modules = dict.fromkeys(path.rpartition("/")[0] for path in in_order)
    unused = dict.fromkeys(path.rpartition("/")[0] for path in sorted(names, key=natural))
    return [_owned_by(module) for module in (*(m for m in unused if m not in modules), *modules)]


def _owned_by(module: str) -> Selector:
    """The leaves directly below a module path."""
    if re.search(r"[*?\[\]{}]", module):
        return regex(re.escape(module) + "/[^/]*")
    return glob(f"{module}/*" if module else "*")
