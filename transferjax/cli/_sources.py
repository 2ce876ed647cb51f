"""What the command line names by paths: checkpoints, runs, targets, rules and plans."""

from __future__ import annotations

import os
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any, NamedTuple

import transferjax as tj
from transferjax.cli._model import call_function
from transferjax.io._beside import write_bytes

MANIFEST, ARRAYS = "manifest.json", "arrays"
"""What a checkpoint of a run directory holds."""


class Opened(NamedTuple):
    """A checkpoint under the names that its leaves had when they were saved."""

    checkpoint: Any
    names: dict[str, str]
    place: pathlib.Path | None

    @property
    def shapes(self) -> dict[str, Any]:
        return {name: self.checkpoint.shapes[stored] for name, stored in self.names.items()}

    def __getitem__(self, name: str) -> Any:
        return self.checkpoint.read(self.names[name])


def opened(path: str, digest: str | None = None) -> Opened:
    """A checkpoint by its path; of a run directory, its newest."""
    place = _newest(pathlib.Path(path))
    checkpoint = tj.io.open(place / ARRAYS if place else path, digest=digest)
    return Opened(checkpoint, {(_unescape(name) if place else name): name for name in checkpoint.shapes}, place)


def target_of(name: str, num_classes: int | None, seed: int = 0) -> tuple[Any, str | None]:
    """What a plan is to fill, and its name in the zoo, if it has one.

    Args:
      name: a model of the zoo, ``module:function``, or the path of a checkpoint whose names and shapes are wanted.
      num_classes: outputs of a model.
      seed: of fresh weights.
    """
    import jax

    if os.path.exists(name):
        return tj.io.open(name), None
    options = {"num_classes": num_classes, "key": jax.random.key(seed)}
    if ":" in name:
        return call_function(name, options), None
    return tj.models.create(name, **options), name


def shapes_of(target: Any) -> Any:
    """The tree that ``plan`` is given: of a checkpoint its shapes."""
    return target.shapes if isinstance(target, tj.io.Checkpoint) else target


def values_of(target: Any) -> Any:
    """The initial values for fresh leaves."""
    return target.read if isinstance(target, tj.io.Checkpoint) else target


def rules_of(path: str) -> tuple[Any, ...]:
    """Rules from a file: JSON, or Python that defines ``RULES``."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise tj.PlanError(f"there is no file of rules at '{path}'. Expected JSON (.json) or Python (.py).")
    if file.suffix != ".py":
        return tj.surgery.rules_from_json(file.read_text(encoding="utf-8"))
    try:
        found = runpy.run_path(str(file)).get("RULES")
    except Exception as error:
        raise tj.PlanError(f"'{path}' raised {type(error).__name__}: {error}. Expected Python that runs.") from error
    if not isinstance(found, Sequence) or not all(isinstance(rule, tj.surgery.Rule) for rule in found):
        raise tj.PlanError(f"'{path}' defines no RULES. Write RULES = (rename(...), ...), a tuple of surgery rules.")
    return tuple(found)


def write_rules(path: str, rules: Sequence[Any]) -> None:
    """Rules as a file of the kind that its ending says."""
    kind = pathlib.Path(path).suffix
    if kind not in (".py", ".json"):
        raise tj.PlanError(f"rules are not written as '{path}'. Expected an ending of .py or .json.")
    made = tj.surgery.rules_to_python if kind == ".py" else tj.surgery.rules_to_json
    write_text(path, made(rules))


def write_text(path: str, text: str) -> None:
    """A file of text, written beside and renamed."""
    write_bytes(pathlib.Path(path), text.encode())


def plan_of(path: str) -> Any:
    """A plan from its JSON file."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise tj.PlanError(f"there is no plan at '{path}'. Write one: transferjax plan SRC TARGET --output {path}")
    return tj.surgery.Plan.from_json(file.read_text(encoding="utf-8"))


def _newest(path: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint of a run directory, of its ``checkpoints``, or the one given; ``None`` for other paths."""
    if (path / MANIFEST).is_file():
        return path
    of_a_run = (path / "config.json").is_file() and (path / "checkpoints").is_dir()
    folder = path / "checkpoints" if of_a_run else path
    steps = [int(found.parent.name) for found in folder.glob(f"*/{MANIFEST}") if found.parent.name.isdigit()]
    if of_a_run and not steps:
        raise tj.CheckpointError(f"the run '{path}' has no checkpoint yet. Go on with it by `finetune --resume` first.")
    return folder / str(max(steps)) if steps else None


def _unescape(name: str) -> str:
    """A path as it was before Orbax, which joins names by dots, stored it."""
    return name.replace("%2E", ".").replace("%25", "%")
