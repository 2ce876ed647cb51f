"""Low-rank adaptation, and the frame of every adapter."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import SelectionError, describe, is_whole
from transferjax._types import Hole, Tuning, is_hole
from transferjax.tree import Selector, as_selector, flatten, matches
from transferjax.tuning._patterns import per_pattern


def adapter(
    selector: Selector | str,
    create: Callable[[jax.Array, str, Any], dict[str, Any]],
    combine: Callable[[dict[str, Any], Any], Any],
    *,
    keep: Callable[[dict[str, Any], Any], Any] | None = None,
    lift: Callable[[dict[str, Any], Any], Any] | None = None,
) -> Tuning:
    """A tuning that puts new weights beside frozen leaves: the frame of every adapter.

    Args:
      selector: which leaves are adapted.
      create: ``(key, path, leaf) -> {name: array}``, the new weights of one leaf; the key differs per path and
        is consumed.
      combine: ``(weights, leaf) -> leaf``, the adapted leaf of the frozen array; for fresh weights the original.
      keep: ``(weights, leaf) -> leaf``, what is frozen in place of the leaf, of its shape and dtype; ``None``: the leaf
        itself.
      lift: ``(weights, leaf) -> lifted leaf`` with ``combine(weights, leaf) == lift(weights, leaf).dense()``, for
        example a ``transferjax.program.LowRank``; ``leaf`` may itself be a lifted one. ``None``: there is none.

    Returns:
      A ``Tuning`` whose trainable paths are ``<path>/<name>`` and whose frozen tree keeps the leaf.

    Raises:
      SelectionError: (at ``init``) the selector matches nothing, or ``create`` returns no dict of arrays.

    >>> import jax, jax.numpy as jnp
    >>> scale = adapter("fc", lambda key, path, leaf: {"scale": jnp.ones(())}, lambda w, leaf: leaf * w["scale"])
    >>> trainable, frozen = scale.init(jax.random.key(0), {"fc": jnp.ones(2)})
    >>> sorted(trainable["fc"]), scale.merge(trainable, frozen)["fc"].shape
    (['scale'], (2,))
    """
    selector = as_selector(selector)

    def init(key, params):
        chosen = set(matches(params, selector))
        flat, treedef = flatten(params)
        fresh = [
            _named_arrays(create(jax.random.fold_in(key, zlib.crc32(path.encode())), path, leaf), path)
            if path in chosen
            else Hole()
            for path, leaf in flat
        ]
        trainable = jax.tree.unflatten(treedef, fresh)
        if keep is None:
            return trainable, params
        kept = [keep(new, leaf) if isinstance(new, dict) else leaf for new, (_, leaf) in zip(fresh, flat, strict=True)]
        return trainable, jax.tree.unflatten(treedef, kept)

    def each(adapt: Any) -> Any:
        def run(trainable, frozen):
            from transferjax.program import is_lifted

            leaves, treedef = jax.tree.flatten(frozen, is_leaf=lambda x: is_hole(x) or is_lifted(x))
            weights = treedef.flatten_up_to(trainable)
            out = [leaf if is_hole(w) else adapt(w, leaf) for w, leaf in zip(weights, leaves, strict=True)]
            return jax.tree.unflatten(treedef, out)

        return run

    of_array = lambda w, leaf: combine(w, leaf.dense() if hasattr(leaf, "dense") else leaf)
    return Tuning(init, each(of_array), None if lift is None else each(lift))


def _named_arrays(weights: Any, path: str) -> dict[str, Any]:
    """What ``create`` returned for one leaf, checked."""
    came = None
    if not isinstance(weights, dict):
        came = describe(weights)
    elif not weights:
        came = "an empty dict"
    else:
        for name, value in weights.items():
            if not isinstance(name, str) or not (hasattr(value, "shape") and hasattr(value, "dtype")):
                came = f"{describe(value)} under {name!r}"
    if came is not None:
        raise SelectionError(
            f"adapter() expects create to return a dict {{name: array}}; for '{path}' it returned {came}. "
            "Write, for example, {'scale': jnp.ones(())}."
        )
    return weights


def lora(
    selector: Selector | str,
    rank: Any,
    *,
    alpha: float | Mapping[str, float] | None = None,
    rank_stabilised: bool = False,
    axes: Mapping[str, str] | None = None,
    max_rank: int | Mapping[str, int] | None = None,
) -> Tuning:
    """Low-rank adaptation: a kernel ``W`` becomes ``W + s * A @ B``, and only ``A`` and ``B`` learn.

    Args:
      selector: kernels of shape ``[in, out]`` (dense), ``[h, w, in, out]`` (convolution), ``[in, heads, dim]`` in a
        module called ``query``, ``key`` or ``value``, or ``[heads, dim, out]`` in one called ``out``.
      rank: ``r``, the width of the bottleneck, or ``{glob: r}``; the first glob that matches a leaf's path counts.
      alpha: ``s = alpha / r``, or ``{glob: alpha}``; ``None`` means ``alpha = r``, so ``s = 1``.
      rank_stabilised: ``s = alpha / sqrt(r)`` instead (rsLoRA).
      axes: ``{glob: letters}`` for other kernels, one letter per axis: ``l`` the layers of a scanned model (first),
        ``i`` inputs, then ``o`` outputs; the first glob that matches a leaf's path counts. For example
        ``{"layers/*/query/kernel": "lioo", "layers/**": "lio"}``.
      max_rank: shapes are those of this rank, or ``{glob: rank}``, and ``rank`` may be a scalar array, such as a value
        of a ``sweep``. What lies beyond ``rank`` begins as zeros, is masked and gets zero gradients, so that the
        result is that of ``rank`` alone for any optimizer that works entry by entry. An array outside of
        ``[1, max_rank]`` makes the outputs NaN. A file needs the shapes of ``lora(selector, rank)``: the first entries
        along each axis are they. ``None``: shapes are those of ``rank``, a whole number.

    Returns:
      A ``Tuning``. ``lora_a`` has shape ``[..., in, r]`` (Kaiming-uniform, a = sqrt 5; the first columns are the same
      whatever the rank), ``lora_b`` has shape ``[r, out...]`` (zeros), both float32, with ``max_rank`` in place of
      ``r`` if it is given; for a stack of layers both have a leading axis of layers. Merging promotes:
      a bfloat16 kernel with float32 adapters merges in float32. Its lifted form computes ``x @ W + s * (x @ A) @ B``.

    Raises:
      SelectionError: a rank is no whole number of at least 1, or above ``max_rank``; (at ``init``) a selected leaf is
        no kernel, or one of which inputs and outputs cannot be told apart; the rank exceeds its dimensions; a mapping
        has no glob for a leaf or one that decides for none.

    Source: Hu et al., "LoRA", 2021; conventions as in Hugging Face PEFT.

    >>> import jax, jax.numpy as jnp
    >>> trainable, frozen = lora("fc/kernel", rank=2).init(jax.random.key(0), {"fc": {"kernel": jnp.ones((8, 4))}})
    >>> {name: leaf.shape for name, leaf in trainable["fc"]["kernel"].items()}
    {'lora_a': (8, 2), 'lora_b': (2, 4)}
    """
    table = {} if axes is None else {glob: (as_selector(glob), letters) for glob, letters in axes.items()}

    def build(selector, rank, alpha, max_rank):
        width, scale, mask = _width(rank, alpha, rank_stabilised, max_rank)
        return _lora(selector, width, scale, mask, tuple(table.values()))

    tuning = per_pattern("lora", build, selector, {"rank": rank, "alpha": alpha, "max_rank": max_rank})
    if not table:
        return tuning

    def init(key, params):
        for chosen, _ in table.values():
            matches(params, chosen)
        return tuning.init(key, params)

    return tuning._replace(init=init)


def _width(rank: Any, alpha: Any, rank_stabilised: bool, max_rank: Any) -> tuple[Any, Any, Any]:
    """The rank of the shapes, the factor of the product, and what masks the columns beyond the rank."""
    array = max_rank is not None and isinstance(rank, jax.Array)
    known = is_whole(rank) if not array else rank.shape == () and jnp.issubdtype(rank.dtype, jnp.integer)
    for name, value, fits in (("rank", rank, known), ("max_rank", max_rank, max_rank is None or is_whole(max_rank))):
        if not fits:
            raise SelectionError(f"lora() expects a whole number of at least 1 as {name}, got {value!r}.")
    root = (jnp.sqrt if array else math.sqrt) if rank_stabilised else lambda rank: rank
    scale = (rank if alpha is None else alpha) / root(rank)
    if max_rank is None:
        return rank, scale, lambda a: a
    if array:
        scale = jnp.where((rank >= 1) & (rank <= max_rank), scale, jnp.nan)
    elif rank > max_rank:
        raise SelectionError(f"lora() got rank {rank} above max_rank {max_rank}. Expected at most max_rank.")
    return max_rank, scale, lambda a: jnp.where(jnp.arange(max_rank) < rank, a, 0)


def _lora(selector: Selector, rank: int, scale: Any, mask: Callable[[Any], Any], axes: Any) -> Tuning:
    def create(key, path, leaf):
        letters = _letters(path, leaf, axes)
        sizes = {
            letter: [size for size, own in zip(leaf.shape, letters, strict=True) if own == letter] for letter in "lio"
        }
        fan_in, out = math.prod(sizes["i"]), math.prod(sizes["o"])
        if rank > min(fan_in, out):
            raise SelectionError(
                f"lora() got rank {rank} for '{path}' {describe(leaf)}: expected at most {min(fan_in, out)}, "
                "the smaller of its input and output widths."
            )
        bound = 1.0 / math.sqrt(fan_in)
        drawn = jax.random.uniform(key, (rank, *sizes["l"], *sizes["i"]), jnp.float32, -bound, bound)
        return {
            "lora_a": mask(jnp.moveaxis(drawn, 0, -1)),
            "lora_b": jnp.zeros((*sizes["l"], rank, *sizes["o"]), jnp.float32),
        }

    def lift(weights, leaf):
        from transferjax.program import LowRank, Quantised, Stacked

        a, b = mask(weights["lora_a"]), weights["lora_b"]
        if a.ndim + b.ndim - 2 == leaf.ndim:
            return LowRank(leaf, a, b, scale)
        layers = leaf.layered() if isinstance(leaf, Quantised) else leaf
        return Stacked(LowRank(leaf.dense() if layers is None else layers, a, b, scale))

    return adapter(selector, create, lambda weights, leaf: lift(weights, leaf).dense(), lift=lift)


_ATTENTION = {"query": "ioo", "key": "ioo", "value": "ioo", "out": "iio"}


def _letters(path: str, leaf: Any, axes: Sequence[tuple[Selector, str]]) -> str:
    """``l``, ``i`` or ``o`` per axis of a kernel: layers, inputs, outputs."""
    ndim = len(getattr(leaf, "shape", ()))
    if ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise SelectionError(
            f"lora() expects kernels [in, out] or [h, w, in, out]; '{path}' is {describe(leaf)}. "
            "Narrow the selector, for example to '**/kernel'."
        )
    for chosen, letters in axes:
        if chosen(path, leaf):
            if len(letters) != ndim or not re.fullmatch("l?i+o+", letters):
                raise SelectionError(
                    f"lora() got axes {letters!r} for '{path}' {describe(leaf)}. Expected one letter per axis: 'l' for "
                    "layers (first, at most one), 'i' for inputs, then 'o' for outputs."
                )
            return letters
    module = path.split("/")[-2] if "/" in path else ""
    if ndim == 2 or (ndim == 4 and module not in _ATTENTION):
        return "io" if ndim == 2 else "iiio"
    if ndim == 3 and module in _ATTENTION:
        return _ATTENTION[module]
    example = "lio" + "o" * (ndim - 3)
    raise SelectionError(
        f"lora() cannot tell the inputs of '{path}' {describe(leaf)} from its outputs. Pass axes={{'{path}': letters}} "
        f"with one letter per axis: 'l' layers, 'i' inputs, 'o' outputs, for example '{example}'."
    )
