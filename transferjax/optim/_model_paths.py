"""What trainable leaves are called in the model: their paths without the name of a group."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from transferjax._types import is_hole
from transferjax.optim._groups import are_groups
from transferjax.tree import flatten


def resolve(tree: Any, find: Callable[[str, Any], Hashable | None]) -> dict[str, tuple[str, Any]]:
    """What ``find`` says of the model path of each trainable leaf.

    Whether the first segment of all paths is a group's name shows in the answers: the reading counts by which more
    leaves have one, then by which more different ones are given, for a ``Hole`` too.

    Args:
      tree: what learns, in groups or not; or its gradients.
      find: ``(model path, leaf) -> answer``, or ``None`` where there is none; the leaf may be a ``Hole``.

    Returns:
      ``{path in the tree: (model path, answer)}`` of every leaf.

    >>> resolve({"fast": {"head": 1.0}}, lambda path, leaf: {"head": 3}.get(path))
    {'fast/head': ('head', 3)}
    """
    flat, _ = flatten(tree, holes=True)
    whole = [path for path, _ in flat]
    bare = [path.partition("/")[2] for path in whole]
    learnt = [name for name, (_, leaf) in zip(bare, flat, strict=True) if not is_hole(leaf)]
    grouped = isinstance(tree, dict) and are_groups(tree) and len(set(learnt)) == len(learnt)
    best: tuple[tuple[int, int], dict[str, tuple[str, Any]]] = ((-1, -1), {})
    for names in (whole, bare) if grouped else (whole,):
        answers = [find(name, leaf) for name, (_, leaf) in zip(names, flat, strict=True)]
        every = zip(flat, names, answers, strict=True)
        found = {path: (name, answer) for (path, leaf), name, answer in every if not is_hole(leaf)}
        score = (sum(answer is not None for _, answer in found.values()), len({*answers} - {None}))
        if score >= best[0]:
            best = (score, found)
    return best[1]
