"""One adapter with different ranks and strengths on different leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from transferjax._errors import SelectionError
from transferjax._types import Hole, Tuning, is_hole
from transferjax.tree import Selector, as_selector, flatten, matches
from transferjax.tuning._kernel import positions


def per_pattern(
    name: str, build: Callable[..., Tuning], selector: Selector | str, options: Mapping[str, Any]
) -> Tuning:
    """A tuning whose options may differ from leaf to leaf.

    Args:
      name: the adapter that asks, for errors.
      build: ``(selector, **options) -> Tuning``.
      selector: which leaves are adapted.
      options: ``{name: value}``; a value that is a mapping ``{glob: value}`` gives each leaf the value of the first
        glob that matches its path.

    Returns:
      ``build(selector, **options)`` when no option is a mapping; else a ``Tuning`` that applies to each leaf the one of
      its options.

    Raises:
      SelectionError: a mapping is empty; (at ``init``) a leaf matches none of its globs, or a glob decides for no leaf.

    >>> import jax, jax.numpy as jnp, transferjax as tj
    >>> tuning = per_pattern("lora", tj.lora, "*", {"rank": {"a": 1, "**": 2}})
    >>> trainable, _ = tuning.init(jax.random.key(0), {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))})
    >>> trainable["a"]["lora_a"].shape, trainable["b"]["lora_a"].shape
    ((3, 1), (3, 2))
    """
    selector = as_selector(selector)
    tables = {option: given for option, given in options.items() if isinstance(given, Mapping)}
    if not tables:
        return build(selector, **options)
    for option, table in tables.items():
        if not table:
            raise SelectionError(f"{name}() got an empty mapping as {option}. Write, for example, {{'**': 8}}.")
    decide = _Decide(name, {option: [(glob, as_selector(glob)) for glob in table] for option, table in tables.items()})
    parts: dict[tuple[str, ...], Tuning] = {}
    for chosen in itertools.product(*tables.values()):
        values = {option: table[glob] for (option, table), glob in zip(tables.items(), chosen)}
        parts[chosen] = build(Selector(selector.name, _Only(selector, decide, chosen)), **{**options, **values})

    def init(key, params):
        used = {path: decide(path) for path in matches(params, selector)}
        decide.check_used(used.values())
        flat, treedef = flatten(params)
        learns: list[Any] = [Hole()] * len(flat)
        stays = [leaf for _, leaf in flat]
        for chosen in dict.fromkeys(used.values()):
            trainable, frozen = (treedef.flatten_up_to(tree) for tree in parts[chosen].init(key, params))
            for number, (path, _) in enumerate(flat):
                if used.get(path) == chosen:
                    learns[number], stays[number] = trainable[number], frozen[number]
        return jax.tree.unflatten(treedef, learns), jax.tree.unflatten(treedef, stays)

    def each(method: str):
        def run(trainable, frozen):
            flat, treedef = positions(frozen)
            weights = treedef.flatten_up_to(trainable)
            decided = [None if is_hole(w) else decide(path) for w, (path, _) in zip(weights, flat)]
            out = [leaf for _, leaf in flat]
            for chosen in dict.fromkeys(one for one in decided if one is not None):
                own = [
                    jax.tree.unflatten(treedef, [x if one == chosen else Hole() for x, one in zip(side, decided)])
                    for side in (weights, out)
                ]
                found = treedef.flatten_up_to(getattr(parts[chosen], method)(*own))
                out = [new if one == chosen else old for new, old, one in zip(found, out, decided)]
            return jax.tree.unflatten(treedef, out)

        return run

    liftable = all(part.lifted is not None for part in parts.values())
    return Tuning(init, each("merge"), each("lifted") if liftable else None)


class _Decide:
    """For a path, the first glob of each option that matches it."""

    def __init__(self, name: str, tables: dict[str, list[tuple[str, Selector]]]):
        self.name, self.tables = name, tables

    def __call__(self, path: str) -> tuple[str, ...]:
        return tuple(self._first(option, path) for option in self.tables)

    def _first(self, option: str, path: str) -> str:
        for glob, matching in self.tables[option]:
            if matching(path):
                return glob
        raise SelectionError(
            f"{self.name}() gives no {option} for '{path}': it matches none of "
            f"{[glob for glob, _ in self.tables[option]]}. Add a glob for it, or '**' as the last one."
        )

    def check_used(self, chosen: Iterable[tuple[str, ...]]) -> None:
        for (option, table), used in zip(self.tables.items(), zip(*chosen)):
            idle = [glob for glob, _ in table if glob not in used]
            if idle:
                raise SelectionError(
                    f"{self.name}() decides the {option} of no selected leaf by {idle}: they match none, or an earlier "
                    "glob matches first. Remove them, or put them first."
                )


class _Only:
    """The selected leaves for which one combination of globs decides."""

    def __init__(self, selector: Selector, decide: _Decide, chosen: tuple[str, ...]):
        self.selector, self.decide, self.chosen = selector, decide, chosen

    def __call__(self, path: str, leaf: Any) -> bool:
        return self.selector(path, leaf) and self.decide(path) == self.chosen
