"""Everything that a run's config says, made: model, data, tuning, optimizer, objective, first state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import transferjax as tj
from transferjax.cli._hoisting import Running, running
from transferjax.cli._model import adapted, last_layer, load_model, stage_order
from transferjax.cli._tuning import learning_rates, make_optimizer, make_tuning, parse_tuning

CROP_PADDING = 4


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config describes.

    Attributes:
      config: the settings.
      model: takes raw images.
      plan: where its weights came from, or ``None``.
      base: the fingerprint of its weights before fine-tuning.
      tuning: what learns.
      class_names: of the outputs.
      quantised: the frozen matrices that are kept in few bits, or ``None``.
      verb: of the command line.
      done: what its report calls that.
      kept: the folder, in the run's directory, of what is computed once and removed in the end.
    """

    verb: ClassVar[str] = "finetune"
    done: ClassVar[str] = "Fine-tuned"
    kept: ClassVar[str] = "residuals"
    config: Mapping[str, Any]
    model: tj.Model
    plan: Any
    base: str
    tuning: tj.Tuning
    class_names: tuple[str, ...]
    quantised: Any = None

    def start(self, tx: Any) -> tuple[Any, Any]:
        """The first state and the frozen weights."""
        import jax

        return tj.init(jax.random.key(self.config["seed"]), self.model, self.tuning, tx)

    def rates(self) -> dict[str, float]:
        """The learning rate of every group."""
        groups = [part.kind for part in parse_tuning(self.config["tuning"])]
        return learning_rates(self.config["learning_rate"], groups)

    def optimizer(self, steps: int, rates: Mapping[str, Any] | None = None) -> Any:
        """The optax transform for a run of so many steps; with these learning rates, where they are given."""
        return make_optimizer(self.config["optimizer"], rates or self.rates(), steps, self.config["warmup"])

    def quantisation(self) -> dict[str, Any]:
        """What keeping the frozen matrices in few bits saves and costs; empty where they are kept as they are."""
        kind = self.config["quantise"]
        if not kind:
            return {}
        table = tj.tuning.quantisation_error(self.model.params, self.quantised, kind)
        worst = max(table.rows, key=lambda row: row[1])
        size = f"{kind}: {len(table.rows)} frozen matrices in {table.metadata['ratio']:.1%} of their bytes"
        return {"quantised": f"{size}; largest relative error {worst[1]:.2g} ({worst[0]})"}

    def objective(self) -> Any:
        """Cross-entropy, with the augmentations in front of the preprocessing."""
        plain = tj.objectives.cross_entropy(self.model.apply, label_smoothing=self.config["label_smoothing"])
        functions = self.augmentations()
        return tj.objectives.augment(plain, *functions) if functions else plain

    def augmentations(self) -> list[Any]:
        """The augmentations of the images, in order."""
        classes = self.config["num_classes"]
        make = {
            "flip": tj.data.random_flip,
            "crop": lambda: tj.data.random_crop(CROP_PADDING),
            "resized-crop": tj.data.random_resized_crop,
            "mixup": lambda: tj.data.mixup(num_classes=classes),
            "cutmix": lambda: tj.data.cutmix(num_classes=classes),
        }
        return [make[name]() for name in self.config["augment"].split(",") if name]

    def running(self, step: Any, state: Any, frozen: Any, batches: Any, folder: Any) -> Running:
        """What the loop runs: the step, or what is left of it where something is computed once."""
        return running(step, state, frozen, batches, wanted=self.config["hoist"], folder=folder)

    def rows(self, state: Any, frozen: Any) -> list[tuple[str, Any]]:
        """Further rows of the report."""
        return []

    def facts(self) -> dict[str, Any]:
        """Further facts of the report."""
        return self.quantisation()

    def batches(self, source: Any, *, train: bool, preprocess: Any = None) -> Any:
        """Batches of the model's size: shuffled for training, in order and complete for evaluation.

        Args:
          preprocess: another network's, whose size the images should have.
        """
        config = self.config
        return tj.data.batches(
            source,
            config["batch_size"],
            seed=config["seed"],
            epochs=config["epochs"] if train else 1,
            shuffle=train,
            drop_remainder=train,
            preprocess=preprocess or self.model.preprocess,
            num_classes=config["num_classes"],
            on_error=config["on_error"],
        )

    def evaluation(self) -> Any:
        """``evaluate(state, frozen, batches)`` with accuracy and loss."""
        metrics = {"accuracy": tj.objectives.accuracy, "loss": tj.objectives.negative_log_likelihood}
        return tj.make_eval(self.model.apply, metrics, self.tuning)


def open_split(config: Mapping[str, Any], split: str, data: str | None = None) -> Any:
    """A split of the run's data, or of other data."""
    return tj.data.open(config["data"] if data is None else data, split, config["data_dir"])


def make_recipe(config: Mapping[str, Any], example: Any = None) -> Recipe:
    """The recipe of a config whose ``num_classes`` and ``class_names`` are known.

    Args:
      example: images of the data, for the stages of a model outside the zoo.
    """
    model, plan = load_model(
        config["model"],
        config["weights"],
        num_classes=config["num_classes"],
        seed=config["seed"],
        size=config["size"],
        class_names=config["class_names"],
    )
    base = tj.io.fingerprint({"params": model.params, "extra": model.extra})
    model = model if model.preprocess is None else tj.data.on_images(model, config["size"])
    order = lambda: stage_order(config["model"], model, lambda: _example(model, example))
    head = lambda: last_layer(model, order)
    tuning = make_tuning(config["tuning"], order, lambda: adapted(model, head), head)
    chosen = None
    if config["quantise"]:
        chosen = _to_quantise(tuning, model.params)
        tuning = tj.tuning.quantise(chosen, config["quantise"], tuning)
    return Recipe(config, model, plan, base, tuning, tuple(config["class_names"]), chosen)


def _to_quantise(tuning: tj.Tuning, params: Any) -> Any:
    import jax

    jax.eval_shape(tuning.init, jax.random.key(0), params)  # what is wrong with the tuning itself is said first
    try:
        return tj.tuning.frozen_matrices(tuning, params)
    except tj.SelectionError as error:
        raise tj.SelectionError(
            "--quantise: the tuning freezes no floating-point matrix, so there is nothing to quantise. Expected one "
            "that does, for example --tuning head+lora:8."
        ) from error


def restored(run: Any, example: Any = None) -> tuple[Recipe, Any, Any]:
    """The recipe of a run directory, its last state, and the frozen weights."""
    recipe = make_recipe(run.config, example)
    state, frozen = recipe.start(recipe.optimizer(run.config["steps"]))
    state, _ = run.read(state, recipe.base, run.config["seed"])
    return recipe, state, frozen


def _example(model: tj.Model, example: Any) -> Any:
    import jax
    import numpy as np

    if example is not None:
        return example
    height, width = model.preprocess.size if model.preprocess else (32, 32)
    return jax.ShapeDtypeStruct((1, height, width, 3), np.uint8)


def moved(run: Any, weights: str | None, on_error: str) -> Any:
    """The run with another place of its pretrained weights, and another way with damaged images; nothing is written.

    Raises:
      CheckpointError: the directory was made by something else than ``transferjax finetune``.
    """
    missing = [name for name in ("model", "weights", "tuning", "class_names", "steps") if name not in run.config]
    if missing:
        raise tj.CheckpointError(f"'{run.path}' was not made by `transferjax finetune`: no {missing[0]} in its config.")
    place = run.config["weights"] if weights is None else weights
    return dataclasses.replace(run, config={**run.config, "weights": place, "on_error": on_error})
