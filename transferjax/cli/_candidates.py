"""What ``advise``, ``probe`` and ``finetune`` know of a network as a source, and how runs are kept as evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transferjax.cli._features import BATCH
from transferjax.cli._model import load_model


def candidate_of(name: str, size: int | None, source: Any, layers: str | None) -> Any:
    """A network's features of the images, its size, and what training it would cost here.

    Args:
      name: of the zoo, or ``module:function``.
      size: pixels of a side; ``None``: the model's own.
      source: the images.
      layers: a glob of module paths.
    """
    import transferjax as tj

    model = _headless(name, "auto", size)
    batches = tj.data.batches(source, BATCH, shuffle=False, drop_remainder=False, preprocess=model.preprocess)
    return tj.advise.measure(model, list(batches), at=layers)


def parameters_of(name: str, weights: str, size: int | None) -> int:
    """How many parameters a network has without its classifier."""
    import transferjax as tj

    return sum(leaf.size for leaf in tj.paths(_headless(name, weights, size).params).values())


def _headless(name: str, weights: str, size: int | None) -> Any:
    import transferjax as tj

    model, _ = load_model(name, weights, num_classes=0, size=size)
    return model if model.preprocess is None else tj.data.on_images(model, size)


def target_of(data: str, split: str, size: int | None) -> str:
    """What a user's task is called in the evidence: its data, the part that is learnt from, and the side of images.

    >>> target_of("sample", "train[:100]", 64)
    'sample train[:100] at 64'
    """
    from transferjax.cli._finetune import absolute

    return f"{absolute('data', data)} {split}" + ("" if size is None else f" at {size}")


def source_of(model: str, weights: str) -> str:
    """What a source is called in the evidence: a network, and its weights where they are not the usual ones.

    >>> source_of("efficientnet_lite0", "auto"), source_of("efficientnet_lite0", "none")
    ('efficientnet_lite0', 'efficientnet_lite0 (none)')
    """
    return model if weights == "auto" else f"{model} ({weights})"


def record_finetuned(folder: str, config: Mapping[str, Any], steps: int, accuracy: float, seconds: float) -> None:
    """Appends a fine-tuning run to the user's own evidence.

    Args:
      folder: of the evidence.
      config: the run's settings.
      steps: optimizer steps.
      accuracy: on the validation images.
      seconds: that it took.
    """
    from transferjax import advise

    fresh = config["weights"] == "none" and ":" not in config["model"]
    source, road = ("none", "scratch") if fresh else (source_of(config["model"], config["weights"]), "finetune")
    what = (source, road, config["tuning"].replace(":", " "), "", config["optimizer"])
    spent = (_highest(config["learning_rate"]), steps, config["batch_size"], accuracy, seconds)
    target = target_of(config["data"], config["split"], config["size"])
    advise.record(folder, [advise.Run(target, config["seed"], *what, *spent)])


def _highest(rates: Any) -> float:
    """The highest of the rates of a run, which are written as ``1e-3`` or ``head=1e-2,lora=1e-3``.

    >>> _highest("head=1e-2,lora=1e-3"), _highest(None)
    (0.01, 0.001)
    """
    from transferjax.cli._tuning import DEFAULT_RATE

    if rates is None:
        return DEFAULT_RATE
    return max(float(part.rpartition("=")[2]) for part in str(rates).split(","))
