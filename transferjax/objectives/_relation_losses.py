"""How examples relate to each other, for a student as for its teacher: losses of features of any two widths."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import DataError, TransferError, describe, is_whole
from transferjax._types import Array
from transferjax.objectives._feature_losses import as_weight, counted, flat

PRECISE = jax.lax.Precision.HIGHEST
PKT_EPS = 1e-7
"""What PKT adds to norms and probabilities."""
SAME = 1e-6
"""Two examples whose squared distance is below this share of their squared norms are one: the rest is rounding."""
BILINEAR, GAUSSIAN = "bilinear", "gaussian"


def rkd_distance(student_features: Array, teacher_features: Array, *, weight: Array | None = None) -> Array:
    """Relational distillation of distances: pairs should be as far apart as they are for the teacher.

    The mean over all ``N^2`` pairs of the smooth L1 loss (quadratic up to 1) of the difference of both distances, each
    divided by the mean of its network's positive ones. The paper weighs it by 25.

    Args:
      student_features: ``[N, d]``; maps are flattened.
      teacher_features: ``[N, e]``; no gradient flows to them.
      weight: ``[N]``, how much each example counts in all that is summed; where it is 0 it may be anything.

    Returns:
      A float32 scalar, 0 for equal features and for one example.

    Raises:
      DataError: they are no ``[N, ...]`` of the same N.

    Source: Park et al., Relational Knowledge Distillation, 2019, arXiv:1904.05068, equations 4 and 5.

    >>> x = jnp.array([[0.0], [1.0], [2.0]])
    >>> float(rkd_distance(x, 2 * x)), float(rkd_distance(x, x**2)) > 0
    (0.0, True)
    """
    student, teacher, weight = _paired(student_features, teacher_features, "rkd_distance", weight)
    one, other = (_scaled(_roots(_distances(part, weight)), weight) for part in (student, teacher))
    return _pair_mean(_smooth_l1(one - other), weight)


def rkd_angle(student_features: Array, teacher_features: Array, *, weight: Array | None = None) -> Array:
    """Relational distillation of angles: triples should have the angles that they have for the teacher.

    The mean over all ``N^3`` triples of the smooth L1 loss of the difference of both cosines of the angle at the
    first of three examples (0 where it is one of the others). They are computed from distances, one corner after the
    other: memory is ``N^2``. The paper weighs it by 50.

    Args:
      student_features: ``[N, d]``; maps are flattened.
      teacher_features: ``[N, e]``; no gradient flows to them.
      weight: ``[N]``, how much each example counts in all that is summed; where it is 0 it may be anything.

    Returns:
      A float32 scalar, 0 for equal features and for one example.

    Raises:
      DataError: they are no ``[N, ...]`` of the same N.

    Source: Park et al., Relational Knowledge Distillation, 2019, arXiv:1904.05068, equations 6 and 7.

    >>> corner, line = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), jnp.array([[0.0], [1.0], [2.0]])
    >>> float(rkd_angle(corner, 2 * corner)), float(rkd_angle(corner, line)) > 0
    (0.0, True)
    """
    student, teacher, weight = _paired(student_features, teacher_features, "rkd_angle", weight)
    share = _share(weight)
    one, other = (_distances(part, weight) for part in (student, teacher))

    @jax.checkpoint
    def at_corner(sides: tuple[Array, Array]) -> Array:
        losses = _smooth_l1(_cosines(one, sides[0]) - _cosines(other, sides[1]))
        return jnp.sum(share[:, None] * share * losses)

    return jnp.sum(share * jax.lax.map(at_corner, (one, other)))


def similarity_preserving(
    student_features: Array, teacher_features: Array, *, norm: int = 2, weight: Array | None = None
) -> Array:
    """Similarity-preserving distillation: the inner products of examples should be the teacher's, row by row.

    ``||G_s - G_t||_F^2 / N^2`` of Gram matrices whose rows are divided by their norm; a row of zeros stays zero, and
    has no gradient.

    Args:
      student_features: ``[N, d]``; maps are flattened.
      teacher_features: ``[N, e]``; no gradient flows to them.
      norm: 2 (the paper's), or 1, by which torchdistill divides; static.
      weight: ``[N]``, how much each example counts in all that is summed; where it is 0 it may be anything.

    Returns:
      A float32 scalar, 0 for equal features.

    Raises:
      DataError: they are no ``[N, ...]`` of the same N.
      TransferError: ``norm`` is neither 1 nor 2.

    Source: Tung & Mori, Similarity-Preserving Knowledge Distillation, 2019, arXiv:1907.09682, equations 2 to 4.

    >>> float(similarity_preserving(jnp.eye(2), 2 * jnp.eye(2))), float(similarity_preserving(jnp.eye(2), -jnp.eye(2)))
    (0.0, 0.0)
    """
    if isinstance(norm, bool) or norm not in (1, 2):
        raise TransferError(f"similarity_preserving() expects norm 2 or 1, got {norm!r}.")
    student, teacher, weight = _paired(student_features, teacher_features, "similarity_preserving", weight)
    one, other = (_normalised(_gram(part), norm, weight) for part in (student, teacher))
    return _pair_mean((one - other) ** 2, weight)


def correlation_congruence(
    student_features: Array,
    teacher_features: Array,
    *,
    kernel: str = GAUSSIAN,
    gamma: float | Array = 0.4,
    order: int = 2,
    normalise: bool = True,
    weight: Array | None = None,
) -> Array:
    """Correlation congruence: the kernel of all pairs of examples should be the teacher's.

    The mean squared difference of two kernels ``[N, N]``. The Gaussian one of vectors of norm 1, ``exp(-gamma |x -
    y|^2)``, is expanded: ``exp(-2 gamma) sum_p (2 gamma)^p / p! (x . y)^p`` for p from 0 to ``order``. torchdistill
    does not normalise, and has the root of this value divided by N.

    Args:
      student_features: ``[N, d]``; maps are flattened.
      teacher_features: ``[N, e]``; no gradient flows to them.
      kernel: ``"gaussian"``, or ``"bilinear"``: the inner product; static.
      gamma: of the Gaussian kernel.
      order: where its expansion ends; static.
      normalise: whether features are divided by their norm first; static.
      weight: ``[N]``, how much each example counts; where it is 0 it may be anything.

    Returns:
      A float32 scalar, 0 for equal features.

    Raises:
      DataError: they are no ``[N, ...]`` of the same N.
      TransferError: no such kernel, or ``order`` is below 1.

    Source: Peng et al., Correlation Congruence for Knowledge Distillation, 2019, arXiv:1904.01802, equations 4 to 7.

    >>> x, y = jnp.eye(2), jnp.ones((2, 2))
    >>> float(correlation_congruence(x, 2 * x)), round(float(correlation_congruence(x, y, kernel="bilinear")), 4)
    (0.0, 0.5)
    """
    if kernel not in (GAUSSIAN, BILINEAR):
        raise TransferError(f"correlation_congruence() expects kernel 'gaussian' or 'bilinear', got {kernel!r}.")
    if not is_whole(order):
        raise TransferError(f"correlation_congruence() expects order, a whole number of at least 1, got {order!r}.")
    student, teacher, weight = _paired(student_features, teacher_features, "correlation_congruence", weight)
    one, other = (_gram(_units(part) if normalise else part) for part in (student, teacher))
    if kernel == GAUSSIAN:
        one, other = (_expansion(part, gamma, order) for part in (one, other))
    return _pair_mean((one - other) ** 2, weight)


def pkt(student_features: Array, teacher_features: Array, *, weight: Array | None = None) -> Array:
    """Probabilistic knowledge transfer: who is whose neighbour should be as likely as it is for the teacher.

    The cosines of all pairs, shifted to [0, 1], become probabilities ``p_ij`` of j given i, the rows of an ``[N, N]``
    matrix of sum 1; the loss is the mean over its entries of ``t log((t + 1e-7) / (s + 1e-7))``.

    Args:
      student_features: ``[N, d]``; maps are flattened.
      teacher_features: ``[N, e]``; no gradient flows to them.
      weight: ``[N]``, how much each example counts in all that is summed; where it is 0 it may be anything.

    Returns:
      A float32 scalar, 0 for equal features.

    Raises:
      DataError: they are no ``[N, ...]`` of the same N.

    Source: Passalis & Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, 2018,
    arXiv:1803.10837; as in its code.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> float(pkt(x, x)), float(pkt(x, jnp.ones((2, 2)))) > 0
    (0.0, True)
    """
    student, teacher, weight = _paired(student_features, teacher_features, "pkt", weight)
    one, other = (_probabilities(part, weight) for part in (student, teacher))
    return _pair_mean(other * jnp.log((other + PKT_EPS) / (one + PKT_EPS)), weight)


def _paired(student: Any, teacher: Any, name: str, weight: Any) -> tuple[Array, Array, Array]:
    """Features as float32 ``[N, d]`` and ``[N, e]``, no gradient to the teacher, and a weight ``[N]``; checked."""
    one, other = jnp.shape(student), jnp.shape(teacher)
    if min(len(one), len(other)) < 2 or one[0] != other[0] or 0 in one + other:
        raise DataError(
            f"{name}() got features {describe(student)} of the student and {describe(teacher)} of the teacher. "
            "Expected [N, ...] of both, of the same examples in one order, none empty."
        )
    weight = as_weight(weight, one[0], name)
    student, teacher = (counted(flat(jnp.asarray(part, jnp.float32)), weight) for part in (student, teacher))
    return student, jax.lax.stop_gradient(teacher), jnp.ones(len(student)) if weight is None else weight


def _share(weight: Array) -> Array:
    return weight / jnp.maximum(jnp.sum(weight), 1e-9)


def _pair_mean(values: Array, weight: Array) -> Array:
    """The mean of ``[N, N]`` values, each weighted by both of its examples."""
    share = _share(weight)
    return jnp.sum(share[:, None] * share * values)


def _smooth_l1(difference: Array) -> Array:
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * difference**2, size - 0.5)


def _gram(features: Array) -> Array:
    return jnp.matmul(features, features.T, precision=PRECISE)


def _distances(features: Array, weight: Array) -> Array:
    """Squared distances ``[N, N]``; 0 where they are within the rounding of the norms."""
    centred = features - jax.lax.stop_gradient(jnp.matmul(_share(weight), features, precision=PRECISE))
    gram = _gram(centred)
    norms = jnp.diagonal(gram)
    both = norms[:, None] + norms
    squares = both - 2 * gram
    return jnp.where(squares <= SAME * both, 0.0, squares)  # NaN stays


def _roots(squares: Array) -> Array:
    """Square roots, without gradient at 0."""
    zero = squares == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))


def _reciprocals(values: Array) -> Array:
    """``1 / values``, 0 and without gradient at 0."""
    zero = values == 0
    return jnp.where(zero, 0.0, 1 / jnp.where(zero, 1.0, values))


def _units(features: Array, eps: float = 0.0) -> Array:
    """Rows divided by their norm; those of zeros stay zero, without gradient."""
    norms = _roots(jnp.sum(features**2, axis=1, keepdims=True))
    return features * _reciprocals(norms + jnp.where(norms == 0, 0.0, eps))


def _scaled(distances: Array, weight: Array) -> Array:
    """Distances divided by the mean of the positive ones."""
    weights = jnp.where(distances == 0, 0.0, weight[:, None] * weight)
    total = jnp.sum(weights)
    mean = jnp.sum(weights * distances) / jnp.where(total > 0, total, 1.0)
    return distances / jnp.where(mean == 0, 1.0, mean)


def _cosines(squares: Array, sides: Array) -> Array:
    """The cosines ``[N, N]`` of the angles at an example whose squared distances are ``sides``; 0 where it is an end.

    By the law of cosines: no array is as wide as the features.
    """
    inverse = _reciprocals(_roots(sides))
    return 0.5 * (sides[:, None] + sides - squares) * inverse[:, None] * inverse


def _normalised(gram: Array, norm: int, weight: Array) -> Array:
    """Rows divided by their norm, to which each column counts by its weight."""
    sums = jnp.sum(weight * (jnp.abs(gram) if norm == 1 else gram**2), axis=1, keepdims=True)
    norms = sums if norm == 1 else _roots(sums)
    return gram * _reciprocals(norms)


def _expansion(gram: Array, gamma: Any, order: int) -> Array:
    terms = [(2 * gamma) ** p / math.factorial(p) * gram**p for p in range(1, order + 1)]
    return jnp.exp(-2 * jnp.asarray(gamma, jnp.float32)) * (1 + sum(terms))


def _probabilities(features: Array, weight: Array) -> Array:
    """The cosine kernel ``[N, N]``, its rows of sum 1 where each column counts by its weight."""
    kernel = jnp.maximum((_gram(_units(features, PKT_EPS)) + 1) / 2, 0.0)
    return kernel / jnp.maximum(jnp.sum(weight * kernel, axis=1, keepdims=True), 1e-9)
