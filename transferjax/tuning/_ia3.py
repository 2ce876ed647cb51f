"""Infused adapter by inhibiting and amplifying inner activations, (IA)^3."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import SelectionError, describe
from transferjax._types import Hole, Tuning, is_hole
from transferjax.tree import Selector, as_selector, flatten, matches
from transferjax.tuning._kernel import positions, widths
from transferjax.tuning._lora import adapter

IN, OUT = "ia3_in", "ia3"


def ia3(selector: Selector | str, feedforward: Selector | str | None = None) -> Tuning:
    """(IA)^3: one learnt factor per feature; out-features by default, in-features of feed-forward layers.

    The factors of out-features scale the whole output, so the leaf ``bias`` beside the kernel is scaled too and belongs
    to this tuning: another group of a chain that claims it raises.

    Args:
      selector: kernels of shape ``[in, out]`` or ``[h, w, in, out]``: keys, values and feed-forward layers.
      feedforward: those of the selected kernels whose in-features are scaled instead; no bias is touched there.

    Returns:
      A ``Tuning``. Under a kernel's path it has ``ia3`` (``[out]``) or ``ia3_in`` (``[in]``), ones, float32.

    Raises:
      SelectionError: (at ``init``) a selected leaf is no kernel, ``feedforward`` matches none of the selected ones, two
        selected kernels share a bias, or the bias has another shape than the out-features.

    Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022.

    >>> import jax, jax.numpy as jnp
    >>> params = {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "down": {"kernel": jnp.ones((3, 2))}}
    >>> trainable, frozen = ia3("**/kernel", feedforward="down/*").init(jax.random.key(0), params)
    >>> trainable["up"]["kernel"]["ia3"].shape, trainable["down"]["kernel"]["ia3_in"].shape
    ((3,), (3,))
    """
    selector = as_selector(selector)
    inward = None if feedforward is None else as_selector(feedforward)

    def create(key, path, leaf):
        inner, out = widths("ia3", path, leaf)
        if inward is not None and inward(path, leaf):
            return {IN: jnp.ones(inner[-1:], jnp.float32)}
        return {OUT: jnp.ones((out,), jnp.float32)}

    def lift(weights, leaf):
        from transferjax.program import Scaled

        return (
            Scaled(leaf, weights[IN], (leaf.ndim - 2,))
            if IN in weights
            else Scaled(leaf, weights[OUT], (leaf.ndim - 1,))
        )

    kernels = adapter(selector, create, lambda weights, leaf: lift(weights, leaf).dense(), lift=lift)

    def init(key, params):
        chosen = matches(params, selector)
        _check_feedforward(params, chosen, inward)
        trainable, frozen = kernels.init(key, params)
        flat, treedef = flatten(params)
        learns = treedef.flatten_up_to(trainable)
        owners = _biases([path for path, _ in flat], learns)
        for path, (kernel, weights) in owners.items():
            _check_bias(path, kernel, dict(flat)[path], weights)
        # The bias has no weights of its own, but it is claimed: an empty dict stands where others have a Hole.
        learns = [{} if path in owners else own for own, (path, _) in zip(learns, flat)]
        return jax.tree.unflatten(treedef, learns), frozen

    def each(method):
        def run(trainable, frozen):
            flat, treedef = positions(frozen)
            learns = treedef.flatten_up_to(trainable)
            owners = _biases([path for path, _ in flat], learns)
            own = [Hole() if path in owners else weights for weights, (path, _) in zip(learns, flat)]
            adapted = treedef.flatten_up_to(method(jax.tree.unflatten(treedef, own), frozen))
            for number, (path, leaf) in enumerate(flat):
                if path in owners and not is_hole(leaf):
                    adapted[number] = leaf * owners[path][1][OUT]
            return jax.tree.unflatten(treedef, adapted)

        return run

    return Tuning(init, each(kernels.merge), each(kernels.lifted))


def _biases(names: list[str], learns: list[Any]) -> dict[str, tuple[str, Any]]:
    """``{path of a bias: (path of its kernel, the kernel's weights)}`` of all kernels whose out-features are scaled."""
    known, found = set(names), {}
    for path, weights in zip(names, learns, strict=True):
        if is_hole(weights) or OUT not in weights:
            continue
        module, slash, _ = path.rpartition("/")
        bias = f"{module}{slash}bias"
        if bias not in known:
            continue
        if bias in found:
            raise SelectionError(
                f"ia3() would scale the bias '{bias}' twice, with '{found[bias][0]}' and with '{path}'. Expected one "
                "selected kernel per module: narrow the selector."
            )
        found[bias] = (path, weights)
    return found


def _check_feedforward(params: Any, chosen: list[str], inward: Selector | None) -> None:
    if inward is not None and not set(chosen) & set(matches(params, inward)):
        raise SelectionError(
            f"ia3() got feedforward={inward!r}, which matches none of the selected kernels ({chosen[0]}, ...). "
            "Expected a part of them: select the feed-forward kernels too."
        )


def _check_bias(path: str, kernel: str, bias: Any, weights: Any) -> None:
    if tuple(getattr(bias, "shape", ())) != weights[OUT].shape:
        raise SelectionError(
            f"ia3() scales the bias '{path}' along with '{kernel}': expected the shape {weights[OUT].shape}, got "
            f"{describe(bias)}. Leave the kernel out of the selector."
        )
