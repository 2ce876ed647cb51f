"""The recipe of a student that learns from a teacher, whose every word is kept."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import transferjax as tj
from transferjax.cli._hoisting import Running
from transferjax.cli._recipe import Recipe, make_recipe, open_split
from transferjax.cli._teacher import teacher_of


@dataclasses.dataclass(frozen=True)
class Distillation(Recipe):
    """A recipe whose objective and batches are a teacher's.

    Attributes:
      teacher: takes raw images too.
    """

    verb: ClassVar[str] = "distill"
    done: ClassVar[str] = "Distilled"
    kept: ClassVar[str] = "teacher"
    teacher: Any = None

    def objective(self) -> Any:
        """Distillation from what the batch says of the teacher, and cross-entropy with the labels where they count."""
        config = self.config
        loss = getattr(tj.objectives.losses, config["loss"].replace("-", "_"))
        if config["temperature"] is not None:
            loss = functools.partial(loss, temperature=config["temperature"])
        if config["alpha"] == 1:
            return tj.objectives.distill(self.model, None, loss)
        supervised = functools.partial(tj.objectives.cross_entropy, label_smoothing=config["label_smoothing"])
        shares = {"weight": config["alpha"], "supervised_weight": 1 - config["alpha"]}
        return tj.objectives.distill(self.model, None, loss, supervised=supervised, **shares)

    def batches(self, source: Any, *, train: bool, preprocess: Any = None) -> Any:
        """As of a recipe; in training, images have the size of the network that sees more of them."""
        return super().batches(source, train=train, preprocess=self._larger() if train else preprocess)

    def running(self, step: Any, state: Any, frozen: Any, batches: Any, folder: Any) -> Running:
        """The step as it is, on batches with what the teacher says.

        The way in which images are augmented depends on the epoch alone, and what the teacher says is on disk before
        each checkpoint, so that a resumed run gets the same bits.
        """
        config, functions = self.config, self.augmentations()
        cache = tj.io.TeacherCache(
            self.teacher,
            folder,
            top_k=config["top_k"],
            temperature=config["temperature"],
            augment=tj.data.compose(*functions) if functions else None,
            variants=config["variants"],
            seed=config["seed"],
        )

        def through(given: Any) -> Iterator[Any]:
            position = lambda: given.get_state()["position"]  # of the last batch given out, counted from 1
            epoch = lambda: (position() - 1) // given.steps_per_epoch
            for batch in cache.taught({**batch, "epoch": epoch()} for batch in given):
                if position() % given.steps_per_epoch == 0 and cache.cache is not None:
                    cache.cache.flush()
                yield {name: value for name, value in batch.items() if name != "epoch"}

        return Running(step, frozen, through)

    def rows(self, state: Any, frozen: Any) -> list[tuple[str, Any]]:
        """The teacher beside the student: its size, and on the validation images its accuracy and their agreement."""
        rows = [("teacher parameters", sum(leaf.size for leaf in jax.tree.leaves(self.teacher.params)))]
        if not self.config["validation"]:
            return rows
        source = open_split(self.config, self.config["validation"])
        taught = tj.io.TeacherCache(self.teacher).taught(
            super().batches(source, train=False, preprocess=self._larger())
        )
        evaluate = tj.make_eval(self.model.apply, {"accuracy": _teacher_is_right, "agreement": _agree}, self.tuning)
        found = evaluate(state, frozen, taught)
        return [("teacher validation accuracy", found["accuracy"]), ("validation agreement", found["agreement"]), *rows]

    def facts(self) -> dict[str, Any]:
        """Who taught, and how."""
        names = ("teacher", "loss", "temperature", "alpha", "variants", "top_k")
        return {name: self.config[name] for name in names if self.config[name] is not None}

    def _larger(self) -> Any:
        found = [model.preprocess for model in (self.model, self.teacher) if model.preprocess is not None]
        return max(found, key=lambda spec: math.prod(spec.size), default=None)


def distillation(config: Mapping[str, Any], images: Any) -> Distillation:
    """The recipe of a config, with its teacher.

    Args:
      config: of the verb; one of a run that goes on has the fingerprint of its teacher.
      images: shape and dtype of a batch of the data.

    Raises:
      TransferError: the teacher does not fit the data.
      CheckpointError: it is another one than before.
    """
    teacher = teacher_of(config, images)
    fingerprint = tj.io.fingerprint({"params": teacher.params, "extra": teacher.extra})
    before = config.get("teacher_fingerprint", fingerprint)
    if before != fingerprint:
        raise tj.CheckpointError(
            f"the teacher '{config['teacher']}' is another one than the run was started with: its fingerprint is "
            f"{fingerprint}, not {before}. Give the same weights, or start a new run in another --output."
        )
    recipe = make_recipe({**config, "teacher_fingerprint": fingerprint}, images)
    return Distillation(**vars(recipe), teacher=teacher)


def _teacher_is_right(outputs: Any, batch: Any) -> Any:
    return tj.objectives.accuracy(batch["teacher"]["outputs"], batch)


def _agree(outputs: Any, batch: Any) -> Any:
    says = lambda logits: jnp.argmax(logits, axis=-1)
    return (says(outputs) == says(batch["teacher"]["outputs"])).astype(jnp.float32)
