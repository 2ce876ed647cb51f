"""A fine-tuning state goes from one tuning to the next."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from transferjax._errors import SelectionError, TransferError, describe, listing
from transferjax._types import Params, Tuning, is_hole
from transferjax.finetune._state import FinetuneState, _committed_alike, check_transform
from transferjax.tree import copy, flatten

_LEAF = jax.tree.structure(0)


def each_group(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """One optax transform for all groups of a ``transferjax.chain``, with a state of its own for each.

    Adam divides its moments by a factor that depends on one step count. Leaves that begin to learn late need a count
    that starts with them: as a group of their own they have it. So one optimizer serves all stages of a run, whatever
    groups each of them has. Clipping inside sees one group; ``optax.chain(optax.clip_by_global_norm(1.0),
    each_group(...))`` clips all of them together. A schedule inside counts from where its group began to learn.

    Args:
      tx: any optax transform.

    Returns:
      An optax transform over ``{group: tree}``.

    Raises:
      TransferError: ``tx`` is no optax transform.
      SelectionError: (at ``init``) the tuning has no groups.

    >>> import jax.numpy as jnp
    >>> state = each_group(optax.adam(0.1)).init({"head": {"bias": jnp.zeros(2)}, "stem": {"bias": jnp.zeros(2)}})
    >>> sorted(state), int(state["head"][0].count)
    (['head', 'stem'], 0)
    """
    check_transform(tx, "each_group")
    inner = optax.with_extra_args_support(tx)

    def init(params):
        trees = list(params.values()) if isinstance(params, dict) else []
        outlines = {tuple(sorted(map(str, tree))) if isinstance(tree, dict) else None for tree in trees}
        if len(outlines) != 1 or None in outlines:
            came = f"its parameters {listing(sorted(params))}" if isinstance(params, dict) else describe(params)
            raise SelectionError(
                f"each_group() expects a tuning with groups, got {came}. Name them: "
                "tj.chain(head=tj.train('head/**')), or use the plain optax transform."
            )
        return {name: inner.init(tree) for name, tree in params.items()}

    def update(updates, state, params=None, **extra):
        out, new = {}, {}
        for name in updates:
            own = None if params is None else params[name]
            out[name], new[name] = inner.update(updates[name], state[name], own, **extra)
        return out, new

    return optax.GradientTransformationExtraArgs(init, update)


def migrate(
    state: FinetuneState, frozen: Params, tuning: Tuning, to_tuning: Tuning, to_tx: Any
) -> tuple[FinetuneState, Params]:
    """The state of a run as the next tuning has it: the same parameters, other leaves that learn.

    A leaf goes on learning when it learns in the same group of both tunings, as a whole or through an adapter of the
    same shapes. It keeps its value and its part of the optimizer's state. What begins to learn starts with a fresh
    state, as after ``to_tx.init``. What ends is folded into ``frozen``: whole leaves as they are, adapters merged into
    theirs, in the dtype to which they promote. Step number, key and ``extra`` go on.

    Numbers in the optimizer's state (step counts, a loss scale) go on with the leaves they stand beside. Two kinds of
    leaves cannot share one number: where Adam's count is that of leaves that go on, moments that begin at zero would
    be corrected as if they were old. So this raises, and leaves that begin to learn are put into a group of their own,
    with :func:`each_group` or ``transferjax.per_group``; every leaf then moves, step for step, as in a run in which
    each had its own optimizer from the step at which it began. A count that stands alone, such as that of a
    schedule in front of the groups, goes on. Where the next optimizer keeps something in another place or form, it
    starts fresh; hyperparameters that ``optax.inject_hyperparams`` holds are those of ``to_tx``.

    It traces under ``jax.eval_shape``, and depends on nothing but its arguments.

    Args:
      state: the state at the end of a stage; only read.
      frozen: its frozen weights; those that stay frozen are shared, not copied.
      tuning: what learnt up to here.
      to_tuning: what learns from here on.
      to_tx: the optax transform from here on.

    Returns:
      ``(state, frozen)`` for a step made with ``to_tuning`` and ``to_tx``.

    Raises:
      SelectionError: the state is not of ``tuning``; a whole leaf goes on in another group; leaves that go on and
        leaves that begin would share a count; or an adapter that goes on means another leaf under ``to_tuning``.
      TransferError: an argument is no state, Tuning or optax transform.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> model = tj.Model(None, None, {"head": jnp.ones(2), "stem": jnp.ones(2)}, {})
    >>> first, both = tj.finetune.lp_ft("head")
    >>> tx = each_group(optax.adam(0.1))
    >>> state, frozen = tj.init(jax.random.key(0), model, first, tx)
    >>> state, frozen = migrate(state, frozen, first, both, tx)
    >>> state.trainable["body"]["stem"].shape, frozen
    ((2,), {'head': Hole, 'stem': Hole})
    """
    _check_arguments(state, tuning, to_tuning, to_tx)
    params = _merged(tuning, state.trainable, frozen)
    names, treedef = [path for path, _ in flatten(params)[0]], jax.tree.structure(params)
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), zlib.crc32(b"migrate"))
    learns, stays = to_tuning.init(key, params)
    before, after = _groups(treedef, state.trainable), _groups(treedef, learns)
    old, new = treedef.flatten_up_to(frozen), treedef.flatten_up_to(stays)
    goes_on = {
        (group, number)
        for group, nodes in after.items()
        for number, node in enumerate(nodes)
        if group in before and _goes_on(before[group][number], node, old[number], new[number])
    }
    _check_regrouped(before, after, goes_on, names)
    learning = {n for nodes in (*before.values(), *after.values()) for n, node in enumerate(nodes) if not is_hole(node)}
    keeps = {number for _, number in goes_on} | (set(range(len(names))) - learning)
    own = {id(leaf) for leaf in jax.tree.leaves(state.trainable)}
    rest = [old[n] if n in keeps and _outline(old[n]) == _outline(new[n]) else new[n] for n in range(len(names))]
    rest = jax.tree.map(lambda leaf: copy(leaf) if id(leaf) in own else leaf, jax.tree.unflatten(treedef, rest))
    chosen = lambda group, n, node: before[group][n] if (group, n) in goes_on else node
    trainable = copy(_regrouped(treedef, after, chosen))
    flags = _regrouped(treedef, after, lambda group, n, node: jax.tree.map(lambda _: (group, n) in goes_on, node))
    _check_meaning(params, to_tuning, trainable, rest, goes_on, after)
    opt_state = _carry(state.opt_state, to_tx.init(trainable), dict(flatten(flags)[0]), _scopes(after, flags))
    fresh = FinetuneState(copy(state.step), copy(state.key), trainable, copy(state.extra), copy(opt_state))
    return _committed_alike(fresh, rest), rest


def _check_arguments(state: Any, tuning: Any, to_tuning: Any, to_tx: Any) -> None:
    if not isinstance(state, FinetuneState):
        raise TransferError(
            f"migrate() expects a FinetuneState first, got {describe(state)}. "
            "Write migrate(state, frozen, tuning, to_tuning, to_tx)."
        )
    for value in (tuning, to_tuning):
        if not isinstance(value, Tuning):
            raise TransferError(f"migrate() expects two Tunings, got {describe(value)}: write tj.train('head/**').")
    check_transform(to_tx, "migrate")


def _merged(tuning: Tuning, trainable: Any, frozen: Any) -> Params:
    try:
        return tuning.merge(trainable, frozen)
    except Exception as error:
        raise SelectionError(
            f"the state was made by another tuning: {error} Pass the tuning of the stage that ends to migrate()."
        ) from error


def _groups(treedef: Any, trainable: Any) -> dict[str | None, list[Any]]:
    """What learns at each leaf of the parameters, by group: a Hole, the leaf itself, or an adapter's weights.

    A tuning without groups has one, named ``None``.
    """
    if isinstance(trainable, dict) and trainable:
        try:
            return {name: treedef.flatten_up_to(tree) for name, tree in trainable.items()}
        except (ValueError, TypeError):
            pass
    return {None: treedef.flatten_up_to(trainable)}


def _regrouped(treedef: Any, groups: Mapping[Any, list[Any]], one: Any) -> Any:
    """The trainable tree again, of ``one(group, number, node)`` at each place."""
    trees = {
        name: jax.tree.unflatten(treedef, [one(name, number, node) for number, node in enumerate(nodes)])
        for name, nodes in groups.items()
    }
    return trees.get(None, trees)


def _scopes(groups: Mapping[Any, Any], flags: Any) -> dict[str, dict[str, bool]]:
    """By group, ``{path inside the group: whether the leaf goes on}``."""
    return {} if None in groups else {name: dict(flatten(flags[name])[0]) for name in groups}


def _outline(tree: Any) -> Any:
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _goes_on(before: Any, after: Any, old: Any, new: Any) -> bool:
    """Whether what learns at one place is the same in both tunings."""
    if is_hole(before) or is_hole(after) or _outline(before) != _outline(after):
        return False
    return _is_leaf(before) or _outline(old) == _outline(new)


def _check_regrouped(before: Any, after: Any, goes_on: set[Any], names: list[str]) -> None:
    for group, nodes in after.items():
        for number, node in enumerate(nodes):
            if not _is_leaf(node) or (group, number) in goes_on:
                continue
            for other, olds in before.items():
                if _is_leaf(olds[number]):
                    called = lambda name: "no group" if name is None else f"group '{name}'"
                    raise SelectionError(
                        f"'{names[number]}' learns in {called(other)} of one tuning and in {called(group)} of the "
                        "next, so its optimizer state would be lost. Expected one name for both: "
                        f"tj.chain({other or 'head'}=...) in each tuning."
                    )


def _check_meaning(params: Any, tuning: Tuning, trainable: Any, frozen: Any, goes_on: Any, after: Any) -> None:
    """Raises where an adapter that goes on would give another leaf; what has no value yet is not looked at."""
    kept = [number for group, number in goes_on if not _is_leaf(after[group][number])]
    if not kept or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, trainable, frozen))):
        return
    flat, again = flatten(params)[0], jax.tree.leaves(tuning.merge(trainable, frozen))
    for number in kept:
        (path, leaf), other = flat[number], again[number]
        if jnp.shape(leaf) != jnp.shape(other) or not bool(jnp.allclose(leaf, other, rtol=1e-4, atol=1e-6)):
            raise SelectionError(
                f"the adapter of '{path}' goes on, but gives another leaf under the next tuning. Expected the same "
                "kind of adapter with the same alpha and rank, or a group of another name, which merges it first."
            )


def _carry(old: Any, new: Any, known: Mapping[str, bool], scopes: Mapping[str, Mapping[str, bool]]) -> Any:
    """The state ``new`` with what ``old`` has in the same place, for leaves that go on.

    Args:
      old: a node of the optimizer's state before.
      new: the same node of the fresh state.
      known: ``{path of a trainable leaf: whether it goes on}``.
      scopes: the same inside of each group, for parts of the state that hold one group; empty inside of one.
    """
    if not any(known.values()) or (type(old) is not type(new) and not _is_leaf(new)):
        return new
    if _is_leaf(new):
        alike = _is_leaf(old) and jnp.shape(old) == jnp.shape(new) and _dtype(old) == _dtype(new)
        return old if alike else new
    if isinstance(new, dict) and scopes and set(new) == set(scopes):
        # One state per group. What a masked transform keeps below a group's label has full paths.
        inside = {name: {**known, **own} if any(own.values()) else {} for name, own in scopes.items()}
        return {name: _carry(old[name], tree, inside[name], {}) if name in old else tree for name, tree in new.items()}
    before, (after, treedef) = dict(_children(old)[0]), _children(new)
    parts = {name: found for name, node in after if (found := _part(node, known))}
    loose = [name for name, node in after if _is_leaf(node) and name not in parts]
    _check_shared(type(new).__name__, loose, parts, known)
    out = []
    for name, node in after:
        below = _below(node, known)
        if name not in before or name == "hyperparams" or (below and not any(known[path] for path in below)):
            out.append(node)
        elif name in parts:
            out.append(_carried_leaves(dict(flatten(before[name])[0]), node, known))
        else:
            out.append(_carry(before[name], node, known, scopes))
    return jax.tree.unflatten(treedef, out)


def _check_shared(kind: str, loose: list[str], parts: Mapping[str, list[str]], known: Mapping[str, bool]) -> None:
    leaves = {path for found in parts.values() for path in found}
    begin = sorted(path for path in leaves if not known[path])
    if loose and begin and len(begin) < len(leaves):
        raise SelectionError(
            f"'{loose[0]}' of the optimizer's {kind} is one number for leaves that go on learning and for leaves that "
            f"begin: {listing(begin)}. Expected a state of their own for those: name them as a group, "
            "tj.chain(head=..., body=...), and write tj.finetune.each_group(optax.adam(1e-3))."
        )


def _part(node: Any, known: Mapping[str, bool]) -> list[str]:
    """The paths of a node that is shaped like the trainable leaves, all or some of them; otherwise none."""
    found = [path for path, _ in flatten(node)[0]]
    return found if all(path in known for path in found) else []


def _below(node: Any, known: Mapping[str, bool]) -> list[str]:
    """The paths of all trainable leaves of which a node keeps something."""
    if _is_leaf(node):
        return []
    return _part(node, known) or [path for _, child in _children(node)[0] for path in _below(child, known)]


def _carried_leaves(before: Mapping[str, Any], node: Any, known: Mapping[str, bool]) -> Any:
    flat, treedef = flatten(node)
    alike = lambda path, leaf: path in before and jnp.shape(before[path]) == jnp.shape(leaf)
    cast = lambda value, leaf: value if value.dtype == leaf.dtype else value.astype(leaf.dtype)
    leaves = [cast(before[path], leaf) if known[path] and alike(path, leaf) else leaf for path, leaf in flat]
    return jax.tree.unflatten(treedef, leaves)


def _children(node: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The children of a node by name, and how to make it again."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    return [(jax.tree_util.keystr(keys, simple=True), child) for keys, child in flat], treedef


def _is_leaf(node: Any) -> bool:
    return jax.tree.structure(node) == _LEAF


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", type(leaf))
