"""LoRA that begins along the directions in which a kernel's inputs vary."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from transferjax._errors import SelectionError, describe, nearest_hint
from transferjax._types import Tuning
from transferjax.tree import Selector, as_selector, matches, paths
from transferjax.tuning._inputs import Moments, kernel_axes
from transferjax.tuning._kernel import check_whole, strength
from transferjax.tuning._lora import adapter


def eva(
    selector: Selector | str,
    rank: int,
    activations: Mapping[str, Moments],
    *,
    rho: float = 2.0,
    alpha: float | None = None,
) -> Tuning:
    """LoRA whose ``A`` begins as the principal directions of the kernel's inputs, with ranks where they explain most.

    ``lora_a`` holds the top right-singular vectors of the centred inputs, ``lora_b`` zeros. The ranks of all kernels
    together stay ``rank`` per kernel; they go to the directions with the largest share of their kernel's variance, at
    most ``rho * rank`` to one kernel. A kernel that gets none is not adapted.

    Args:
      selector: kernels, all of them among ``activations``.
      rank: ``r``, the mean rank.
      activations: from :func:`transferjax.tuning.input_moments`, of data like that to be learnt. The same are needed
        to resume, as the ranks follow from them.
      rho: at least 1; 1 keeps every rank at ``r``.
      alpha: ``s = alpha / r`` for all kernels, whatever their rank, as PEFT adjusts it; ``None``: ``s = 1``. A folder
        written by ``transferjax.io.write_peft`` needs ``alpha={path: s * rank of path}``.

    Returns:
      A ``Tuning`` with the leaves of ``transferjax.lora``, float32.

    Raises:
      SelectionError: rank or rho is too small, or ``activations`` are something else; (at ``init``) a selected kernel
        has no activations, activations of another width or of fewer rows than its rank, or is too narrow for the rank.

    Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv:2410.07170;
    conventions as in Hugging Face PEFT, which centres the inputs.

    >>> import jax, jax.numpy as jnp, transferjax as tj
    >>> model = tj.interop.pure(lambda params, x: x @ params["kernel"], {"kernel": jnp.ones((3, 2))})
    >>> found = tj.tuning.input_moments(model, "kernel", [{"inputs": jnp.array([[0.0, 9, 1], [0, -9, 1], [1, 0, 1]])}])
    >>> trainable, frozen = eva("kernel", 1, found).init(jax.random.key(0), model.params)
    >>> trainable["kernel"]["lora_a"].round(3).ravel().tolist()
    [0.0, 1.0, 0.0]
    """
    selector = as_selector(selector)
    check_whole("eva", "rank", rank)
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not 1 <= rho < math.inf:
        raise SelectionError(f"eva() expects rho as a number of at least 1, got {rho!r}.")
    if not isinstance(activations, Mapping) or not all(isinstance(one, Moments) for one in activations.values()):
        raise SelectionError(
            f"eva() expects activations as {{path: Moments}}, got {describe(activations)}: write "
            "tj.tuning.input_moments(model, selector, batches)."
        )
    scale = strength("eva", rank, alpha)

    def lift(weights, leaf):
        from transferjax.program import LowRank

        return LowRank(leaf, weights["lora_a"], weights["lora_b"], scale)

    def frame(chosen: Selector, directions: Mapping[str, np.ndarray]) -> Tuning:
        def create(key, path, leaf):
            letters = kernel_axes(path, leaf)
            sizes = {own: [n for n, letter in zip(leaf.shape, letters, strict=True) if letter == own] for own in "io"}
            a = jnp.asarray(directions[path], jnp.float32)
            return {"lora_a": a.reshape(*sizes["i"], -1), "lora_b": jnp.zeros((a.shape[1], *sizes["o"]), jnp.float32)}

        return adapter(chosen, create, lambda weights, leaf: lift(weights, leaf).dense(), lift=lift)

    def init(key, params):
        leaves = paths(params)
        found = {path: _principal(path, leaves[path], activations, rank) for path in matches(params, selector)}
        ranks = _shared({path: shares for path, (_, shares) in found.items()}, rank, rho)
        kept = {path: found[path][0][:, :own] for path, own in ranks.items() if own}
        return frame(Selector(selector.name, lambda path, leaf: path in kept), kept).init(key, params)

    rest = frame(selector, {})
    return Tuning(init, rest.merge, rest.lifted)


def _principal(path: str, leaf: object, activations: Mapping[str, Moments], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The principal directions of a kernel's inputs ``[in, k]``, the widest first, and their shares of the variance."""
    letters = kernel_axes(path, leaf)
    if path not in activations:
        raise SelectionError(
            f"eva() has no activations for '{path}'.{nearest_hint(path, activations)} Gather them with the same "
            "selector: tj.tuning.input_moments(model, selector, batches)."
        )
    own, shape = activations[path], leaf.shape  # pyright: ignore[reportAttributeAccessIssue]
    wide, out = (math.prod(n for n, letter in zip(shape, letters, strict=True) if letter == kind) for kind in "io")
    if own.total.shape != (wide,):
        raise SelectionError(
            f"eva() got activations of width {own.total.shape[0]} for '{path}' {describe(leaf)}, whose inputs are "
            f"{wide} wide. Gather them from this model."
        )
    most = min(wide, out)
    if rank > most or rank >= own.count:
        raise SelectionError(
            f"eva() got rank {rank} for '{path}' {describe(leaf)} with {own.count:.0f} rows of activations: expected "
            f"at most {most}, the smaller of its widths, and fewer than the rows."
        )
    mean = own.total / own.count
    values, vectors = np.linalg.eigh(own.products / own.count - np.outer(mean, mean))
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    shares = values / max(values.sum(), np.finfo(np.float64).tiny)
    return (vectors * np.sign(largest))[:, :most], shares[:most]


def _shared(shares: Mapping[str, np.ndarray], rank: int, rho: float) -> dict[str, int]:
    """The rank of each kernel: ``rank`` times their number, given to the largest shares."""
    most = round(rank * rho)
    order = sorted(((-share, path) for path, own in shares.items() for share in own[:most]), key=lambda one: one[0])
    ranks = dict.fromkeys(shares, 0)
    for _, path in order[: rank * len(shares)]:
        ranks[path] += 1
    return ranks
