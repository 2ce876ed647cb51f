"""A frozen base in fewer bits, under any tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import SelectionError, describe, listing
from transferjax._report import Report
from transferjax._types import Params, Tuning, is_hole
from transferjax.program import is_lifted, quantise_int8, quantise_nf4
from transferjax.tree import Selector, as_selector, flatten, matches, where

KINDS: dict[str, Callable[[Any], Any]] = {"int8": quantise_int8, "nf4": quantise_nf4}


def quantise(selector: Selector | str, kind: str, tuning: Tuning) -> Tuning:
    """A tuning whose frozen kernels are kept in fewer bits: ``quantise("**/kernel", "int8", tj.lora(...))``.

    Only the frozen tree changes: ``merge`` gives back dense weights, those that the bits stand for, and the lifted
    form, which ``make_step`` uses, multiplies by them without keeping a dense copy of the base.

    Args:
      selector: frozen floating-point leaves of at least two axes, resolved against the original parameters.
      kind: ``"int8"``: symmetric, one scale per output channel (a quarter of float32); ``"nf4"``: 4-bit NormalFloat in
        blocks of 64, whose scales are themselves quantised (about a seventh).
      tuning: what learns; adapters may lie on quantised leaves.

    Returns:
      A ``Tuning``. ``merge(*init(key, params))`` is ``params`` with each selected leaf rounded.

    Raises:
      SelectionError: ``kind`` is neither; ``tuning`` is no ``Tuning``; (at ``init``) the selector matches nothing, a
        leaf that learns whole, or one that is no floating-point matrix.

    >>> import jax, jax.numpy as jnp, transferjax as tj
    >>> tuning = quantise("fc", "int8", tj.lora("fc", rank=1))
    >>> trainable, frozen = tuning.init(jax.random.key(0), {"fc": jnp.eye(4)})
    >>> frozen["fc"].codes.dtype, tuning.merge(trainable, frozen)["fc"][0].tolist()
    (dtype('int8'), [1.0, 0.0, 0.0, 0.0])

    Source: Dettmers et al., "QLoRA", arXiv:2305.14314.
    """
    selector, convert = as_selector(selector), _convert(kind)
    if not isinstance(tuning, Tuning):
        raise SelectionError(
            f"quantise() expects a Tuning third, got {describe(tuning)}: write quantise('**/kernel', 'int8', "
            "tj.lora('**/kernel', rank=8))."
        )

    def init(key, params):
        chosen = set(matches(params, selector))
        trainable, frozen = tuning.init(key, params)
        flat, treedef = flatten(params)
        stays = treedef.flatten_up_to(frozen)
        for number, (path, leaf) in enumerate(flat):
            if path in chosen:
                _check(path, leaf, stays[number])
                stays[number] = convert(jnp.asarray(stays[number]))
        return trainable, jax.tree.unflatten(treedef, stays)

    def merge(trainable, frozen):
        return tuning.merge(trainable, _dense(frozen)[0])

    def lifted(trainable, frozen):
        if tuning.lifted is not None:
            return tuning.lifted(trainable, frozen)
        dense, origin = _dense(frozen)
        # What merging passes on as it is stays quantised; the dense copy is then used by nothing.
        return jax.tree.map(lambda leaf: origin.get(id(leaf), leaf), tuning.merge(trainable, dense))

    return Tuning(init, merge, lifted)


def frozen_matrices(tuning: Tuning, params: Params) -> Selector:
    """What there is to quantise under a tuning: the frozen floating-point leaves of two axes and more.

    Args:
      tuning: what learns.
      params: the weights, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      A ``Selector`` for :func:`quantise`; leaves that are in few bits already are not among its matches.

    Raises:
      SelectionError: ``tuning`` is no ``Tuning``, or it freezes no such leaf.

    >>> import jax.numpy as jnp, transferjax as tj
    >>> params = {"stem": jnp.eye(4), "bias": jnp.ones(4), "head": jnp.eye(4)}
    >>> tj.tree.matches(params, frozen_matrices(tj.train("head"), params))
    ['stem']
    """
    if not isinstance(tuning, Tuning):
        raise SelectionError(f"frozen_matrices() expects a Tuning first, got {describe(tuning)}.")
    frozen = jax.eval_shape(tuning.init, jax.random.key(0), params)[1]
    flat, treedef = flatten(params)
    stays = zip((path for path, _ in flat), treedef.flatten_up_to(frozen), strict=True)
    chosen = {path for path, leaf in stays if not is_hole(leaf) and not is_lifted(leaf) and _is_matrix(leaf)}
    if not chosen:
        raise SelectionError(
            "the tuning freezes no floating-point matrix, so there is nothing to quantise. Expected one that does, for "
            "example tj.lora('**/kernel', rank=8)."
        )
    return where(lambda path, leaf: path in chosen, "frozen matrices")


def quantisation_error(params: Params, selector: Selector | str, kind: str) -> Report:
    """What quantising would cost and save, leaf by leaf.

    Args:
      params: the weights.
      selector: as for :func:`quantise`.
      kind: ``"int8"`` or ``"nf4"``.

    Returns:
      A ``Report``: path, relative error in the Frobenius norm, bytes before and after; the totals are in the metadata.

    Raises:
      SelectionError: as for :func:`quantise`.

    >>> import jax.numpy as jnp
    >>> report = quantisation_error({"fc": jnp.eye(64)}, "fc", "int8")
    >>> report.column("bytes"), report.column("quantised")
    ([16384], [4352])
    """
    convert, chosen = _convert(kind), set(matches(params, as_selector(selector)))
    rows = []
    for path, leaf in flatten(params)[0]:
        if path in chosen:
            _check(path, leaf, leaf)
            before = np.asarray(leaf, np.float32)
            made = convert(jnp.asarray(leaf))
            error = np.linalg.norm(np.asarray(made.dense(), np.float32) - before) / max(np.linalg.norm(before), 1e-30)
            rows.append((path, float(error), leaf.nbytes, sum(part.nbytes for part in jax.tree.leaves(made))))
    total, quantised = (sum(row[column] for row in rows) for column in (2, 3))
    facts = {"bytes": total, "quantised": quantised, "ratio": quantised / total}
    return Report(f"Quantisation to {kind}", ("path", "relative error", "bytes", "quantised"), tuple(rows), facts)


def _dense(frozen: Any) -> tuple[Any, dict[int, Any]]:
    """The frozen tree with arrays only, and of which leaf each new array is."""
    leaves, treedef = jax.tree.flatten(frozen, is_leaf=is_lifted)
    made = [leaf.dense() if is_lifted(leaf) else leaf for leaf in leaves]
    origin = {id(new): leaf for new, leaf in zip(made, leaves, strict=True) if new is not leaf}
    return jax.tree.unflatten(treedef, made), origin


def _convert(kind: Any) -> Callable[[Any], Any]:
    if not isinstance(kind, str) or kind not in KINDS:
        raise SelectionError(f"quantise() knows the kinds {listing(list(KINDS))}, got {kind!r}.")
    return KINDS[kind]


def _is_matrix(leaf: Any) -> bool:
    return getattr(leaf, "ndim", 0) >= 2 and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _check(path: str, leaf: Any, stays: Any) -> None:
    if is_hole(stays):
        raise SelectionError(
            f"quantise() selects '{path}', which learns as a whole. Expected frozen leaves: narrow the selector, for "
            "example selector & ~glob('head/**')."
        )
    if not _is_matrix(leaf):
        raise SelectionError(
            f"quantise() expects floating-point matrices; '{path}' is {describe(leaf)}. Narrow the selector, for "
            "example to '**/kernel'."
        )
