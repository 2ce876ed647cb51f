"""A model from what the command line names: one of the zoo, or ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import transferjax as tj
from transferjax.tree import as_selector


def load_model(
    name: str,
    weights: str,
    *,
    num_classes: int | None = None,
    seed: int = 0,
    size: int | None = None,
    class_names: Sequence[str] = (),
) -> tuple[tj.Model, Any]:
    """A model with its weights, and the plan that moved them (``None`` when the function brought its own).

    Args:
      name: of the zoo, or ``module:function``; the function gets those of ``num_classes``, ``key``, ``image_size`` and
        ``class_names`` that it has parameters for.
      weights: a path; ``"auto"``: the installed package for a model of the zoo, nothing for a function; ``"none"``:
        fresh weights.
      num_classes: outputs.
      seed: of what is fresh.
      size: pixels of a side.
      class_names: one per output.
    """
    import jax

    options = {
        "num_classes": num_classes,
        "key": jax.random.key(seed),
        "image_size": size,
        "class_names": tuple(class_names),
    }
    if ":" not in name and weights == "none":
        return tj.models.create(name, **options), None
    if ":" not in name:
        return tj.models.load(name, weights=None if weights == "auto" else weights, **options)
    model = call_function(name, options)
    if weights in ("auto", "none"):
        return model, None
    source = tj.io.open(weights)
    plan = tj.surgery.plan(source.shapes, model)
    return tj.io.restore(source, plan, model), plan


def stage_order(name: str, model: tj.Model, example: Callable[[], Any]) -> Sequence[Any]:
    """The stages of a model from input to output.

    Args:
      example: gives one batch of inputs; called for models outside the zoo.
    """
    return tj.stages(model, example()) if ":" in name else tj.models.stages(name)


def last_layer(model: tj.Model, order: Callable[[], Sequence[Any]]) -> Any:
    """The last layer: ``head/fc`` where there is one, else the module with parameters that the model uses last."""
    from transferjax.cli._tuning import HEAD

    named = any(path.startswith(HEAD.removesuffix("**")) for path in tj.paths(model.params))
    return HEAD if named else order()[-1]


def adapted(model: tj.Model, head: Callable[[], Any]) -> Any:
    """Which kernels are adapted when a tuning does not say: the expanding convolutions, or all but the head's."""
    from transferjax.cli._tuning import ADAPTED

    if any(as_selector(ADAPTED)(path, leaf) for path, leaf in tj.paths(model.params).items()):
        return ADAPTED
    return tj.where(lambda path, leaf: leaf.ndim in (2, 4), "kernels") & tj.glob("**/kernel") & ~as_selector(head())


def call_function(name: str, options: dict[str, Any]) -> tj.Model:
    """What ``module:function`` returns, given those of the options that it has parameters for."""
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise tj.TransferError(
            f"'{name}' cannot be imported: {error}. Expected module:function, importable from this directory."
        ) from None
    parameters = inspect.signature(function).parameters
    needed = {name for name, one in parameters.items() if one.default is inspect.Parameter.empty}
    given = {k: v for k, v in options.items() if k in parameters and (v is not None or k in needed)}
    model = function(**given)
    if not isinstance(model, tj.Model):
        raise tj.TransferError(
            f"{name} returned {type(model).__name__}; expected a transferjax.Model, for example from "
            "transferjax.interop.nnx(module)."
        )
    return model
