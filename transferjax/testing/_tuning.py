"""The laws of a Tuning."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import LawError, describe
from transferjax._types import Hole, Tuning, is_hole
from transferjax.testing._compare import broken, deleted, require_same
from transferjax.tree import flatten
from transferjax.tuning import chain

ROUNDTRIP = "merge(*init(key, params)) == params"


def check_tuning(
    tuning: Tuning, params: Any, *, key: jax.Array | None = None, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """The laws of a tuning: what ``make_step``, ``chain`` and saving rely on.

    Args:
      tuning: the ``Tuning`` under test.
      params: parameters that it fits.
      key: typed PRNG key for its new weights; default ``jax.random.key(0)``.
      rtol: relative tolerance of ``merge(*init(key, params)) == params``; 0 asks for the same bits.
      atol: absolute tolerance of the same.

    Raises:
      LawError: a law is broken: ``merge`` undoes ``init``; both trace under ``jax.eval_shape`` with the same result;
        two inits with one key are alike; ``trainable`` (or each of its groups) and ``frozen`` have the outline of
        ``params``, and each leaf one owner; trainable leaves are floating-point; a Hole that is not the tuning's
        stays; ``merge`` equals the dense form of ``lifted``; the parameters are left alone.

    >>> import jax.numpy as jnp, transferjax as tj
    >>> check_tuning(tj.train("head"), {"head": jnp.ones(2), "stem": jnp.ones(3)})
    """
    if not isinstance(tuning, Tuning):
        broken("a tuning is a Tuning", f"got {describe(tuning)}: call the function that makes it.")
    key = jax.random.key(0) if key is None else key
    trainable, frozen = tuning.init(key, params)
    claimed = _claims(params, trainable, frozen)
    for path, leaf in flatten(trainable)[0]:
        if not jnp.issubdtype(getattr(leaf, "dtype", jnp.result_type(leaf)), jnp.inexact):
            broken("trainable leaves are floating-point", f"got {describe(leaf)}.", path)
    require_same("two inits with one key are alike", (trainable, frozen), tuning.init(key, params))
    merged = tuning.merge(trainable, frozen)
    require_same(ROUNDTRIP, params, merged, rtol=rtol, atol=atol, promoted=True)
    _check_traces(tuning, key, params, (trainable, frozen), merged)
    _check_holes(tuning, params, trainable, frozen, claimed, merged)
    if tuning.lifted is not None:
        dense = jax.tree.map(_dense, tuning.lifted(trainable, frozen), is_leaf=lambda x: hasattr(x, "dense"))
        require_same("merge == tree.map(dense, lifted)", merged, dense, rtol=1e-5, atol=1e-6)
    if (gone := deleted(params)) is not None:
        broken("a tuning leaves the parameters alone", "its buffer was deleted.", gone)


def check_chain(params: Any, *, key: jax.Array | None = None, **named: Tuning) -> None:
    """The laws of ``chain(**named)``, and that the order of its groups is irrelevant.

    Args:
      params: parameters that all groups fit.
      key: typed PRNG key; default ``jax.random.key(0)``.
      **named: the groups.

    Raises:
      LawError: a law of :func:`check_tuning` is broken, or another order of the groups gives other values.
      SelectionError: two groups claim one leaf.

    >>> import jax.numpy as jnp, transferjax as tj
    >>> check_chain({"head": jnp.ones(2), "stem": jnp.ones(3)}, a=tj.train("head"), b=tj.train("stem"))
    """
    key = jax.random.key(0) if key is None else key
    tuning = chain(**named)
    check_tuning(tuning, params, key=key)
    pair = tuning.init(key, params)
    merged = tuning.merge(*pair)
    for order in itertools.islice(itertools.permutations(named), 1, 6):
        other = chain(**{name: named[name] for name in order})
        law = f"the order of groups never matters (here: {', '.join(order)})"
        found = other.init(key, params)
        require_same(law, pair, found)
        require_same(law, merged, other.merge(*found))


def _claims(params: Any, trainable: Any, frozen: Any) -> set[str]:
    """The paths of ``params`` that a tuning trains or adapts; the law of outlines on the way."""
    flat, treedef = flatten(params)
    stays = _up_to(treedef, frozen)
    if stays is None:
        broken("frozen has the outline of the parameters", f"got {_outline(frozen)}.")
    owner: dict[str, str] = {}
    for group, learns in _groups(treedef, trainable).items():
        for (path, _), leaf in zip(flat, learns, strict=True):
            if is_hole(leaf):
                continue
            if path in owner:
                broken("groups are disjoint", f"it is in the groups '{owner[path]}' and '{group}'.", path)
            owner[path] = group
    for (path, _), leaf in zip(flat, stays, strict=True):
        if is_hole(leaf) and path not in owner:
            broken("every leaf is trainable or frozen", "it is a Hole in both.", path)
    return set(owner)


def _groups(treedef: Any, trainable: Any) -> dict[str, list[Any]]:
    if isinstance(trainable, dict) and trainable:
        found = {name: _up_to(treedef, group) for name, group in trainable.items()}
        if all(learns is not None for learns in found.values()):
            return found  # pyright: ignore[reportReturnType]
    learns = _up_to(treedef, trainable)
    if learns is None:
        broken("trainable, or each of its groups, has the outline of the parameters", f"got {_outline(trainable)}.")
    return {"": learns}


def _up_to(treedef: Any, tree: Any) -> list[Any] | None:
    try:
        return treedef.flatten_up_to(tree)
    except ValueError:
        return None


def _outline(tree: Any) -> str:
    return f"a dict with the keys {sorted(map(str, tree))}" if isinstance(tree, dict) else describe(tree)


def _check_traces(tuning: Tuning, key: Any, params: Any, pair: Any, merged: Any) -> None:
    for name, function, arguments, real in (
        ("init", tuning.init, (key, params), pair),
        ("merge", tuning.merge, pair, merged),
    ):
        law = f"{name} traces under jax.eval_shape"
        try:
            shapes = jax.eval_shape(function, *arguments)
        except LawError:
            raise
        except Exception as error:
            broken(law, f"it raised {type(error).__name__}: {error}", cause=error)
        require_same(law, shapes, real)


def _check_holes(tuning: Tuning, params: Any, trainable: Any, frozen: Any, claimed: set[str], merged: Any) -> None:
    """Another tuning's leaves are Holes of ``frozen``: ``merge`` must pass them on."""
    law = "a Hole that is not the tuning's stays a Hole"
    flat, treedef = flatten(params)
    stays = treedef.flatten_up_to(frozen)
    holed = [leaf if path in claimed else Hole() for (path, _), leaf in zip(flat, stays, strict=True)]
    try:
        found = tuning.merge(trainable, jax.tree.unflatten(treedef, holed))
    except Exception as error:
        broken(law, f"merge raised {type(error).__name__}: {error}", cause=error)
    whole = treedef.flatten_up_to(merged)
    expected = [leaf if path in claimed else Hole() for (path, _), leaf in zip(flat, whole, strict=True)]
    require_same(law, jax.tree.unflatten(treedef, expected), found)


def _dense(leaf: Any) -> Any:
    return leaf.dense() if hasattr(leaf, "dense") else leaf
