"""Losses that keep a fine-tuned network near its source, or use the source's classes: losses of arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, TransferError, describe, is_whole, listing
from transferjax._types import Array
from transferjax.objectives._confusion import as_logits
from transferjax.objectives._feature_losses import (
    PRECISE,
    as_bank,
    as_weight,
    average,
    candidates,
    counted,
    flat,
    matched,
    unit,
)
from transferjax.objectives._metrics import soft_cross_entropy


def delta(
    student_map: Array, teacher_map: Array, channel_weights: Array | None = None, *, weight: Array | None = None
) -> Array:
    """DELTA's behavioural distance: how far feature maps moved from those of the source network.

    Per example ``.5 * sum over channels of ||s_k - t_k||^2``; with attention ``.5 * c / positions * sum of
    a_k ||s_k - t_k||^2``. The values per layer are the Transfer-Learning-Library's, which sums over the batch where
    this is the mean: its strengths are to be multiplied by its batch size.

    Args:
      student_map: ``[B, h, w, c]``, or any ``[B, ..., c]``, of the network that learns.
      teacher_map: the same of the source network; no gradient flows to it.
      channel_weights: ``[c]``, the attention ``a`` of :func:`channel_attention`, which sums to 1.
      weight: ``[B]``, how much each example counts.

    Returns:
      A float32 scalar, 0 for equal maps.

    Raises:
      DataError: the shapes differ, or there is not one attention per channel.

    Source: Li et al., DELTA: Deep Learning Transfer using Feature Map with Attention, 2019, arXiv:1901.09229.

    >>> x = jnp.ones((1, 2, 2, 3))
    >>> float(delta(x, 0 * x)), float(delta(x, 0 * x, jnp.ones(3) / 3))
    (6.0, 1.5)
    """
    student, teacher, weight = matched(student_map, teacher_map, "delta", weight)
    squares = (student - teacher) ** 2
    if channel_weights is not None:
        channels = student.shape[-1]
        if jnp.shape(channel_weights) != (channels,):
            raise DataError(
                f"delta() got channel_weights {describe(channel_weights)} for {channels} channels. Expected one per "
                f"channel, ({channels},): losses.channel_attention(increases)."
            )
        positions = student[0].size // channels
        squares *= jax.lax.stop_gradient(jnp.asarray(channel_weights, jnp.float32)) * (channels / positions)
    return average(0.5 * jnp.sum(flat(squares), axis=1), weight)


def channel_attention(increases: Array, temperature: float | Array = 5.0) -> Array:
    """DELTA's attention on the channels of a layer: the softmax of how much the loss grows without each of them.

    ``softmax((x - mean) / std / temperature)``, as the Transfer-Learning-Library; the paper takes the softmax of the
    growth itself.

    Args:
      increases: ``[c]``, the loss on the target data of the source network (with a head of its own) after channel k is
        set to zero, less the loss before.
      temperature: the larger, the more alike the channels.

    Returns:
      ``[c]`` float32 of sum 1, for :func:`delta`.

    Raises:
      DataError: it is no ``[c]``.

    Source: Li et al., DELTA, 2019, arXiv:1901.09229; as the Transfer-Learning-Library.

    >>> channel_attention(jnp.array([0.5, 0.5])).tolist()
    [0.5, 0.5]
    """
    if jnp.ndim(increases) != 1 or not jnp.size(increases):
        raise DataError(f"channel_attention() got increases {describe(increases)}. Expected [c], one per channel.")
    centred = jnp.asarray(increases, jnp.float32)
    centred = centred - jnp.mean(centred)
    variance = jnp.mean(centred**2)
    scale = jnp.where(variance > 0, jax.lax.rsqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    return jax.nn.softmax(centred * scale / temperature)


def bss(features: Array, k: int = 1, *, weight: Array | None = None) -> Array:
    """Batch spectral shrinkage: the sum of the ``k`` smallest squared singular values of a batch of features.

    Args:
      features: ``[B, d]``, not centred.
      k: how many singular values; static.
      weight: ``[B]``; examples of weight 0 are left out, the others count alike.

    Returns:
      A float32 scalar. Gradients are exact where the k-th and the next value differ, and finite everywhere.

    Raises:
      DataError: the features are no ``[B, d]``.
      TransferError: ``k`` is below 1 or above the number of singular values.

    Source: Chen et al., Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage, 2019.

    >>> float(bss(jnp.diag(jnp.array([1.0, 2.0, 3.0])), 2))
    5.0
    """
    if jnp.ndim(features) != 2:
        raise DataError(f"bss() got features {describe(features)}. Expected [B, d]: pool or flatten maps first.")
    count, width = jnp.shape(features)
    if not is_whole(k) or k > min(count, width):
        raise TransferError(
            f"bss() expects k from 1 to {min(count, width)}, the number of singular values of [{count}, {width}], "
            f"got {k!r}."
        )
    weight = as_weight(weight, count, "bss")
    rows = counted(jnp.asarray(features, jnp.float32), weight)
    rows = rows if count >= width else rows.T
    # The gradient of an eigenvalue v' G v is v v', as if v were fixed. With v held fixed, differentiation needs none of
    # eigh's own rule, which divides by differences of eigenvalues; and |F v|^2 has digits that eigh's values lack.
    fixed = jax.lax.stop_gradient(rows)
    vectors = jnp.linalg.eigh(jnp.matmul(fixed.T, fixed, precision=PRECISE))[1]  # in ascending order
    squares = jnp.sum(jnp.matmul(rows, vectors, precision=PRECISE) ** 2, axis=0)
    if weight is None:
        return jnp.sum(squares[:k])
    # Rows of zeros add singular values of zero, the first ones, which are none of the others'.
    first = len(squares) - jnp.minimum(jnp.sum(weight != 0), width)
    place = jnp.arange(len(squares))
    return jnp.sum(jnp.where((place >= first) & (place < first + k), squares, 0.0))


def category_relation(source_probs: Any, labels: Any, *, num_classes: int | None = None) -> Array:
    """What Co-Tuning knows of the classes: the mean prediction of the source's head for each target class.

    It is made once, before training and outside of ``jit``, from the predictions of the source network.

    Args:
      source_probs: ``[N, Cs]``, the softmax of the source head's logits for the target's training examples.
      labels: ``[N]`` integers, the target class of each.
      num_classes: of the target, when it is not the largest label plus 1.

    Returns:
      ``[Ct, Cs]`` float32, one distribution per target class, for :func:`co_tuning`.

    Raises:
      DataError: the arrays do not fit, the rows are no distributions, a label is outside the classes, or a class has
        no example.

    Source: You et al., Co-Tuning for Transfer Learning, 2020: the direct approach.

    >>> category_relation(jnp.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]), jnp.array([0, 0, 1])).tolist()
    [[0.75, 0.25], [0.0, 1.0]]
    """
    probs, labels = np.asarray(source_probs, np.float64), np.asarray(labels)
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"category_relation() got source_probs {describe(source_probs)} and labels {describe(labels)}. Expected "
            "[N, Cs] and [N] integers."
        )
    if not len(labels) or not (np.all(probs >= 0) and np.all(np.abs(probs.sum(1) - 1) < 0.02)):
        raise DataError(
            "category_relation() got rows of source_probs that are no distributions. Expected jax.nn.softmax of the "
            "source head's logits."
        )
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"category_relation() got labels from {labels.min()} to {labels.max()}. Expected 0 to {classes - 1}."
        )
    counts = np.bincount(labels, minlength=classes)
    if not counts.all():
        missing = listing([str(label) for label in np.flatnonzero(counts == 0)])
        raise DataError(f"category_relation() got no example of class {missing}. Expected one of each at least.")
    totals = np.zeros((classes, probs.shape[1]))
    np.add.at(totals, labels, probs)
    return jnp.asarray(totals / counts[:, None], jnp.float32)


def co_tuning(source_logits: Array, labels: Array, relation: Array, *, weight: Array | None = None) -> Array:
    """Co-Tuning: the source's head, kept beside the new one, should predict what its classes mean for the target's.

    The mean cross-entropy of the source head's logits with ``relation[labels]``.

    Args:
      source_logits: ``[B, Cs]``, of the source's head on the features that learn.
      labels: ``[B]`` integers, the target classes; one outside ``relation`` gives NaN.
      relation: ``[Ct, Cs]`` of :func:`category_relation`; no gradient flows to it.
      weight: ``[B]``, how much each example counts.

    Returns:
      A float32 scalar.

    Raises:
      DataError: the shapes do not fit.

    Source: You et al., Co-Tuning for Transfer Learning, 2020.

    >>> round(float(co_tuning(jnp.zeros((1, 2)), jnp.array([1]), jnp.array([[0.75, 0.25], [0.0, 1.0]]))), 4)
    0.6931
    """
    logits = as_logits(source_logits, "co_tuning")
    if jnp.ndim(relation) != 2 or jnp.shape(relation)[1] != logits.shape[1]:
        raise DataError(
            f"co_tuning() got relation {describe(relation)} for source logits {logits.shape}. Expected "
            f"[target classes, {logits.shape[1]}]: losses.category_relation(source_probs, labels)."
        )
    weight = as_weight(weight, len(logits), "co_tuning")
    labels = _as_labels(labels, len(logits), "co_tuning", weight)
    targets = _rows(jax.lax.stop_gradient(jnp.asarray(relation, jnp.float32)), labels)
    return average(soft_cross_entropy(counted(logits, weight), targets), weight)


def contrastive_cross_entropy(
    features: Array,
    labels: Array,
    kernel: Array,
    temperature: float | Array = 0.07,
    *,
    bank: Array | None = None,
    bank_labels: Array | None = None,
    weight: Array | None = None,
) -> Array:
    """Bi-Tuning's loss of the classifier: each example's class should name the features of that class among all.

    For example i with label y: the mean over all features h of label y of ``-log softmax_h(w_y . h / temperature)``,
    with L2-normalised features and classes, among the features of the batch and the bank. The
    Transfer-Learning-Library takes an example's own features and the bank only, gives no gradient to the classifier,
    and subtracts the constant log of how many have the label.

    Args:
      features: ``[B, d]``, the input of the classifier.
      labels: ``[B]`` integers; one outside the classes gives NaN.
      kernel: ``[d, C]`` of the classifier. A bias is one row more, with a 1 at the end of every feature.
      temperature: divides the cosines.
      bank: ``[M, d]``, features of earlier examples by a slowly moving network; no gradient flows to them.
      bank_labels: ``[M]`` integers.
      weight: ``[B]``, how much each example counts; one of weight 0 is no feature of others either.

    Returns:
      A float32 scalar.

    Raises:
      DataError: the shapes do not fit.

    Source: Zhong et al., Bi-tuning of Pre-trained Representations, 2020, arXiv:2011.06182.

    >>> x, labels = jnp.eye(2), jnp.array([0, 1])
    >>> float(contrastive_cross_entropy(x, labels, jnp.eye(2), 0.01))
    0.0
    """
    if jnp.ndim(features) != 2 or jnp.ndim(kernel) != 2 or jnp.shape(features)[1] != jnp.shape(kernel)[0]:
        raise DataError(
            f"contrastive_cross_entropy() got features {describe(features)} and a kernel {describe(kernel)}. Expected "
            "[B, d] and [d, C]."
        )
    weight = as_weight(weight, len(features), "contrastive_cross_entropy")
    own = unit(counted(jnp.asarray(features, jnp.float32), weight))
    labels = _as_labels(labels, len(own), "contrastive_cross_entropy", weight)
    classes = _rows(unit(jnp.asarray(kernel, jnp.float32).T), labels)
    others = _as_labelled(bank, bank_labels, own.shape[1], "contrastive_cross_entropy")
    return _contrast(classes, own, labels, others, temperature, weight)


def categorical_contrastive(
    queries: Array,
    keys: Array,
    labels: Array,
    temperature: float | Array = 0.07,
    *,
    bank: Array | None = None,
    bank_labels: Array | None = None,
    weight: Array | None = None,
) -> Array:
    """Bi-Tuning's loss of the projector: an example's embedding should name the keys of its class among all.

    For example i: the mean over all keys k of its label of ``-log softmax_k(q_i . k / temperature)``, L2-normalised,
    among the keys of the batch and the bank. The Transfer-Learning-Library takes an example's own key and the bank
    only, and subtracts the constant log of how many have the label.

    Args:
      queries: ``[B, d]``, embeddings of the network that learns.
      keys: ``[B, d]``, those of a slowly moving network for other views of the same examples; no gradient flows to
        them.
      labels: ``[B]`` integers.
      temperature: divides the cosines.
      bank: ``[M, d]``, keys of earlier examples; no gradient flows to them.
      bank_labels: ``[M]`` integers.
      weight: ``[B]``, how much each example counts; one of weight 0 is no key of others either.

    Returns:
      A float32 scalar.

    Raises:
      DataError: the shapes do not fit.

    Source: Zhong et al., Bi-tuning of Pre-trained Representations, 2020, arXiv:2011.06182.

    >>> x = jnp.eye(2)
    >>> float(categorical_contrastive(x, x, jnp.array([0, 1]), 0.01))
    0.0
    """
    if jnp.ndim(queries) != 2 or jnp.shape(queries) != jnp.shape(keys):
        raise DataError(
            f"categorical_contrastive() got queries {describe(queries)} and keys {describe(keys)}. Expected [B, d] of "
            "both: two views of the same examples, and one projector for both networks."
        )
    weight = as_weight(weight, len(queries), "categorical_contrastive")
    own, others = (unit(counted(jnp.asarray(part, jnp.float32), weight)) for part in (queries, keys))
    labels = _as_labels(labels, len(own), "categorical_contrastive", weight)
    labelled = _as_labelled(bank, bank_labels, own.shape[1], "categorical_contrastive")
    return _contrast(own, jax.lax.stop_gradient(others), labels, labelled, temperature, weight)


def _contrast(queries, keys, labels, bank, temperature, weight) -> Array:
    """The mean over queries of the mean over keys of their label of -log softmax, among the batch's and the bank's."""
    among, same = candidates(weight, len(queries)), labels[:, None] == labels[None]
    if bank is not None:
        shape = (len(queries), len(bank[1]))
        keys = jnp.concatenate([keys, unit(bank[0])])
        among = jnp.concatenate([among, jnp.ones(shape, bool)], axis=1)
        same = jnp.concatenate([same, labels[:, None] == bank[1][None]], axis=1)
    scores = jnp.matmul(queries, keys.T, precision=PRECISE) / temperature
    same = (same & among).astype(jnp.float32)
    attracted = jnp.sum(same * scores, axis=1) / jnp.sum(same, axis=1)  # an example is always of its own label
    return average(jax.nn.logsumexp(jnp.where(among, scores, -jnp.inf), axis=1) - attracted, weight)


def _as_labels(labels: Any, count: int, name: str, weight: Array | None = None, argument: str = "labels") -> Array:
    """Labels ``[B]``, 0 where the weight is."""
    labels = jnp.asarray(labels)
    if labels.shape != (count,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise DataError(f"{name}() got {argument} {describe(labels)}. Expected integers ({count},), one per example.")
    return labels if weight is None else jnp.where(weight != 0, labels, 0)


def _as_labelled(bank: Any, labels: Any, width: int, name: str) -> tuple[Array, Array] | None:
    if (bank is None) != (labels is None):
        raise DataError(f"{name}() got one of bank and bank_labels. Expected both, or neither.")
    if bank is None:
        return None
    bank = as_bank(bank, width, name, "bank")
    return bank, _as_labels(labels, len(bank), name, argument="bank_labels")


def _rows(table: Array, labels: Array) -> Array:
    """``table[labels]``, NaN where a label is outside."""
    inside = (labels >= 0) & (labels < len(table))
    return jnp.where(inside[:, None], table[jnp.where(inside, labels, 0)], jnp.nan)
