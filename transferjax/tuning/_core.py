"""What learns: tunings over whole leaves, and chains of named groups."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import jax

from transferjax._errors import SelectionError, describe
from transferjax._types import Hole, Tuning, is_hole
from transferjax.tree import Selector, as_order, as_selector, everything, fill, flatten, paths, split


def train(selector: Selector | str) -> Tuning:
    """The selected leaves learn, the rest is frozen.

    Args:
      selector: a ``Selector`` or a glob over model paths.

    Returns:
      A ``Tuning``; ``trainable`` and ``frozen`` have the outline of the parameters with a ``Hole`` where the
      other side has the leaf.

    Raises:
      SelectionError: (at ``init``) the selector matches nothing.

    >>> import jax
    >>> train("head").init(jax.random.key(0), {"head": 1.0, "stem": 2.0})
    ({'head': 1.0, 'stem': Hole}, {'head': Hole, 'stem': 2.0})
    """
    selector = as_selector(selector)
    return Tuning(lambda key, params: split(params, selector), fill)


def full() -> Tuning:
    """Every leaf learns.

    >>> import jax
    >>> full().init(jax.random.key(0), {"head": 1.0, "stem": 2.0})[1]
    {'head': Hole, 'stem': Hole}
    """
    return train(everything)


def last(n: int, order: Sequence[Selector | str]) -> Tuning:
    """The last ``n`` stages learn.

    Args:
      n: how many stages, counted from the output.
      order: one selector per stage, from input to output: ``transferjax.models.stages(name)``, or
        ``transferjax.stages(model, inputs)`` by order of use. There is no default: the order of a tree's keys
        is not the order of its layers.

    Returns:
      A ``Tuning``.

    Raises:
      SelectionError: ``order`` is no list, or ``n`` is not between 1 and the number of stages.

    >>> import jax
    >>> last(1, ["stem", "head"]).init(jax.random.key(0), {"head": 1.0, "stem": 2.0})[0]
    {'head': 1.0, 'stem': Hole}
    """
    stages = as_order(order, "last")
    if not 1 <= n <= len(stages):
        raise SelectionError(f"last() expects n between 1 and {len(stages)}, the number of stages in order; got {n}.")
    selector = stages[-n]
    for stage in stages[len(stages) - n + 1 :]:
        selector = selector | stage
    return train(selector)


def bias_only() -> Tuning:
    """Every leaf named ``bias`` learns (BitFit), those of normalisation layers included.

    Source: Ben Zaken et al., "BitFit", 2022.

    >>> import jax
    >>> bias_only().init(jax.random.key(0), {"fc": {"bias": 1.0, "kernel": 2.0}})[0]
    {'fc': {'bias': 1.0, 'kernel': Hole}}
    """
    return train(Selector("bias_only", _named_bias))


def norm_only() -> Tuning:
    """Scale and bias of every normalisation layer learn: of each module that owns a ``scale``.

    >>> import jax
    >>> params = {"bn": {"scale": 1.0, "bias": 2.0}, "fc": {"bias": 3.0}}
    >>> norm_only().init(jax.random.key(0), params)[0]
    {'bn': {'bias': 2.0, 'scale': 1.0}, 'fc': {'bias': Hole}}
    """

    def init(key, params):
        flat = paths(params)
        norms = {path.rpartition("/")[0] for path in flat if path.rpartition("/")[2] == "scale"}
        chosen = frozenset(
            path for path in flat if path.rpartition("/")[0] in norms and path.rpartition("/")[2] in ("scale", "bias")
        )
        return split(params, Selector("norm_only", lambda path, leaf: path in chosen))

    return Tuning(init, fill)


def chain(*unnamed: Tuning, **named: Tuning) -> Tuning:
    """Several tunings at once, each a named group.

    Every group is resolved against the original parameters, so their order never matters. ``trainable`` is
    ``{group: tree}``; the group names are those that ``transferjax.per_group`` takes.

    Args:
      *unnamed: none; a ``Tuning`` without a name raises.
      **named: one ``Tuning`` per group.

    Returns:
      A ``Tuning``; it has a lifted form when one of its groups has one.

    Raises:
      SelectionError: no group, or one without a name; (at ``init``) a leaf is claimed by two groups, both named.

    >>> import jax
    >>> tuning = chain(head=train("head"), tail=train("tail"))
    >>> trainable, frozen = tuning.init(jax.random.key(0), {"head": 1.0, "stem": 2.0, "tail": 3.0})
    >>> trainable["tail"], frozen
    ({'head': Hole, 'stem': Hole, 'tail': 3.0}, {'head': Hole, 'stem': 2.0, 'tail': Hole})
    >>> tuning.merge(trainable, frozen)
    {'head': 1.0, 'stem': 2.0, 'tail': 3.0}
    """
    if unnamed:
        raise SelectionError(
            f"chain() got {describe(unnamed[0])} without a name. Name each group: chain(head=tj.train('head/**'))."
        )
    if not named:
        raise SelectionError("chain() expects at least one group, for example chain(head=train('head/**')).")
    for name, tuning in named.items():
        if not isinstance(tuning, Tuning):
            raise SelectionError(f"chain() expects a Tuning for group '{name}', got {describe(tuning)}.")

    def init(key, params):
        flat, treedef = flatten(params)
        frozen = [leaf for _, leaf in flat]
        owner: dict[str, str] = {}
        trainable = {}
        for name, tuning in named.items():
            group, rest = tuning.init(jax.random.fold_in(key, zlib.crc32(name.encode())), params)
            learns, stays = _at_leaves(treedef, group, name), _at_leaves(treedef, rest, name)
            for number, (path, leaf) in enumerate(flat):
                if not is_hole(learns[number]):
                    if path in owner:
                        raise SelectionError(
                            f"'{path}' is claimed by the groups '{owner[path]}' and '{name}'. "
                            "Expected each leaf in one group: narrow one of their selectors."
                        )
                    owner[path] = name
                if stays[number] is not leaf:
                    frozen[number] = stays[number]
            trainable[name] = group
        return trainable, jax.tree.unflatten(treedef, frozen)

    def merge(trainable, frozen):
        if not isinstance(trainable, dict) or set(trainable) != set(named):
            came = sorted(trainable) if isinstance(trainable, dict) else describe(trainable)
            raise SelectionError(f"chain() expects trainable groups {sorted(named)}, got {came}.")
        for name, tuning in named.items():
            frozen = tuning.merge(trainable[name], frozen)
        return frozen

    def lifted(trainable, frozen):
        for name, tuning in named.items():
            frozen = _lifted_group(tuning, trainable[name], frozen)
        return frozen

    return Tuning(init, merge, lifted if any(tuning.lifted is not None for tuning in named.values()) else None)


def _lifted_group(tuning: Tuning, trainable: Any, frozen: Any) -> Any:
    """The parameters with one group in lifted form; what other groups lifted passes by, and is not looked into."""
    from transferjax.program import is_lifted

    leaves, treedef = jax.tree.flatten(frozen, is_leaf=lambda x: is_hole(x) or is_lifted(x))
    others = [is_lifted(leaf) and is_hole(w) for leaf, w in zip(leaves, treedef.flatten_up_to(trainable), strict=True)]
    shown: list[Any] = [Hole() if other else leaf for leaf, other in zip(leaves, others, strict=True)]
    if tuning.lifted is None:
        shown = [leaf.dense() if is_lifted(leaf) else leaf for leaf in shown]
    made = (tuning.lifted or tuning.merge)(trainable, jax.tree.unflatten(treedef, shown))
    every = zip(leaves, treedef.flatten_up_to(made), others, strict=True)
    return jax.tree.unflatten(treedef, [leaf if other else new for leaf, new, other in every])


def _named_bias(path: str, leaf: Any) -> bool:
    return path.rpartition("/")[2] == "bias"


def _at_leaves(treedef: Any, tree: Any, group: str) -> list[Any]:
    """What ``tree`` holds at each leaf position of ``treedef``: a leaf, a Hole, or an adapter's own subtree."""
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        raise SelectionError(
            f"group '{group}' returns a tree of another outline than the parameters ({error}). "
            "A chain cannot be a group of a chain: put its groups into the outer one."
        ) from None


__all__ = ["Hole", "Tuning", "bias_only", "chain", "full", "last", "norm_only", "train"]
