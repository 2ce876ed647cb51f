"""How far a student's logits are from its teacher's: losses of arrays for knowledge distillation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from transferjax._errors import DataError, TransferError, describe, is_whole
from transferjax._types import Array

STANDARD_EPS = 1e-7
"""What logit standardisation adds to a standard deviation."""
CORRELATION_EPS = 1e-8
"""What DIST adds to the product of two norms."""
CONSTANT = 1e-12
"""Values whose squares vary by less than this share of themselves are constant: the rest is rounding."""
ANY_CLASSES = (
    "hint, attention_transfer, rkd_distance, rkd_angle, similarity_preserving, correlation_congruence, pkt, vid and crd"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TopK:
    """The largest logits of a teacher at one temperature, and what the others weigh together: small enough to be kept.

    Attributes:
      values: ``[..., k]``, the logits, largest first.
      indices: ``[..., k]`` int32, their classes.
      rest: ``[...]``, the logsumexp of all other logits divided by the temperature; -inf where there are none.
      temperature: the one it was made for; static; ``None`` where that was traced.
    """

    values: Array
    indices: Array
    rest: Array
    temperature: float | None = dataclasses.field(default=None, metadata={"static": True})


def top_k(logits: Array, k: int, temperature: float | Array = 4.0) -> TopK:
    """The ``k`` largest logits of a teacher, for :func:`kd` at this temperature and no other.

    Args:
      logits: ``[..., C]``.
      k: how many; static.
      temperature: the one that :func:`kd` will be called with.

    Returns:
      A :class:`TopK` of float32 and int32.

    Raises:
      DataError: they are no ``[..., C]``.
      TransferError: ``k`` is below 1 or above the number of classes, or the temperature is not positive.

    >>> top = top_k(jnp.array([0.0, 3.0, 1.0]), 2, 1.0)
    >>> top.values.tolist(), top.indices.tolist(), float(top.rest)
    ([3.0, 1.0], [1, 2], 0.0)
    """
    _check_temperature(temperature, "top_k")
    shape = jnp.shape(logits)
    if not shape or shape[-1] < 2:
        raise DataError(f"top_k() got logits {describe(logits)}. Expected [..., C] of two classes or more.")
    if not is_whole(k) or k > shape[-1]:
        raise TransferError(f"top_k() expects k from 1 to {shape[-1]}, the number of classes, got {k!r}.")
    logits = jnp.asarray(logits, jnp.float32)
    values, indices = jax.lax.top_k(logits, k)
    rest = _rest(logits / temperature, _marked(indices, shape))
    return TopK(
        values, indices.astype(jnp.int32), rest, None if isinstance(temperature, Tracer) else float(temperature)
    )


def kd(
    student_logits: Array,
    teacher_logits: Array | TopK,
    temperature: float | Array = 4.0,
    *,
    weight: Array | None = None,
) -> Array:
    """Knowledge distillation: ``T^2 KL(softmax(t / T) || softmax(s / T))``, the mean over examples.

    It is the soft part alone; the usual loss is ``(1 - alpha) * cross-entropy + alpha * kd``.

    Args:
      student_logits: ``[..., C]``: ``[B, C]``, or ``[B, T, C]`` with a distribution per position.
      teacher_logits: ``[..., C]``, or a :class:`TopK` that :func:`top_k` made at this temperature: the divergence is
        then over ``k + 1`` outcomes, the ``k`` classes and all others together. No gradient flows to it.
      temperature: T, softens both distributions.
      weight: ``[...]`` (or its first axes), how much each example or position counts; where it is 0 the logits may be
        anything.

    Returns:
      A float32 scalar, 0 for equal logits; NaN where a :class:`TopK` names classes that the student has not.

    Raises:
      DataError: the shapes differ.
      TransferError: the temperature is not positive, or the :class:`TopK` was made for another.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.

    >>> student, teacher = jnp.zeros((1, 2)), jnp.array([[0.0, 100.0]])
    >>> round(float(kd(student, teacher, 1.0)), 4)
    0.6931
    """
    _check_temperature(temperature, "kd")
    if isinstance(teacher_logits, TopK):
        made = teacher_logits.temperature
        if made is not None and not isinstance(temperature, Tracer) and abs(float(temperature) - made) > 1e-6 * made:
            raise TransferError(
                f"kd() got temperature={float(temperature):g} and a TopK for {made:g}: what the other classes weigh "
                "depends on it. Expected the same: top_k(logits, k, temperature), TeacherCache(..., temperature=...)."
            )
        student, teacher, weight = _outcomes(student_logits, teacher_logits, temperature, weight)
    else:
        student, teacher, weight = _matched(student_logits, teacher_logits, "kd", weight)
        student, teacher = student / temperature, teacher / temperature
    return temperature**2 * _mean(_divergence(student, teacher), weight)


def dkd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    alpha: float | Array = 1.0,
    beta: float | Array = 8.0,
    temperature: float | Array = 4.0,
    *,
    weight: Array | None = None,
) -> Array:
    """Decoupled distillation: ``T^2 (alpha TCKD + beta NCKD)``, the two parts of KD with weights of their own.

    TCKD is the divergence over two outcomes, the label's class or another; NCKD that over the other classes alone.

    Args:
      student_logits: ``[..., C]``.
      teacher_logits: ``[..., C]``; no gradient flows to them.
      labels: ``[...]`` integers.
      alpha: the weight of TCKD.
      beta: the weight of NCKD.
      temperature: T, softens all distributions.
      weight: ``[...]`` (or its first axes), how much each example counts; where it is 0 logits and labels may be
        anything.

    Returns:
      A float32 scalar, 0 for equal logits; NaN where a label is outside ``[0, C)``.

    Raises:
      DataError: the shapes differ, or the labels do not fit.
      TransferError: the temperature is not positive.

    Source: Zhao et al., Decoupled Knowledge Distillation, 2022, arXiv:2203.08679, equation 7.

    >>> student, teacher = jnp.zeros((1, 3)), jnp.array([[100.0, 1.0, 1.0]])
    >>> [round(float(dkd(student, teacher, jnp.array([0]), alpha, 8.0, 1.0)), 4) for alpha in (0.0, 1.0)]
    [0.0, 1.0986]
    """
    _check_temperature(temperature, "dkd")
    student, teacher, weight = _matched(student_logits, teacher_logits, "dkd", weight)
    labels = jnp.asarray(labels)
    if labels.shape != student.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise DataError(
            f"dkd() got labels {describe(labels)} for logits {describe(student)}. Expected integers of shape "
            f"{student.shape[:-1]}."
        )
    labels = labels if weight is None else jnp.where(weight > 0, labels, 0)
    target = labels[..., None] == jnp.arange(student.shape[-1])
    either = lambda z: jnp.stack([jnp.sum(jnp.where(target, z, 0.0), axis=-1), _rest(z, target)], axis=-1)
    others = lambda z: jnp.where(target, -jnp.inf, z)
    student, teacher = student / temperature, teacher / temperature
    values = alpha * _divergence(either(student), either(teacher))
    values = values + beta * _divergence(others(student), others(teacher))
    return temperature**2 * _mean(jnp.where(jnp.any(target, axis=-1), values, jnp.nan), weight)


def dist(
    student_logits: Array,
    teacher_logits: Array,
    beta: float | Array = 1.0,
    gamma: float | Array = 1.0,
    temperature: float | Array = 1.0,
    *,
    weight: Array | None = None,
) -> Array:
    """Distillation from a stronger teacher: predictions should correlate, which is less than that they agree.

    ``T^2 (beta inter + gamma intra)``: inter is 1 - Pearson's correlation of both predictions over the classes, the
    mean over examples; intra is 1 - their correlation over the examples of the batch, the mean over classes, and 0 for
    fewer than two examples. What is constant (to rounding), such as the predictions of a head of zeros, has correlation
    0 and no gradient.

    Args:
      student_logits: ``[..., C]``; all leading axes are examples.
      teacher_logits: ``[..., C]``; no gradient flows to them.
      beta: the weight of inter.
      gamma: the weight of intra.
      temperature: T, softens both predictions.
      weight: ``[...]`` (or its first axes), how much each example counts; where it is 0 the logits may be anything.

    Returns:
      A float32 scalar, 0 for equal logits that vary.

    Raises:
      DataError: the shapes differ.
      TransferError: the temperature is not positive.

    Source: Huang et al., Knowledge Distillation from A Stronger Teacher, 2022, arXiv:2205.10536; as in its code.

    >>> x = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> abs(round(float(dist(x, 2 * x)), 4)), round(float(dist(x, -x)), 4)
    (0.0, 4.0)
    """
    _check_temperature(temperature, "dist")
    student, teacher, weight = _matched(student_logits, teacher_logits, "dist", weight)
    classes = student.shape[-1]
    student, teacher = (jax.nn.softmax(z / temperature).reshape(-1, classes) for z in (student, teacher))
    weight = jnp.ones(len(student)) if weight is None else weight.reshape(-1)
    inter = _mean(1 - _pearson(student, teacher, jnp.ones(classes)), weight)
    intra = jnp.mean(1 - _pearson(student.T, teacher.T, weight))
    intra = jnp.where(jnp.sum(weight > 0) > 1, intra, 0.0)
    return temperature**2 * (beta * inter + gamma * intra)


def logit_standardised_kd(
    student_logits: Array, teacher_logits: Array, temperature: float | Array = 2.0, *, weight: Array | None = None
) -> Array:
    """KD of logits that have mean 0 and standard deviation 1 per example: their scale is the student's own matter.

    ``T^2 KL(softmax(z(t) / T) || softmax(z(s) / T))`` with ``z(x) = (x - mean) / (std + 1e-7)``, std of C - 1 degrees
    of freedom. The paper's code multiplies it by a weight of 9, which is not in it. Logits that are constant (to
    rounding) have ``z = 0`` and no gradient.

    Args:
      student_logits: ``[..., C]``.
      teacher_logits: ``[..., C]``; no gradient flows to them.
      temperature: T, softens both distributions.
      weight: ``[...]`` (or its first axes), how much each example counts; where it is 0 the logits may be anything.

    Returns:
      A float32 scalar, 0 for equal logits.

    Raises:
      DataError: the shapes differ.
      TransferError: the temperature is not positive.

    Source: Sun et al., Logit Standardization in Knowledge Distillation, 2024, arXiv:2403.01427.

    >>> x = jnp.array([[0.0, 1.0, 5.0]])
    >>> abs(round(float(logit_standardised_kd(x, 3 * x + 7)), 4)), float(logit_standardised_kd(x, -x)) > 1
    (0.0, True)
    """
    _check_temperature(temperature, "logit_standardised_kd")
    student, teacher, weight = _matched(student_logits, teacher_logits, "logit_standardised_kd", weight)
    student, teacher = (_standardised(z) / temperature for z in (student, teacher))
    return temperature**2 * _mean(_divergence(student, teacher), weight)


def hard(student_logits: Array, teacher_logits: Array, *, weight: Array | None = None) -> Array:
    """Cross-entropy with the class that the teacher finds most likely.

    Args:
      student_logits: ``[..., C]``.
      teacher_logits: ``[..., C]``; no gradient flows to them.
      weight: ``[...]`` (or its first axes), how much each example counts; where it is 0 the logits may be anything.

    Returns:
      A float32 scalar; NaN where the teacher's logits are.

    Raises:
      DataError: the shapes differ.

    Source: Touvron et al., Training data-efficient image transformers & distillation through attention, 2020,
    arXiv:2012.12877, equation 3.

    >>> round(float(hard(jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]]))), 4)
    0.6931
    """
    student, teacher, weight = _matched(student_logits, teacher_logits, "hard", weight)
    best = jnp.argmax(teacher, axis=-1)[..., None]
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(student), best, axis=-1)[..., 0]
    return _mean(jnp.where(jnp.isnan(jnp.max(teacher, axis=-1)), jnp.nan, -likelihood), weight)


def _matched(student: Any, teacher: Any, name: str, weight: Any) -> tuple[Array, Array, Array | None]:
    """Both logits as float32 with zeros where the weight is 0, no gradient to the teacher, and the weight; checked."""
    if isinstance(teacher, TopK):
        raise DataError(f"{name}() got a TopK of the teacher's logits. Expected all of them: only kd() takes a TopK.")
    one, other = jnp.shape(student), jnp.shape(teacher)
    if one and other and one[:-1] == other[:-1] and one[-1] != other[-1]:
        raise DataError(
            f"{name}() got logits of {one[-1]} classes of the student and {other[-1]} of the teacher. Expected the "
            f"same classes. Losses of features work with a teacher of other classes: {ANY_CLASSES}, on the same "
            "examples for both."
        )
    if one != other or not one or 0 in one or one[-1] < 2:
        raise DataError(
            f"{name}() got logits {describe(student)} of the student and {describe(teacher)} of the teacher. Expected "
            "[..., C] of both, of one shape, with two classes or more, none empty."
        )
    weight = _as_weight(weight, one[:-1], name)
    student, teacher = (_counted(jnp.asarray(part, jnp.float32), weight) for part in (student, teacher))
    return student, jax.lax.stop_gradient(teacher), weight


def _outcomes(student: Any, top: TopK, temperature: Any, weight: Any) -> tuple[Array, Array, Array | None]:
    """Logits of ``k + 1`` outcomes, divided by the temperature, of student and teacher, and the weight; checked."""
    shape, leading, k = jnp.shape(student), jnp.shape(top.rest), jnp.shape(top.indices)[-1:]
    if jnp.shape(top.values) != (*leading, *k) or jnp.shape(top.indices) != (*leading, *k):
        parts = ", ".join(f"{name} {describe(getattr(top, name))}" for name in ("values", "indices", "rest"))
        raise DataError(f"kd() got a TopK of {parts}. Expected [..., k], [..., k] and [...], as of top_k().")
    if not shape or 0 in shape or shape[:-1] != leading or shape[-1] < k[0]:
        raise DataError(
            f"kd() got student logits {describe(student)} and a TopK of {k[0]} classes with leading axes {leading}. "
            "Expected [..., C] with the same leading axes and no fewer classes."
        )
    weight = _as_weight(weight, leading, "kd")
    logits = _counted(jnp.asarray(student, jnp.float32), weight) / temperature
    values = _counted(jnp.asarray(top.values, jnp.float32), weight) / temperature
    indices, rest = jnp.asarray(top.indices), jnp.asarray(top.rest, jnp.float32)
    if weight is not None:
        indices, rest = jnp.where((weight > 0)[..., None], indices, 0), jnp.where(weight > 0, rest, 0.0)
    known = (indices >= 0) & (indices < shape[-1])
    picked = jnp.where(known, jnp.take_along_axis(logits, jnp.where(known, indices, 0), axis=-1), jnp.nan)
    one = jnp.concatenate([picked, _rest(logits, _marked(indices, shape))[..., None]], axis=-1)
    other = jnp.concatenate([values, rest[..., None]], axis=-1)
    return one, jax.lax.stop_gradient(other), weight


def _marked(indices: Array, shape: tuple[int, ...]) -> Array:
    """Which entries of an array of this shape the indices ``[..., k]`` of its last axis name."""
    return jnp.put_along_axis(jnp.zeros(shape, bool), indices, True, axis=-1, inplace=False)


def _rest(logits: Array, left_out: Array) -> Array:
    """The logsumexp ``[...]`` of all logits but those left out; -inf, without gradient, where all that is left is."""
    others = jnp.where(left_out, -jnp.inf, logits)
    none = jnp.all(others == -jnp.inf, axis=-1)
    return jnp.where(none, -jnp.inf, jax.nn.logsumexp(jnp.where(none[..., None], 0.0, others), axis=-1))


def _divergence(student: Array, teacher: Array) -> Array:
    """``KL(softmax(teacher) || softmax(student))`` over the last axis; what the teacher holds impossible adds 0."""
    own, other = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    likely = jnp.exp(other)
    never = likely == 0
    return jnp.sum(likely * (jnp.where(never, 0.0, other) - jnp.where(never, 0.0, own)), axis=-1)


def _spread(values: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Values less their weighted mean over the last axis, the norm of that (or 1), and whether they are constant."""
    total = jnp.maximum(jnp.sum(weight), 1e-9)
    centre = lambda x: x - jnp.sum(weight * x, axis=-1, keepdims=True) / total
    centred = centre(centre(values))  # again: the first mean is rounded
    squares = jnp.sum(weight * centred**2, axis=-1, keepdims=True)
    constant = squares <= CONSTANT * jnp.sum(weight * values**2, axis=-1, keepdims=True)  # NaN is not
    return centred, jnp.sqrt(jnp.where(constant, 1.0, squares)), constant


def _pearson(student: Array, teacher: Array, weight: Array) -> Array:
    """The weighted correlation over the last axis."""
    (own, norm, constant), (other, length, fixed) = (_spread(part, weight) for part in (student, teacher))
    products = jnp.sum(weight * own * other, axis=-1, keepdims=True)
    return jnp.where(constant | fixed, 0.0, products / (norm * length + CORRELATION_EPS))[..., 0]


def _standardised(logits: Array) -> Array:
    classes = logits.shape[-1]
    centred, norm, constant = _spread(logits, jnp.ones(classes))
    return jnp.where(constant, 0.0, centred / (norm / math.sqrt(classes - 1) + STANDARD_EPS))


def _as_weight(weight: Any, leading: tuple[int, ...], name: str) -> Array | None:
    """The weight as float32 of the leading shape, checked."""
    if weight is None:
        return None
    shape = jnp.shape(weight)
    if shape != leading[: len(shape)] or (leading and not shape):
        raise DataError(f"{name}() got weight {describe(weight)}. Expected one per example, {leading}.")
    weight = jnp.asarray(weight, jnp.float32)
    return jnp.broadcast_to(weight.reshape(*shape, *(1,) * (len(leading) - len(shape))), leading)


def _counted(values: Array, weight: Array | None) -> Array:
    """``[..., C]`` with zeros where the weight ``[...]`` is 0."""
    return values if weight is None else jnp.where((weight > 0)[..., None], values, 0.0)


def _mean(values: Array, weight: Array | None) -> Array:
    return jnp.mean(values) if weight is None else jnp.sum(weight * values) / jnp.maximum(jnp.sum(weight), 1e-9)


def _check_temperature(temperature: Any, name: str) -> None:
    if isinstance(temperature, str):
        raise TransferError(f"{name}() expects a number as temperature, got {temperature!r}.")
    if isinstance(temperature, int | float) and not 0 < temperature < math.inf:
        raise TransferError(f"{name}() expects a temperature above 0, got {temperature!r}.")
