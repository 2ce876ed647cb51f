"""restore: a checkpoint through a plan into a model, leaf by leaf."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import CheckpointError, PlanError, describe, listing, nearest_hint
from transferjax.io._checkpoint import Checkpoint
from transferjax.io._leafwise import gathered, in_parts, spread, whole
from transferjax.io._load import place
from transferjax.io._open import open
from transferjax.surgery import Move, Plan, assemble, leaves


def restore(checkpoint: Checkpoint | str | os.PathLike[str], plan: Plan, target: Any, sharding: Any = None) -> Any:
    """Moves a checkpoint's arrays into a model, as a plan says.

    Only the arrays that the plan names are read, one target leaf at a time; dtypes change only by the plan's casts;
    fresh leaves keep the target's values. A leaf that is sharded is placed part by part: no device ever holds it
    whole, and where it is only copied, cast, transposed or cut out, each process reads no more than its own part.

    Into a framework's own object: ``nnx.update(module, restore(source, plan, nnx.state(module)))`` changes a Flax NNX
    module in place; of Linen's variables, as of any other pytree, it gives new ones.

    Args:
      checkpoint: from :func:`transferjax.io.open`, or a path, which is opened; any object with ``read`` and
        ``fingerprint``.
      plan: from ``transferjax.surgery.plan(checkpoint.shapes, target, ...)``.
      target: a ``Model``, or a pytree of arrays or ``jax.ShapeDtypeStruct``.
      sharding: one ``jax.sharding.Sharding`` for all leaves, a tree of them in the structure of ``target``, or a
        function ``(path, jax.ShapeDtypeStruct) -> Sharding``. Default: where the target's leaf lies.

    Returns:
      The same kind as ``target``; every leaf a ``jax.Array`` that shares no memory with numpy arrays of the caller.

    Raises:
      PlanError: the plan is bound to another file or made for another target.
      CheckpointError: an array that the plan names is missing or damaged, or cannot be placed.

    >>> import tempfile, numpy as np, transferjax.io as io
    >>> from transferjax.surgery import plan
    >>> file, target = tempfile.mkdtemp() + "/w.npz", {"bias": np.zeros(2, np.float32)}
    >>> np.savez(file, bias=np.ones(2, np.float32))
    >>> source = io.open(file)
    >>> restore(source, plan(source.shapes, target), target)
    {'bias': Array([1., 1.], dtype=float32)}
    """
    source = opened(checkpoint, plan, "restore")
    found = leaves(target)
    _check_target(plan, found)
    where = _placement(sharding, found)
    out: dict[str, Any] = {}
    for move in plan.moves:
        path = move.target
        if move.source is None:
            value = whole(source, plan, move, found.__getitem__)
            value = value if isinstance(value, jax.Array) else jnp.array(value, copy=True)
            out[path] = value if sharding is None else place(path, value, where(path))
        else:
            out[path] = _moved(source, plan, move, where(path))
    return assemble(target, out)


def _moved(checkpoint: Checkpoint, plan: Plan, move: Move, sharding: Any) -> jax.Array:
    sharded = isinstance(sharding, jax.sharding.Sharding) and len(sharding.device_set) > 1
    dtype = np.dtype(plan.shapes[move.target].dtype)
    if sharded and jax.dtypes.canonicalize_dtype(dtype) == dtype:
        return spread(checkpoint, plan, move, sharding)
    value = gathered(checkpoint, plan, move) if in_parts(checkpoint, plan, move) else whole(checkpoint, plan, move)
    return place(move.target, value, sharding)


def opened(checkpoint: Any, plan: Any, verb: str) -> Any:
    """The source of a plan; opened, if it is a path.

    Args:
      verb: the name of the function that asks, for errors.

    Raises:
      PlanError: this is no plan, or not one for this source.
      CheckpointError: the source is none, or cannot be opened.
    """
    if not isinstance(plan, Plan):
        write = "transferjax.surgery.plan(checkpoint.shapes, target, *rules)"
        raise PlanError(f"{verb}() expects a Plan second, got {type(plan).__name__}: write {write}.")
    checkpoint = open(checkpoint) if isinstance(checkpoint, str | os.PathLike) else checkpoint
    if not callable(getattr(checkpoint, "read", None)) or not callable(getattr(checkpoint, "fingerprint", None)):
        raise CheckpointError(
            f"{verb}() expects an opened checkpoint first, got {type(checkpoint).__name__}: write "
            "transferjax.io.open(path), or the path itself. To apply a plan to a tree: plan.apply(tree)."
        )
    if plan.fingerprint is not None and plan.fingerprint != checkpoint.fingerprint():
        raise PlanError(
            f"the plan is bound to a source with fingerprint {plan.fingerprint}; this one has "
            f"{checkpoint.fingerprint()}. Open that source, or free the plan with plan.with_source(None)."
        )
    return checkpoint


def _check_target(plan: Plan, found: dict[str, Any]) -> None:
    different = [path for path in found if path not in plan.shapes] + [p for p in plan.shapes if p not in found]
    if different:
        raise PlanError(
            f"the plan was made for another target: only one of the two has {listing(different)}."
            f"{nearest_hint(different[0], list(plan.shapes))} Make it with plan(checkpoint.shapes, target, ...)."
        )
    for path, leaf in found.items():
        shape, dtype = plan.shapes[path]
        actual = np.asarray(leaf) if not hasattr(leaf, "dtype") else leaf
        if (tuple(actual.shape), str(actual.dtype)) != (tuple(shape), dtype):
            raise PlanError(
                f"'{path}' is {describe(actual)} in the target; the plan was made for {tuple(shape)} {dtype}. "
                "Make it with plan(checkpoint.shapes, target, ...)."
            )


def _lies(leaf: Any) -> Any:
    """Where a leaf is bound to lie; ``None`` for one that is free to be used with any other."""
    return leaf.sharding if getattr(leaf, "committed", True) and hasattr(leaf, "sharding") else None


def _placement(sharding: Any, found: dict[str, Any]) -> Callable[[str], Any]:
    if sharding is None:
        return lambda path: _lies(found[path])
    if isinstance(sharding, jax.sharding.Sharding):
        return lambda path: sharding
    if callable(sharding):
        return lambda path: sharding(path, jax.ShapeDtypeStruct(found[path].shape, found[path].dtype))
    given = leaves(sharding)
    wrong = [path for path in found if not isinstance(given.get(path), jax.sharding.Sharding)]
    if wrong or len(given) != len(found):
        raise PlanError(
            f"sharding has no jax.sharding.Sharding for {listing(wrong) or 'paths of its own only'}. "
            "Expected one, a tree of them in the structure of the target, or a function (path, shape) -> Sharding."
        )
    return given.__getitem__
