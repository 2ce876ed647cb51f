"""How far a student's features are from its teacher's: losses of arrays for knowledge transfer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import DataError, describe
from transferjax._types import Array
from transferjax.objectives._metrics import flat_mean

PRECISE = jax.lax.Precision.HIGHEST
LEAST_VARIANCE = 1e-5
"""What VID adds to a variance, and SRD when it standardises."""
FLOOR = 1e-12
"""What SRD adds inside its logarithm: at equal features the value is log(1e-12) = -27.6, and the gradient zero."""


def hint(student_features: Array, teacher_features: Array, *, weight: Array | None = None) -> Array:
    """FitNets: the mean squared difference of features, over the entries of an example and then over examples.

    Args:
      student_features: ``[B, ..., d]``, behind the projector where the widths differ.
      teacher_features: ``[B, ..., d]``; no gradient flows to them.
      weight: ``[B]``, how much each example counts.

    Returns:
      A float32 scalar, 0 for equal features.

    Raises:
      DataError: the shapes differ.

    Source: Romero et al., FitNets: Hints for Thin Deep Nets, 2014, arXiv:1412.6550.

    >>> float(hint(jnp.ones((2, 3)), jnp.zeros((2, 3))))
    1.0
    """
    student, teacher, weight = matched(student_features, teacher_features, "hint", weight)
    return average(flat_mean((student - teacher) ** 2), weight)


def attention_transfer(student_map: Array, teacher_map: Array, *, weight: Array | None = None) -> Array:
    """The mean squared difference of two attention maps: where in the image the networks are active.

    An attention map is the mean over channels of squared activations, divided by its L2 norm over all positions; one
    that is zero everywhere stays zero, and has no gradient.

    Args:
      student_map: ``[B, h, w, c]``, or ``[B, positions, c]``.
      teacher_map: the same, with any number of channels; no gradient flows to it.
      weight: ``[B]``, how much each example counts.

    Returns:
      A float32 scalar, 0 for equal maps.

    Raises:
      DataError: they are no maps, or have other positions.

    Source: Zagoruyko & Komodakis, Paying More Attention to Attention, 2016, arXiv:1612.03928; as in its code.

    >>> x = jnp.eye(2).reshape(1, 2, 2, 1)
    >>> float(attention_transfer(x, 2 * x)), round(float(attention_transfer(x, 1 - x)), 4)
    (0.0, 0.5)
    """
    if min(jnp.ndim(student_map), jnp.ndim(teacher_map)) < 3:
        raise DataError(
            f"attention_transfer() got {describe(student_map)} of the student and {describe(teacher_map)} of the "
            "teacher. Expected maps [B, h, w, c], of a layer before pooling."
        )
    student, teacher, weight = matched(student_map, teacher_map, "attention_transfer", weight, widths=False)
    own, other = (unit(flat(jnp.mean(part**2, axis=-1))) for part in (student, teacher))
    return average(flat_mean((own - other) ** 2), weight)


def vid(student_features: Array, teacher_features: Array, raw_variance: Array, *, weight: Array | None = None) -> Array:
    """Variational information distillation: how unlikely the teacher's features are, given the student's.

    ``mean of .5 * ((t - s)^2 / var + log var)``, a Gaussian without its constant, with one learnt variance
    ``softplus(raw_variance) + 1e-5`` per channel. It may be negative.

    Args:
      student_features: ``[B, ..., d]``, the predicted mean: behind the projector.
      teacher_features: ``[B, ..., d]``; no gradient flows to them.
      raw_variance: ``[d]``, auxiliary weights that learn; 4.9932 is a variance of 5, where the paper's code starts.
      weight: ``[B]``, how much each example counts.

    Returns:
      A float32 scalar.

    Raises:
      DataError: the shapes differ, or there is not one variance per channel.

    Source: Ahn et al., Variational Information Distillation for Knowledge Transfer, 2019, arXiv:1904.05835.

    >>> x, unit_variance = jnp.ones((2, 3)), jnp.full(3, 0.54131)
    >>> round(float(vid(x, x, unit_variance)), 4), round(float(vid(x, 0 * x, unit_variance)), 4)
    (0.0, 0.5)
    """
    student, teacher, weight = matched(student_features, teacher_features, "vid", weight)
    if jnp.shape(raw_variance) != student.shape[-1:]:
        raise DataError(
            f"vid() got raw_variance {describe(raw_variance)} for features of width {student.shape[-1]}. Expected one "
            f"per channel, {student.shape[-1:]}: auxiliary weights of tj.extend."
        )
    variance = jax.nn.softplus(jnp.asarray(raw_variance, jnp.float32)) + LEAST_VARIANCE
    return average(flat_mean(0.5 * ((teacher - student) ** 2 / variance + jnp.log(variance))), weight)


def crd(
    student_embeddings: Array,
    teacher_embeddings: Array,
    temperature: float | Array = 0.07,
    *,
    negatives: Array | None = None,
    weight: Array | None = None,
) -> Array:
    """Contrastive representation distillation in the batch: a student's embedding should name its teacher's.

    With L2-normalised embeddings and ``c_ij = s_i . t_j / temperature``, the mean over examples of half the sum of
    two cross-entropies: ``-log softmax_j(c_ij)[i]``, where the teacher's embedding of example i is chosen among all
    teacher embeddings of the batch and ``negatives``, and ``-log softmax_j(c_ji)[i]``, where the student's is chosen
    among the student embeddings of the batch. This is InfoNCE; the paper estimates the same bound from a memory bank
    with noise contrast.

    Args:
      student_embeddings: ``[B, d]``, behind the projector where the widths differ.
      teacher_embeddings: ``[B, d]``; no gradient flows to them.
      temperature: divides the cosines.
      negatives: ``[M, d]``, the teacher's embeddings of other examples (a memory bank); no gradient flows to them.
      weight: ``[B]``, how much each example counts; one of weight 0 is no negative either.

    Returns:
      A float32 scalar.

    Raises:
      DataError: the shapes differ.

    Source: Tian et al., Contrastive Representation Distillation, 2019, arXiv:1910.10699, as InfoNCE.

    >>> float(crd(jnp.eye(2), jnp.eye(2), 0.01)), float(crd(jnp.eye(2), 1 - jnp.eye(2), 0.01))
    (0.0, 100.0)
    """
    student, teacher, weight = matched(student_embeddings, teacher_embeddings, "crd", weight)
    if student.ndim != 2:
        raise DataError(f"crd() got embeddings {student.shape}. Expected [B, d]: pool maps first.")
    student, teacher = unit(student), unit(teacher)
    logits = jnp.matmul(student, teacher.T, precision=PRECISE) / temperature
    among, back = (jnp.where(candidates(weight, len(student)), part, -jnp.inf) for part in (logits, logits.T))
    if negatives is not None:
        bank = unit(as_bank(negatives, student.shape[1], "crd", "negatives"))
        among = jnp.concatenate([among, jnp.matmul(student, bank.T, precision=PRECISE) / temperature], axis=1)
    both = jax.nn.logsumexp(among, axis=1) + jax.nn.logsumexp(back, axis=1)
    own = jnp.diagonal(logits)
    return average(0.5 * both - own, weight)


def srd(
    student_features: Array, teacher_features: Array, *, exponent: float = 4.0, weight: Array | None = None
) -> Array:
    """The logarithm of the summed difference of standardised features: the feature part of the simple recipe.

    ``log(1e-12 + sum of |s - t|^exponent)`` over all entries of the batch, where each channel of either side has mean
    0 and variance 1 over the batch (1e-5 is added to the variance): batch normalisation without learnt scales.

    Args:
      student_features: ``[B, d]`` (maps ``[B, ..., d]`` are standardised over positions too), behind the projector.
      teacher_features: the same; no gradient flows to them.
      exponent: the larger, the more the largest differences count; positive.
      weight: ``[B]``, how much each example counts in the statistics and the sum.

    Returns:
      A float32 scalar, -27.6 for equal features.

    Raises:
      DataError: the shapes differ.

    Source: Miles & Mikolajczyk, Understanding the Role of the Projector in Knowledge Distillation, 2024,
    arXiv:2303.11098; as torchdistill.

    >>> x = jnp.array([[1.0], [-1.0]])
    >>> round(float(srd(x, -x)), 4), round(float(srd(x, 3 * x)), 1)
    (3.4657, -27.6)
    """
    student, teacher, weight = matched(student_features, teacher_features, "srd", weight)
    share = jnp.ones(len(student)) if weight is None else weight
    share = jnp.broadcast_to(share.reshape(-1, *(1,) * (student.ndim - 1)), (*student.shape[:-1], 1))
    difference = jnp.abs(_standardised(student, share) - _standardised(teacher, share))
    differs = difference > 0
    powers = jnp.where(differs, jnp.where(differs, difference, 1.0) ** exponent, 0.0)
    return jnp.log(jnp.sum(share * powers) + FLOOR)


def _standardised(features: Array, share: Array) -> Array:
    axes = tuple(range(features.ndim - 1))
    share = share / jnp.maximum(jnp.sum(share), 1e-9)
    centred = features - jnp.sum(share * features, axis=axes)
    return centred / jnp.sqrt(jnp.sum(share * centred**2, axis=axes) + LEAST_VARIANCE)


def matched(
    student: Any, teacher: Any, name: str, weight: Any = None, *, widths: bool = True
) -> tuple[Array, Array, Array | None]:
    """Features of both networks as float32, zero where the weight is, and no gradient to the teacher; checked.

    Args:
      student: ``[B, ..., d]``.
      teacher: ``[B, ..., d]``.
      name: of the loss, which the errors tell.
      weight: ``[B]`` or ``None``.
      widths: whether the last axes must agree.

    Raises:
      DataError: the shapes differ, or there is not one weight per example.

    >>> [part.shape for part in matched(jnp.ones((2, 3)), jnp.zeros((2, 3)), "hint", jnp.ones(2))]
    [(2, 3), (2, 3), (2,)]
    """
    one, other = jnp.shape(student), jnp.shape(teacher)
    came = f"{name}() got {describe(student)} of the student and {describe(teacher)} of the teacher"
    if min(len(one), len(other)) < 2 or 0 in one + other:
        raise DataError(f"{came}. Expected features [B, ..., d] of both, none empty.")
    if one[:-1] != other[:-1]:
        raise DataError(
            f"{came}. Expected one row per example and the same positions: choose layers of one size, or pool both."
        )
    if widths and one != other:
        raise DataError(
            f"{came}: add a projector: auxiliary weights of tj.extend that map (..., {one[-1]}) to (..., {other[-1]}), "
            f'e.g. tj.extend(model, "projector", tj.objectives.projector({one[-1]}, {other[-1]}), key=key) and '
            'tj.objectives.distill(..., project="projector").'
        )
    weight = as_weight(weight, one[0], name)
    own, others = (counted(jnp.asarray(part, jnp.float32), weight) for part in (student, teacher))
    return own, jax.lax.stop_gradient(others), weight


def as_weight(weight: Any, count: int, name: str) -> Array | None:
    """One float32 weight per example, or ``None``; checked.

    Raises:
      DataError: there is not one per example.

    >>> as_weight(jnp.array([1, 0]), 2, "hint").tolist()
    [1.0, 0.0]
    """
    if weight is None:
        return None
    if jnp.shape(weight) != (count,):
        raise DataError(f"{name}() got weight {describe(weight)}. Expected one per example, ({count},).")
    return jnp.asarray(weight, jnp.float32)


def as_bank(bank: Any, width: int, name: str, argument: str) -> Array:
    """Embeddings of other examples as float32 ``[M, d]``, without gradient; checked.

    Raises:
      DataError: they are none of this width.

    >>> as_bank(jnp.ones((5, 2)), 2, "crd", "negatives").shape
    (5, 2)
    """
    if jnp.ndim(bank) != 2 or jnp.shape(bank)[1] != width:
        raise DataError(f"{name}() got {argument} {describe(bank)}. Expected [M, {width}], as wide as the embeddings.")
    return jax.lax.stop_gradient(jnp.asarray(bank, jnp.float32))


def counted(values: Array, weight: Array | None) -> Array:
    """``[B, ...]`` with zeros for examples of weight 0, which may be anything.

    >>> counted(jnp.array([jnp.nan, 1.0]), jnp.array([0.0, 2.0])).tolist()
    [0.0, 1.0]
    """
    return values if weight is None else jnp.where((weight != 0).reshape(-1, *(1,) * (values.ndim - 1)), values, 0.0)


def average(values: Array, weight: Array | None) -> Array:
    """The mean of ``[B]`` values, weighted.

    >>> float(average(jnp.array([1.0, 3.0]), jnp.array([1.0, 0.0])))
    1.0
    """
    return jnp.mean(values) if weight is None else jnp.sum(weight * values) / jnp.maximum(jnp.sum(weight), 1e-9)


def candidates(weight: Array | None, count: int) -> Array:
    """``[B, B]``: whether example j is among those that example i is told from; those of weight 0 only for themselves.

    >>> candidates(jnp.array([1.0, 0.0]), 2).tolist()
    [[True, False], [True, True]]
    """
    counts = jnp.ones(count, bool) if weight is None else weight != 0
    return jnp.eye(count, dtype=bool) | counts[None]


def unit(vectors: Array) -> Array:
    """Vectors ``[..., d]`` of L2 norm 1; those below 1e-12 become zero, and have no gradient.

    >>> unit(jnp.array([[0.0, 2.0], [0.0, 0.0]])).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    points = ~(squares <= 1e-24)  # NaN is no zero
    return jnp.where(points, vectors / jnp.sqrt(jnp.where(points, squares, 1.0)), 0.0)


def flat(values: Array) -> Array:
    """``[B, ...]`` as ``[B, n]``."""
    return values.reshape(len(values), -1)
