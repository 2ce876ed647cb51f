"""A teacher from what the command line names: a run, a model of the zoo, or ``module:function``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

import transferjax as tj
from transferjax._errors import nearest_hint
from transferjax.cli._model import load_model
from transferjax.cli._recipe import moved, restored


def teacher_of(config: Mapping[str, Any], images: Any) -> tj.Model:
    """The teacher of a config, as a Model that takes images as they are stored.

    Args:
      config: with ``teacher`` and ``teacher_weights``; and ``num_classes`` and ``class_names`` of the data.
      images: shape and dtype of a batch of the data.

    Raises:
      TransferError: there is no such teacher, or it does not know the classes of the data.
    """
    name = config["teacher"]
    if os.path.isfile(os.path.join(name, "config.json")):
        model = _of_a_run(config)
    elif ":" in name or name in tj.models.names():
        model = _of_the_zoo(config)
    else:
        hint = nearest_hint(name, tj.models.names())
        raise tj.TransferError(
            f"there is no teacher '{name}': neither a run directory nor a model of the zoo.{hint} "
            "Expected a directory that `transferjax finetune` made, a model of the zoo, or module:function."
        )
    _check_outputs(model, config, images)
    return model


def _of_a_run(config: Mapping[str, Any]) -> tj.Model:
    """The network of a run after its last step, adapters merged."""
    weights = config["teacher_weights"]
    run = moved(tj.io.Run.open(config["teacher"]), None if weights == "auto" else weights, "raise")
    names, own = run.config["class_names"], config["class_names"]
    if names and own and names != own:
        raise tj.DataError(
            f"the teacher knows other classes ({', '.join(names[:5])}) than {config['data']} has "
            f"({', '.join(own[:5])}). Expected the same ones in the same order."
        )
    recipe, state, frozen = restored(run)
    return recipe.model._replace(params=recipe.tuning.merge(state.trainable, frozen), extra=state.extra)


def _of_the_zoo(config: Mapping[str, Any]) -> tj.Model:
    """A network with weights that know the classes of the data."""
    name, weights, classes = config["teacher"], config["teacher_weights"], config["num_classes"]
    if ":" not in name and weights == "none":
        raise tj.TransferError(f"{name} without weights has nothing to teach. Give --teacher-weights PATH.")
    model, plan = load_model(name, weights, num_classes=classes, class_names=config["class_names"])
    if plan is not None and plan.counts()["fresh"]:
        raise tj.TransferError(
            f"the weights of {name} have no outputs for the {classes} classes of {config['data']}, so that it has "
            "nothing to teach. Fine-tune it to them first, and give the directory of that run as --teacher."
        )
    return model if model.preprocess is None else tj.data.on_images(model)


def _check_outputs(model: tj.Model, config: Mapping[str, Any], images: Any) -> None:
    """Raises unless the teacher gives one logit per class of the data."""
    try:
        outputs = jax.eval_shape(lambda *given: model.apply(*given)[0], model.params, model.extra, images)
    except (TypeError, ValueError) as error:
        cause = str(error).splitlines()[0].rstrip(".")
        raise tj.DataError(
            f"the teacher cannot take images of {images.shape[1:]}: {cause}. Expected a network for these, or one with "
            "a preprocess, which brings them to its size."
        ) from error
    if getattr(outputs, "shape", None) != (1, config["num_classes"]):
        raise tj.DataError(
            f"the teacher gives {getattr(outputs, 'shape', type(outputs).__name__)} for one image, and "
            f"{config['data']} has {config['num_classes']} classes. Expected (1, {config['num_classes']}): one logit "
            "per class."
        )
