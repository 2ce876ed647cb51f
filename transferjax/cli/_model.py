"""A model from what the command line names: one of the zoo, or ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
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


def call_function(name: str, options: dict[str, Any], needed: Sequence[str] = ()) -> tj.Model:
    """What ``module:function`` returns, given those of the options that it has parameters for.

    Args:
      name: ``module:function``.
      options: by the names of parameters; ``None`` leaves the function its default.
      needed: options that must not go unused where they are given.
    """
    function = _imported(name)
    parameters = {k: v for k, v in _parameters(function).items() if v.kind is not inspect.Parameter.VAR_POSITIONAL}
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    unused = [k for k in needed if options[k] is not None and k not in parameters and not open_ended]
    if unused:
        raise tj.TransferError(
            f"--{unused[0].replace('_', '-')} would do nothing: {name} has no parameter {unused[0]}. Add it to the "
            "function, or leave the option out."
        )
    must = {k for k, v in parameters.items() if v.default is v.empty and v.kind is not v.VAR_KEYWORD}
    lacking = sorted(must - set(options))
    if lacking:
        raise tj.TransferError(
            f"{name} needs the parameter {lacking[0]}, which is not given here. Expected defaults for all but "
            f"{', '.join(options)}."
        )
    given = {k: v for k, v in options.items() if k in parameters and (v is not None or k in must)}
    given |= {k: options[k] for k in needed if open_ended and options[k] is not None}
    try:
        model = function(**given)
    except tj.TransferError:
        raise
    except Exception as error:
        hint = " Give --num-classes N." if "num_classes" in needed and given.get("num_classes", 0) is None else ""
        raise tj.TransferError(f"{name} raised {_told(error)}. Expected a transferjax.Model.{hint}") from error
    if not isinstance(model, tj.Model):
        raise tj.TransferError(
            f"{name} returned {type(model).__name__}; expected a transferjax.Model, for example from "
            "transferjax.interop.nnx(module)."
        )
    return model


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise tj.TransferError(
            f"'{name}' cannot be imported: {error}. Expected module:function, importable from this directory."
        ) from None
    except Exception as error:
        raise tj.TransferError(f"the module of '{name}' raised {_told(error)}. Expected one that imports.") from error
    if not callable(function):
        raise tj.TransferError(
            f"'{name}' is {type(function).__name__}, not a function. Expected one that returns a transferjax.Model."
        )
    return function


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # some that are written in C tell nothing
        return {}


def _told(error: Exception) -> str:
    """The kind of an error, the first line of its text, and where in the user's code it arose."""
    ours = (__file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours and f.filename[:1] != "<"]
    place = f" ({os.path.basename(frames[0].filename)}, line {frames[0].lineno})" if frames else ""
    text = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return f"{type(error).__name__}{': ' + text if text else ''}{place}"
