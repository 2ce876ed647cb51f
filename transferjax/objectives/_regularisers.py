"""Objectives that hold a network near its source: distances of parameters, which run no network, and mixout."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

from transferjax._errors import DataError, SelectionError, TransferError, describe, is_whole, listing, nearest_hint
from transferjax._types import Array, Batch, Loss, Model, Params
from transferjax.numerics import diagonal_fisher as numeric_fisher
from transferjax.objectives._metrics import as_partial, counted_labels, soft_targets
from transferjax.tree import Selector, as_selector, everything, fill, flatten, matches, paths, split
from transferjax.tree._modules import AUX, MODEL, is_extended


def l2_sp(
    reference: Params,
    strength: float | Array = 0.01,
    *,
    head: Selector | str | None = None,
    head_strength: float | Array | None = None,
) -> Partial:
    """L2-SP: ``strength / 2 * ||shared - reference||^2 + head_strength / 2 * ||head||^2``, over the parameters alone.

    Add it to the objective of the task with ``transferjax.objectives.total``. ``transferjax.optim.decay_towards`` is
    the same as a part of the optimizer, for what learns alone. Weights that ``transferjax.extend`` put beside the
    model's are not counted; frozen leaves that equal the reference add nothing.

    Args:
      reference: params of the source.
      strength: at least 0; a leaf.
      head: which params are drawn to zero instead; ``None``: those whose path the reference has not.
      head_strength: at least 0; a leaf. ``None``: as ``strength``.

    Returns:
      An ``Objective`` with the metrics ``squared_distance`` and ``squared_norm``; the batch is not looked at.

    Raises:
      TransferError: a strength is no number of at least 0, or ``reference`` a Model.
      SelectionError: (when traced) ``head`` matches nothing, or a leaf outside of it is not in the reference, or of
        another shape.

    Source: Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    2018, arXiv:1802.01483.

    >>> source = {"body": jnp.zeros(2), "fc": jnp.zeros(9)}
    >>> params = {"body": jnp.ones(2), "head": jnp.full(3, 2.0)}
    >>> float(l2_sp(source, 0.5, head_strength=1.0)(params, {}, {}, None, True).value)
    6.5
    """
    _check_reference(reference, "l2_sp")
    head_strength = strength if head_strength is None else head_strength
    for name, value in (("strength", strength), ("head_strength", head_strength)):
        _check_strength(value, "l2_sp", name)
    selected = None if head is None else Partial(as_selector(head))
    return Partial(_l2_sp, reference, strength, selected, head_strength)


def _l2_sp(reference, strength, head, head_strength, params, extra, batch, key, train) -> Loss:
    own, source = paths(_own(params)), paths(_own(reference))
    new = {path for path in own if path not in source} if head is None else set(matches(own, head.func))
    shared = {path: leaf for path, leaf in own.items() if path not in new}
    if not shared:
        hint = nearest_hint(next(iter(own), ""), source)
        raise SelectionError(f"l2_sp() found no leaf to hold near its reference: they share no path.{hint}")
    for path, leaf in shared.items():
        _check_pair("l2_sp", path, leaf, source, "select it with head=..., which draws it to zero")
    distance = _total(jnp.sum(jnp.square(_wide(leaf) - _wide(source[path]))) for path, leaf in shared.items())
    norm = _total(jnp.sum(jnp.square(_wide(own[path]))) for path in sorted(new))
    value = 0.5 * (strength * distance + head_strength * norm)
    return Loss(value, {"squared_distance": distance, "squared_norm": norm}, extra)


def ewc(
    fisher: Params | Sequence[Params], reference: Params | Sequence[Params], strength: float | Array = 1.0
) -> Partial:
    """Elastic weight consolidation: ``strength / 2 * sum of F * (params - reference)^2``, over the parameters alone.

    Args:
      fisher: how much each weight mattered to the former task: what :func:`diagonal_fisher` returns, or any part of
        it; several former tasks as a list.
      reference: params after that task, with at least the leaves of ``fisher``; a list with one entry per task.
      strength: at least 0; a leaf.

    Returns:
      An ``Objective``; the batch is not looked at.

    Raises:
      TransferError: ``strength`` is no number of at least 0, ``reference`` a Model, or there are not as many
        references as tasks.
      DataError: ``fisher`` has values below 0.
      SelectionError: (when traced) a leaf of ``fisher`` is not in the params or the reference, or of another shape.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017, arXiv:1612.00796.

    >>> objective = ewc({"body": jnp.array([1.0, 4.0])}, {"body": jnp.zeros(2)}, strength=2.0)
    >>> float(objective({"body": jnp.ones(2), "head": jnp.ones(3)}, {}, {}, None, True).value)
    5.0
    """
    _check_strength(strength, "ewc", "strength")
    fishers, references = _listed(fisher), _listed(reference)
    for one in (*fishers, *references):
        _check_reference(one, "ewc")
    for one in fishers:
        below = [path for path, leaf in paths(_own(one)).items() if not isinstance(leaf, Tracer) and np.any(leaf < 0)]
        if below:
            raise DataError(
                f"ewc() got a Fisher information below 0 at {listing(below)}, which none is. Expected that of "
                "diagonal_fisher() first, the params after it: ewc(fisher, reference)."
            )
    if len(fishers) != len(references) or not fishers:
        raise TransferError(
            f"ewc() expects one reference for each former task, got {len(fishers)} of fisher and {len(references)} of "
            "reference."
        )
    return Partial(_ewc, fishers, references, strength)


def _ewc(fishers, references, strength, params, extra, batch, key, train) -> Loss:
    own = paths(_own(params))
    terms = []
    for fisher, reference in zip(fishers, references, strict=True):
        source, advice = paths(_own(reference)), "leave it out of diagonal_fisher(select=...)"
        for path, importance in paths(_own(fisher)).items():
            _check_pair("ewc", path, importance, own, advice)
            _check_pair("ewc", path, importance, source, advice)
            terms.append(jnp.sum(_wide(importance) * jnp.square(_wide(own[path]) - _wide(source[path]))))
    return Loss(0.5 * strength * _total(terms), {}, extra)


def diagonal_fisher(
    model: Model,
    batches: Iterable[Batch],
    *,
    labels: str = "model",
    select: Selector | str = everything,
    key: Array | None = None,
    examples: int = 8,
) -> Params:
    """How much each weight matters to a classifier: ``mean over x of E over y of (d log p(y | x) / dw)^2``.

    One gradient per example, not one per batch. The network runs in inference mode.

    Args:
      model: a Model whose outputs are logits ``[B, C]``.
      batches: dicts with ``inputs``, and ``weight`` ``[B]`` where examples count more or less; read once.
      labels: ``"model"``: y is distributed as the network says, the Fisher information; ``"data"``: y is the batch's
        ``labels``, integers ``[B]`` or soft targets ``[B, C]``, the empirical Fisher.
      select: of which params.
      key: draws one label of the network per example; ``None``: the exact mean over all ``C``, ``C`` backward passes.
      examples: whose gradients are held at once: that many times the memory of the params.

    Returns:
      A tree like the params, float32, with a ``Hole`` for what is not selected: what :func:`ewc` takes.

    Raises:
      TransferError: no Model or no batches; ``labels`` is neither, the data's are wanted and a key is given, or
        ``examples`` is below 1.
      DataError: there is no example, no labels, outputs are no logits, or a result is not finite.
      SelectionError: ``select`` matches nothing.

    Source: Kunstner, Balles and Hennig, "Limitations of the Empirical Fisher Approximation", 2019, arXiv:1905.12558.

    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs @ params["kernel"], extra)
    >>> model = Model(apply, None, {"kernel": jnp.zeros((1, 2))}, {})
    >>> diagonal_fisher(model, [{"inputs": jnp.full((4, 1), 2.0)}])["kernel"].tolist()
    [[1.0, 1.0]]
    """
    if not isinstance(model, Model):
        raise TransferError(f"diagonal_fisher() expects a Model first, got {describe(model)}: use tj.interop.")
    if isinstance(batches, Mapping | str):
        raise TransferError(f"diagonal_fisher() expects batches, got {describe(batches)}: of one, write [batch].")
    if labels not in ("model", "data"):
        raise TransferError(f"diagonal_fisher() expects labels as 'model' or 'data', got {labels!r}.")
    if labels == "data" and key is not None:
        raise TransferError("diagonal_fisher() draws no labels from the data: leave key out, or write labels='model'.")
    if not is_whole(examples):
        raise TransferError(f"diagonal_fisher() expects a whole number of at least 1 as examples, got {examples!r}.")
    chosen, rest = split(model.params, select)
    found = numeric_fisher(
        lambda chosen, others, inputs: model.apply(fill(chosen, others[0]), others[1], inputs)[0],
        chosen,
        (rest, model.extra),
        batches,
        verb="diagonal_fisher",
        targets=_targets if labels == "data" else None,
        key=key,
        examples=examples,
    )
    broken = [path for path, leaf in paths(found).items() if not np.isfinite(leaf).all()]
    if broken:
        raise DataError(
            f"the Fisher information is not finite at {listing(broken)}. Expected finite inputs and logits, and labels "
            "within the classes."
        )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), found)


def _targets(batch: Batch, logits: Any) -> Array:
    if "labels" not in batch:
        raise DataError(f"the batch has no 'labels': it has {sorted(batch)}. Expected inputs and labels.")
    return soft_targets(logits, counted_labels({**batch, "labels": jnp.asarray(batch["labels"])}))


def mixout(
    objective: Callable[..., Loss], reference: Params, probability: float | Array, selector: Selector | str = "**"
) -> Partial:
    """Mixout: in training, entries of the parameters are replaced by the source's at random: dropout towards it.

    With ``m`` 1 at the probability and else 0, a weight is ``(m * source + (1 - m) * weight - p * source) / (1 - p)``,
    whose expectation is the weight itself. In inference mode nothing changes.

    Args:
      objective: any ``Objective``.
      reference: params of the source.
      probability: of an entry to be replaced, in [0, 1); a leaf.
      selector: which params, each with a leaf of its shape in the reference. Select what is trained: a frozen leaf
        would be drawn for nothing. Weights that ``transferjax.extend`` put beside the model's are never replaced.

    Returns:
      An ``Objective``. The key is split: one part for the draws, one for the objective.

    Raises:
      TransferError: ``probability`` is no number in [0, 1), ``reference`` a Model; (in training) the key is missing.
      SelectionError: (when traced) ``selector`` matches nothing, or a leaf has not its like in the reference.

    Source: Lee, Cho and Kang, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models",
    2020, arXiv:1909.11299.

    >>> import transferjax as tj
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params, extra)
    >>> objective = mixout(tj.objectives.mean_squared_error(apply), jnp.ones(()), 0.5)
    >>> batch = {"inputs": jnp.ones(2), "labels": jnp.zeros(2)}
    >>> values = [objective(jnp.full((), 2.0), {}, batch, jax.random.key(n), True).value for n in range(9)]
    >>> sorted({float(value) for value in values})
    [1.0, 9.0]
    """
    number = isinstance(probability, (int, float)) and not isinstance(probability, bool)
    if not (number or hasattr(probability, "dtype")) or (number and not 0 <= probability < 1):
        raise TransferError(f"mixout() expects probability as a number in [0, 1), got {probability!r}.")
    _check_reference(reference, "mixout")
    return Partial(_mixout, as_partial(objective), reference, probability, Partial(as_selector(selector)))


def _mixout(objective, reference, probability, selector, params, extra, batch, key, train) -> Loss:
    if train is False:
        return objective(params, extra, batch, key, train)
    if key is None:
        raise TransferError("mixout() needs a key in training: pass key=jax.random.key(...).")
    draws, key = jax.random.split(key)
    own, source = _own(params), paths(_own(reference))
    chosen = set(matches(own, selector.func))

    def mixed(path: str, leaf: Array) -> Array:
        if path not in chosen:
            return leaf
        _check_pair("mixout", path, leaf, source, "leave it out of the selector")
        mask = jax.random.bernoulli(jax.random.fold_in(draws, zlib.crc32(path.encode())), probability, jnp.shape(leaf))
        wide, other = _wide(leaf), _wide(source[path])
        out = (jnp.where(mask, other, wide) - probability * other) / (1 - probability)
        return out.astype(jnp.result_type(leaf))

    flat, treedef = flatten(own)
    own = jax.tree.unflatten(treedef, [mixed(path, leaf) for path, leaf in flat])
    return objective({MODEL: own, AUX: params[AUX]} if is_extended(params) else own, extra, batch, key, train)


def _own(params: Any) -> Any:
    """The model's own params, without those beside them."""
    return params[MODEL] if is_extended(params) else params


def _wide(leaf: Any) -> Array:
    return jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))


def _total(terms: Iterable[Array]) -> Array:
    return sum(terms, jnp.zeros((), jnp.float32))


def _listed(trees: Any) -> list[Any]:
    return list(trees) if isinstance(trees, (list, tuple)) and not isinstance(trees, Model) else [trees]


def _check_reference(reference: Any, verb: str) -> None:
    if isinstance(reference, Model):
        raise TransferError(f"{verb}() expects params, got a Model: write model.params.")


def _check_strength(value: Any, verb: str, name: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number or hasattr(value, "dtype")) or (number and not value >= 0):
        raise TransferError(f"{verb}() expects {name} as a number of at least 0, got {_shown(value)}.")


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float | str) else describe(value)


def _check_pair(verb: str, path: str, leaf: Any, others: dict[str, Any], advice: str) -> None:
    """Whether a leaf has its like, of its shape, on the other side."""
    if path not in others:
        raise SelectionError(
            f"{verb}(): '{path}' has no counterpart.{nearest_hint(path, others)} Expected equal paths: {advice}."
        )
    if jnp.shape(others[path]) != jnp.shape(leaf):
        raise SelectionError(
            f"{verb}(): '{path}' is {describe(leaf)} here and {describe(others[path])} there. Expected equal shapes: "
            f"{advice}."
        )
