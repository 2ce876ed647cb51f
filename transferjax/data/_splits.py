"""Slices of splits: ``train[:80%]``, ``train[100:200]+test``."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from transferjax._errors import DataError, nearest_hint

_PART = re.compile(r"^(?P<name>[^\[\]+]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?$")


def select(split: str, sizes: Mapping[str, int], name: str) -> np.ndarray:
    """The positions that a split's name stands for, when all splits lie one after the other.

    Args:
      split: a split, or ``"all"``; with a slice in examples or per cent (``train[:80%]``), several joined by ``+``.
        Percentages round to the nearest example, as in TFDS.
      sizes: the number of examples of each split, in their order.
      name: what errors call the data set.

    Returns:
      ``[N] int64`` positions in the order written.

    Raises:
      DataError: a split that does not exist, or a slice that cannot be read, is empty or goes beyond 100%.

    >>> select("train[:50%]+test", {"train": 4, "test": 2}, "mine").tolist()
    [0, 1, 4, 5]
    """
    return np.concatenate([_part(part.strip(), sizes, name) for part in split.split("+")])


def _part(part: str, sizes: Mapping[str, int], name: str) -> np.ndarray:
    match = _PART.match(part)
    if match is None:
        raise DataError(f"'{part}' is no slice of a split. Write 'train', 'train[:80%]' or 'train[100:200]'.")
    start, count = _span(match["name"].strip(), sizes, name)
    far = [text for text in match.group("start", "stop") if text and text.endswith("%") and abs(int(text[:-1])) > 100]
    if far:
        raise DataError(f"'{part}' of {name} goes to {far[0]}; expected percentages from -100% to 100%.")
    low = _bound(match["start"], count, 0)
    high = _bound(match["stop"], count, count)
    if low >= high:
        raise DataError(f"'{part}' of {name} selects none of its {count:,} examples.")
    return np.arange(start + low, start + high)


def _span(split: str, sizes: Mapping[str, int], name: str) -> tuple[int, int]:
    if split == "all" and split not in sizes:
        return 0, sum(sizes.values())
    if split not in sizes:
        known = ", ".join(f"'{s}'" for s in sizes)
        raise DataError(f"{name} has no split '{split}'. Its splits: {known}.{nearest_hint(split, sizes, 1)}")
    before = list(sizes)[: list(sizes).index(split)]
    return sum(sizes[s] for s in before), sizes[split]


def _bound(text: str | None, count: int, default: int) -> int:
    if text is None:
        return default
    value = round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)
    return min(max(value + count if value < 0 else value, 0), count)
