"""The small languages of the command line: ``--tuning head+lora:8`` and ``--learning-rate head=1e-3,lora=3e-4``."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

HEAD = "head/fc/**"
ADAPTED = "blocks/*/expand/kernel"
ALLOWED = (
    "head (the last layer), last:N (the last N stages), full (everything), lora:RANK or lora:RANK:GLOB, bias, norm, "
    "train:GLOB; joined by '+', for example head+lora:8"
)
DEFAULT_RATE = 1e-3
OPTIMIZERS = ("adam", "adamw", "rmsprop", "sgd")


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a tuning: its kind, which is the name of its group too, a number and a glob where it takes one."""

    kind: str
    number: int | None = None
    glob: str | None = None


def parse_tuning(text: str) -> list[Part]:
    """The parts of a tuning, checked as far as that goes without a model.

    >>> parse_tuning("head+lora:8")
    [Part(kind='head', number=None, glob=None), Part(kind='lora', number=8, glob=None)]
    """
    parts = [_part(part, text) for part in text.split("+")]
    kinds = [part.kind for part in parts]
    if len(set(kinds)) < len(kinds):
        raise argparse.ArgumentTypeError(f"'{text}' names a part twice; expected each once: {ALLOWED}")
    if "full" in kinds and len(kinds) > 1:
        raise argparse.ArgumentTypeError(f"'{text}': full is everything already; expected it alone")
    return parts


def tuning_text(text: str) -> str:
    """The text itself, once it is known to be a tuning."""
    parse_tuning(text)
    return text


def _part(part: str, text: str) -> Part:
    kind, _, rest = part.strip().partition(":")
    if kind in ("head", "full", "bias", "norm") and not rest:
        return Part(kind)
    if kind == "train" and rest:
        return Part(kind, None, rest)
    if kind == "last" and re.fullmatch(r"[1-9]\d*", rest):
        return Part(kind, int(rest))
    if kind == "lora" and (found := re.fullmatch(r"([1-9]\d*)(?::(.+))?", rest)):
        return Part(kind, int(found[1]), found[2])
    if kind == "lora" and re.match(r"0*(:|$)|-", rest):
        raise argparse.ArgumentTypeError(f"'{part}' in '{text}': lora needs a rank of at least 1, for example lora:8")
    raise argparse.ArgumentTypeError(f"'{part}' in '{text}' is no tuning; expected {ALLOWED}")


def make_tuning(
    text: str,
    order: Callable[[], Sequence[Any]],
    adapted: Callable[[], Any] = lambda: ADAPTED,
    head: Callable[[], Any] = lambda: HEAD,
) -> Any:
    """The ``Tuning`` with one group per part.

    Args:
      text: for :func:`parse_tuning`.
      order: gives the model's stages from input to output; called for ``last`` only.
      adapted: gives the kernels that ``lora`` without a glob adapts; called for it only.
      head: gives the last layer; called for ``head`` only.
    """
    import transferjax as tj

    make = {
        "head": lambda part: tj.train(head()),
        "full": lambda part: tj.full(),
        "bias": lambda part: tj.bias_only(),
        "norm": lambda part: tj.norm_only(),
        "train": lambda part: tj.train(part.glob),
        "last": lambda part: tj.last(part.number, order()),
        "lora": lambda part: tj.lora(part.glob or adapted(), part.number),
    }
    return tj.chain(**{part.kind: make[part.kind](part) for part in parse_tuning(text)})


def rates_text(text: str) -> str:
    """The text itself, once it is known to be one learning rate or one per group."""
    _parse_rates(text)
    return text


def learning_rates(text: str | None, groups: Sequence[str]) -> dict[str, float]:
    """The learning rate of every group.

    >>> learning_rates("head=0.01,lora=0.001", ["head", "lora"])
    {'head': 0.01, 'lora': 0.001}

    Raises:
      TransferError: a group that the tuning does not have, or one without a rate.
    """
    from transferjax import SelectionError

    overall, named = _parse_rates(text) if text else (DEFAULT_RATE, {})
    without = [name for name in groups if name not in named]
    if overall is None and without and set(named) <= set(groups):
        raise SelectionError(
            f"--learning-rate gives none for the group '{without[0]}'. Write one for every group of --tuning "
            f"({','.join(f'{name}=1e-3' for name in groups)}), or a number for the others: {text},1e-3."
        )
    for name in named:
        if name not in groups:
            raise SelectionError(
                f"--learning-rate names the group '{name}', but the tuning has: {', '.join(groups)}. "
                "Groups are called like the parts of --tuning."
            )
    return {name: named.get(name, overall or DEFAULT_RATE) for name in groups}


def _parse_rates(text: str) -> tuple[float | None, dict[str, float]]:
    """The rate for groups that are not named (``None``: not given), and those by name."""
    overall, named = None, {}
    for part in text.split(","):
        name, equals, number = part.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not 0 < rate < float("inf") or (equals and not name.strip()):
            raise argparse.ArgumentTypeError(
                f"'{part}' is no learning rate; expected a number above 0, or one per group: head=1e-3,lora=3e-4"
            )
        if equals:
            named[name.strip()] = rate
        else:
            overall = rate
    return overall, named


def make_optimizer(name: str, rates: Mapping[str, Any], steps: int, warmup: float) -> Any:
    """One optax transform per group, each with a warm-up and a cosine."""
    import optax

    import transferjax as tj

    kinds: dict[str, Callable[..., Any]] = {
        "adam": optax.adam,
        "adamw": optax.adamw,
        "rmsprop": optax.rmsprop,
        "sgd": lambda schedule: optax.sgd(schedule, momentum=0.9, nesterov=True),
    }
    schedule = lambda rate: tj.optim.warmup_cosine(rate, steps, warmup=warmup)
    return tj.per_group(**{group: kinds[name](schedule(rate)) for group, rate in rates.items()})
