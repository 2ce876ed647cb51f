"""Several adapters on one frozen base: each example of a batch goes through its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from transferjax._errors import DataError, SelectionError, describe, listing
from transferjax._types import Apply, Extra, Params, PyTree, Tuning
from transferjax.tree import flatten


def stack_adapters(adapters: Mapping[str, PyTree]) -> PyTree:
    """Trainable halves of one tuning as one tree, with a leading axis of adapters in the order of the mapping.

    To switch or to remove an adapter needs no arithmetic: ``tuning.merge(adapters[name], frozen)`` are the weights
    with one of them, and ``tuning.init(key, params)[0]``, a fresh one, merges to the base, bit for bit; put it among
    the others for the examples that want none.

    Args:
      adapters: ``{name: trainable}``, all of one ``Tuning`` on one base.

    Returns:
      Their tree, each leaf ``[K, ...]``; example ``b`` gets ``list(adapters)[index[b]]``.

    Raises:
      SelectionError: there is no adapter, or two differ in structure, shape or dtype: names and path are given.

    >>> import jax.numpy as jnp
    >>> stack_adapters({"cats": {"head": jnp.zeros(2)}, "dogs": {"head": jnp.ones(2)}})["head"].tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise SelectionError(
            f"stack_adapters() expects a dict {{name: trainable}} with at least one adapter, got {describe(adapters)}."
        )
    (first, one), *others = adapters.items()
    leaves, treedef = flatten(one)
    for name, other in others:
        own, outline = flatten(other)
        before, after = dict(leaves), dict(own)
        for path in [*before, *after]:
            was, came = (describe(tree[path]) if path in tree else "no leaf" for tree in (before, after))
            if was != came:
                raise SelectionError(
                    f"stack_adapters() expects adapters of one tuning; '{path}' is {was} in '{first}' and {came} in "
                    f"'{name}'. Stack those of another tuning by themselves."
                )
        if outline != treedef:
            raise SelectionError(
                f"stack_adapters() expects adapters of one tuning; '{first}' and '{name}' are trees of another outline."
            )
    return jax.tree.map(lambda *each: jnp.stack(each), *adapters.values())


def apply_stacked(apply: Apply, tuning: Tuning, *, strict: bool = True) -> Callable[..., Any]:
    """A function that runs a batch in which each example has its own adapter, over one frozen base.

    The adapters are taken per example, the base is not: its products are those of the whole batch, and a low-rank
    adapter adds ``(x @ A) @ B`` with the factors of its example. Leaves that a tuning trains whole, such as a head,
    are gathered per example. The model runs in inference mode, each example as a batch of one, so nothing in it may
    need more than one.

    Args:
      apply: ``model.apply``.
      tuning: what the adapters were trained with.
      strict: whether an adapter that only a merged weight would do for, one per example, raises; with ``False`` the
        weights are built.

    Returns:
      ``(stacked, frozen, extra, inputs, index) -> outputs``, pure. ``stacked`` is made by :func:`stack_adapters`,
      ``index [B]`` (integers) says which adapter each example has, ``inputs`` is an array ``[B, ...]`` or a dict of
      such; the outputs have the leading axis ``B``. An index out of range raises, and where it is traced it makes
      that example's outputs NaN.

    Raises:
      SelectionError: ``apply`` is no function or ``tuning`` no ``Tuning``; the tuning has no lifted form and ``strict``
        holds; (when called) an adapter's weight would have to be built, or an index is out of range.
      DataError: (when called) inputs, index and outputs do not have one example axis.

    Source: Sheng et al., "S-LoRA", arXiv:2311.03285, and Wen and Chaudhuri, "Batched Low-Rank Adaptation of
    Foundation Models", arXiv:2312.05677, for one adapter per example.

    >>> import jax, jax.numpy as jnp, transferjax as tj
    >>> model = tj.interop.pure(lambda params, x: x @ params["kernel"], {"kernel": jnp.ones((3, 2))})
    >>> tuning = tj.lora("kernel", rank=1)
    >>> trainable, frozen = tuning.init(jax.random.key(0), model.params)
    >>> adapters = {"base": trainable, "ones": jax.tree.map(jnp.ones_like, trainable)}
    >>> run = apply_stacked(model.apply, tuning)
    >>> run(stack_adapters(adapters), frozen, model.extra, jnp.ones((2, 3)), jnp.array([1, 0])).tolist()
    [[6.0, 6.0], [3.0, 3.0]]
    """
    if not callable(apply):
        raise SelectionError(
            f"apply_stacked() expects an apply function first, got {describe(apply)}: write model.apply."
        )
    if not isinstance(tuning, Tuning):
        raise SelectionError(f"apply_stacked() expects a Tuning second, got {describe(tuning)}: write tj.lora(...).")
    if tuning.lifted is None and strict:
        raise SelectionError(
            "apply_stacked() got a tuning without a lifted form, whose weights would be built for each example. "
            "Expected one of low rank or of factors, such as tj.lora; or allow the weights with strict=False."
        )
    form = tuning.lifted or tuning.merge

    def run(stacked: PyTree, frozen: Params, extra: Extra, inputs: Any, index: Any) -> Any:
        from transferjax.program import lift

        count = _check_index(stacked, index)
        _check_axis("inputs", inputs, count)
        leaves, axes, treedef = _forms(form, stacked, frozen)
        index = jnp.asarray(index)
        index = jnp.where(index < 0, jnp.iinfo(index.dtype).max, index)  # -1 would mean the last one

        def one(number, example):
            own = [
                leaf if axis is None else leaf.at[number].get(mode="fill")
                for leaf, axis in zip(leaves, axes, strict=True)
            ]
            call = lambda params: apply(params, extra, jax.tree.map(lambda x: x[None], example))[0]
            outputs = lift(call, strict=strict)(jax.tree.unflatten(treedef, own))
            _check_axis("outputs", outputs, 1)
            return jax.tree.map(lambda x: x[0], outputs)

        return jax.vmap(one)(index, inputs)

    return run


def _forms(form: Callable[[Any, Any], Any], stacked: Any, frozen: Any) -> tuple[list[Any], list[int | None], Any]:
    """The leaves of the lifted parameters, axis 0 where they differ from adapter to adapter, and their structure."""
    from transferjax.program import dependencies

    flat = lambda trainable, frozen: [jnp.asarray(leaf) for leaf in jax.tree.leaves(form(trainable, frozen))]
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)
    count = len(jax.tree.leaves(stacked))
    found = dependencies(jax.make_jaxpr(flat)(first, frozen))
    axes = [0 if any(number < count for number in sources) else None for sources in found]
    treedef = jax.tree.structure(jax.eval_shape(form, first, frozen))
    return jax.vmap(flat, (0, None), axes)(stacked, frozen), axes, treedef


def _check_index(stacked: Any, index: Any) -> int:
    """How many examples there are."""
    if jnp.ndim(index) != 1 or not jnp.issubdtype(jnp.result_type(index), jnp.integer):
        raise DataError(
            f"apply_stacked() expects index as integers [B], one adapter per example; got {describe(index)}."
        )
    adapters = {leaf.shape[0] for leaf in jax.tree.leaves(stacked)}
    if len(adapters) != 1:
        raise SelectionError(
            f"apply_stacked() expects adapters with one leading axis, got {sorted(adapters)} adapters. Make them with "
            "stack_adapters({name: trainable})."
        )
    (size,) = adapters
    if not isinstance(index, Tracer):
        wrong = sorted({int(i) for i in jnp.asarray(index) if not 0 <= i < size})
        if wrong:
            raise SelectionError(
                f"apply_stacked() got index {listing([*map(str, wrong)], 3)} of {size} adapters, counted from 0."
            )
    return jnp.shape(index)[0]


def _check_axis(what: str, tree: Any, count: int) -> None:
    for path, leaf in flatten(tree)[0]:
        if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != count:
            raise DataError(
                f"apply_stacked() expects {what} with a leading axis of {count} example{'s' * (count > 1)}; "
                f"'{path}' is {describe(leaf)}."
            )
