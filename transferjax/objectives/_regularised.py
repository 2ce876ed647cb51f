"""Fine-tuning that stays close to what the source knows: supervised objectives with a second loss on features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from transferjax._errors import DataError, SelectionError, describe, listing, nearest_hint
from transferjax._types import Array, Model
from transferjax.objectives import _tuning_losses
from transferjax.objectives._beside import OUTPUTS, beside
from transferjax.objectives._distill import distill
from transferjax.objectives._logit_losses import kd
from transferjax.tree import Selector, auxiliary, paths
from transferjax.tree._modules import MODEL, is_extended

SOURCE_HEAD = "source_head"


def delta(
    supervised: Callable[[Any], Any],
    model: Model,
    source: Model,
    at: Selector | str,
    *,
    weight: float | Array = 0.01,
    channel_weights: Array | None = None,
) -> Partial:
    """Feature maps stay close to those of the source network, which may have another head.

    Args:
      supervised: as in :func:`auxiliary_loss`.
      model: what learns.
      source: the network it started from; its weights are leaves.
      at: module paths of both whose outputs are compared; of several the distances are added up.
      weight: of the distance; a leaf.
      channel_weights: ``[c]``, attention on the channels of one module, from ``losses.channel_attention``; ``None``:
        all count alike.

    Returns:
      An ``Objective`` as that of :func:`distill`; the metric ``distillation`` is the distance.

    Source: Li et al., DELTA: DEep Learning Transfer using Feature Map with Attention, 2019, arXiv:1901.09229.

    >>> import transferjax as tj
    >>> network = lambda params, x: tj.interop.mark("body", x @ params["body"]) @ params["head"]
    >>> model = tj.interop.pure(network, {"body": jnp.eye(2), "head": jnp.eye(2)})
    >>> objective = delta(tj.objectives.cross_entropy, model, model, "body")
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.array([0, 1])}
    >>> float(objective(model.params, model.extra, batch, None, True).metrics["distillation"])
    0.0
    """
    loss: Any = _tuning_losses.delta
    if channel_weights is not None:
        loss = Partial(loss, channel_weights=channel_weights)
    return distill(model, source, loss, at, supervised=supervised, weight=weight)


def lwf(
    supervised: Callable[[Any], Any],
    model: Model,
    source: Model,
    *,
    head: str = SOURCE_HEAD,
    at: str,
    temperature: float | Array = 2.0,
    weight: float | Array = 1.0,
) -> Partial:
    """Learning without forgetting: the source's head, kept beside the new one, goes on saying what the source said.

    The kept head is the auxiliary weights ``source_head``::

        kept = {name: source.params["head"]["fc"][name] for name in ("kernel", "bias")}
        model = tj.extend(model, "source_head", kept)

    Args:
      supervised: as in :func:`auxiliary_loss`.
      model: what learns, extended by the kept head.
      source: the network it started from, with logits as outputs; its weights are leaves.
      head: the name of the kept head.
      at: the module path of both whose outputs, averaged over positions, the heads take.
      temperature: of ``losses.kd``; a leaf.
      weight: of the loss; a leaf.

    Returns:
      An ``Objective`` with the metric ``source_loss``.

    Raises:
      SelectionError: the model has no such auxiliary weights.
      DataError: (when traced) the kept head fits neither the features nor the source's outputs.

    Source: Li & Hoiem, Learning without Forgetting, 2016, arXiv:1606.09282.

    >>> import transferjax as tj
    >>> network = lambda params, x: tj.interop.mark("body", x @ params["body"]) @ params["head"]
    >>> source = tj.interop.pure(network, {"body": jnp.eye(2), "head": jnp.eye(2)})
    >>> model = tj.extend(source, "source_head", {"kernel": jnp.eye(2), "bias": jnp.zeros(2)})
    >>> objective = lwf(tj.objectives.cross_entropy, model, source, at="body")
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.array([0, 1])}
    >>> float(objective(model.params, model.extra, batch, None, True).metrics["source_loss"])
    0.0
    """
    auxiliary(model.params, head)
    told = Partial(source.apply, source.params, source.extra)
    term = Partial(_kept, Partial(_Named(at, head)), told, temperature)
    return beside("lwf", supervised, model, term, at, weight, 1.0)


def bss(
    supervised: Callable[[Any], Any],
    model: Model,
    at: str,
    *,
    k: int = 1,
    weight: float | Array = 1e-3,
) -> Partial:
    """Batch spectral shrinkage: the weakest directions of a batch of features, which transfer badly, are weakened.

    Args:
      supervised: as in :func:`auxiliary_loss`.
      model: what learns.
      at: the module path whose outputs, averaged over positions, are taken.
      k: how many singular values.
      weight: of their squares' sum; a leaf.

    Returns:
      An ``Objective`` with the metric ``bss``.

    Source: Chen et al., Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for Safe Transfer
    Learning, NeurIPS 2019.

    >>> import transferjax as tj
    >>> network = lambda params, x: tj.interop.mark("body", x @ params["body"]) @ params["head"]
    >>> model = tj.interop.pure(network, {"body": 2 * jnp.eye(2), "head": jnp.eye(2)})
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.array([0, 1])}
    >>> objective = bss(tj.objectives.cross_entropy, model, "body")
    >>> float(objective(model.params, model.extra, batch, None, True).metrics["bss"])
    4.0
    """
    return beside("bss", supervised, model, Partial(_Shrunk(at, k)), at, weight, 1.0)


def co_tuning(
    supervised: Callable[[Any], Any],
    model: Model,
    relation: Array,
    *,
    head: str = SOURCE_HEAD,
    at: str,
    weight: float | Array = 2.3,
) -> Partial:
    """Co-Tuning: the source's head, kept beside the new one, predicts the source classes that the label is related to.

    Args:
      supervised: as in :func:`auxiliary_loss`.
      model: what learns, extended by the source's head as in :func:`lwf`.
      relation: ``[Ct, Cs]``, from ``losses.category_relation``; a leaf.
      head: the name of the kept head.
      at: the module path whose outputs, averaged over positions, the kept head takes.
      weight: of the loss; a leaf.

    Returns:
      An ``Objective`` with the metric ``source_loss``.

    Raises:
      SelectionError: the model has no such auxiliary weights.
      DataError: (when traced) the kept head does not fit the features.

    Source: You et al., Co-Tuning for Transfer Learning, NeurIPS 2020.

    >>> import transferjax as tj
    >>> network = lambda params, x: tj.interop.mark("body", x @ params["body"]) @ params["head"]
    >>> model = tj.interop.pure(network, {"body": jnp.eye(2), "head": jnp.eye(2)})
    >>> model = tj.extend(model, "source_head", {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(4)})
    >>> objective = co_tuning(tj.objectives.cross_entropy, model, jnp.full((2, 4), 0.25), at="body")
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.array([0, 1])}
    >>> round(float(objective(model.params, model.extra, batch, None, True).metrics["source_loss"]), 4)
    1.3863
    """
    auxiliary(model.params, head)
    term = Partial(_related, Partial(_Named(at, head)), relation)
    return beside("co_tuning", supervised, model, term, at, weight, 1.0)


def bi_tuning(
    supervised: Callable[[Any], Any],
    model: Model,
    at: str,
    *,
    classifier: str = "head/fc",
    temperature: float | Array = 0.07,
    weight: float | Array = 1.0,
) -> Partial:
    """Bi-Tuning in its in-batch form: features of one class are drawn together, and to the classifier's row.

    The sum of ``losses.contrastive_cross_entropy`` and ``losses.categorical_contrastive`` on the features themselves;
    the paper's slowly moving second network, its queue of keys and its projector are left out.

    Args:
      supervised: as in :func:`auxiliary_loss`.
      model: what learns.
      at: the module path whose outputs, averaged over positions, the classifier takes.
      classifier: the module path of the last dense layer, whose ``kernel`` is ``[d, C]``.
      temperature: divides the cosines; a leaf.
      weight: of the two losses; a leaf.

    Returns:
      An ``Objective`` with the metric ``bi_tuning``.

    Raises:
      SelectionError: the model has no such kernel.

    Source: Zhong et al., Bi-tuning of Pre-trained Representations, 2020, arXiv:2011.06182.

    >>> import transferjax as tj
    >>> network = lambda params, x: tj.interop.mark("body", x @ params["body"]) @ params["head"]["kernel"]
    >>> model = tj.interop.pure(network, {"body": jnp.eye(2), "head": {"kernel": jnp.eye(2)}})
    >>> objective = bi_tuning(tj.objectives.cross_entropy, model, "body", classifier="head", temperature=0.01)
    >>> batch = {"inputs": jnp.eye(2), "labels": jnp.array([0, 1])}
    >>> float(objective(model.params, model.extra, batch, None, True).metrics["bi_tuning"])
    0.0
    """
    _kernel(model.params, classifier)
    term = Partial(_contrasted, Partial(_Named(at, classifier)), temperature)
    return beside("bi_tuning", supervised, model, term, at, weight, 1.0)


@dataclasses.dataclass(frozen=True)
class _Named:
    """Where features are, and the name of the head that takes them."""

    at: str
    head: str

    def __call__(self) -> tuple[str, str]:
        return self.at, self.head


@dataclasses.dataclass(frozen=True)
class _Shrunk:
    """``(params, batch, layers) -> value`` of batch spectral shrinkage."""

    at: str
    k: int

    def __call__(self, params, batch, layers):
        value = _tuning_losses.bss(_pooled(layers, self.at), self.k, weight=batch.get("weight"))
        return value, {"bss": value}


def _kept(named, told, temperature, params, batch, layers):
    said = jax.tree.map(jax.lax.stop_gradient, told(batch["inputs"])[0])
    value = kd(_by_kept_head(named(), params, layers), said, temperature, weight=batch.get("weight"))
    return value, {"source_loss": value}


def _related(named, relation, params, batch, layers):
    mine = _by_kept_head(named(), params, layers)
    value = _tuning_losses.co_tuning(mine, batch["labels"], relation, weight=batch.get("weight"))
    return value, {"source_loss": value}


def _contrasted(named, temperature, params, batch, layers):
    at, classifier = named()
    features, labels, weight = _pooled(layers, at), batch["labels"], batch.get("weight")
    kernel = _kernel(params, classifier)
    value = _tuning_losses.contrastive_cross_entropy(features, labels, kernel, temperature, weight=weight)
    value += _tuning_losses.categorical_contrastive(features, features, labels, temperature, weight=weight)
    return value, {"bi_tuning": value}


def _by_kept_head(named: tuple[str, str], params: Any, layers: Mapping[str, Array]) -> Array:
    """The logits of the kept head."""
    at, name = named
    features, head = _pooled(layers, at), auxiliary(params, name)
    kernel = head.get("kernel") if isinstance(head, Mapping) else None
    if kernel is None or jnp.ndim(kernel) != 2 or kernel.shape[0] != features.shape[1]:
        raise DataError(
            f"the auxiliary weights '{name}' are {describe(kernel)}, and '{at}' makes features {describe(features)}. "
            f"Expected {{'kernel': [{features.shape[1]}, classes], 'bias': [classes]}} of the source's head."
        )
    return features @ kernel + head.get("bias", 0.0)


def _pooled(layers: Mapping[str, Any], at: str) -> Array:
    if at not in layers or jnp.ndim(layers[at]) < 2:
        found = listing([name for name in layers if name != OUTPUTS])
        raise SelectionError(f"at='{at}' selects {found}. Expected the path of one module with one output [B, ..., d].")
    return layers[at].mean(axis=tuple(range(1, layers[at].ndim - 1)))


def _kernel(params: Any, classifier: str) -> Array:
    own = params[MODEL] if is_extended(params) else params
    flat, path = paths(own), f"{classifier}/kernel"
    if path not in flat:
        raise SelectionError(f"bi_tuning(): the model has no '{path}'.{nearest_hint(path, flat, 2)} Give classifier=.")
    return flat[path]
