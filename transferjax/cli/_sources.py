"""What the command line names by paths: checkpoints, runs, targets, rules and plans."""

from __future__ import annotations

import os
import pathlib
import runpy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import transferjax as tj
from transferjax.cli._model import call_function

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

    Raises:
      TransferError: ``num_classes`` is given and changes nothing.
    """
    import jax

    if os.path.exists(name) or "://" in name or name.startswith("hf:"):
        if num_classes is not None:
            raise tj.TransferError(f"--num-classes is for models; '{name}' is a checkpoint. Leave it out.")
        return tj.io.open(name), None
    options = {"num_classes": num_classes, "key": jax.random.key(seed)}
    if ":" in name:
        return call_function(name, options, needed=("num_classes",)), None
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
        return _parsed(file, "rules, JSON (.json) or Python (.py)", tj.surgery.rules_from_json)
    try:
        found = runpy.run_path(str(file)).get("RULES")
    except (Exception, SystemExit) as error:
        raise tj.PlanError(f"'{path}' raised {type(error).__name__}: {error}. Expected Python that runs.") from error
    if not isinstance(found, Sequence) or not all(isinstance(rule, tj.surgery.Rule) for rule in found):
        raise tj.PlanError(f"'{path}' defines no RULES. Write RULES = (rename(...), ...), a tuple of surgery rules.")
    return tuple(found)


def plan_of(path: str) -> Any:
    """A plan from its JSON file."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise tj.PlanError(f"there is no plan at '{path}'. Write one: transferjax plan SRC TARGET --output {path}")
    return _parsed(
        file,
        "a plan, in JSON as `transferjax plan --output` writes it, where --help shows PLAN",
        tj.surgery.Plan.from_json,
    )


def _parsed(file: pathlib.Path, expected: str, parse: Callable[[str], Any]) -> Any:
    """What a file of JSON says; errors name the file."""
    try:
        return parse(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise tj.PlanError(f"'{file}' is no text. Expected {expected}.") from None
    except OSError as error:
        raise tj.PlanError(f"'{file}' cannot be read: {error.strerror or error}. Expected {expected}.") from None
    except tj.PlanError as error:
        raise tj.PlanError(f"in '{file}': {error}") from None


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
