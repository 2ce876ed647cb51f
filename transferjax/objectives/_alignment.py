"""How far the features of two domains are apart: losses of arrays, for networks that should not tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from transferjax._errors import DataError, TransferError, describe, is_whole
from transferjax._types import Array

EXPONENTS = (-3, -2, -1, 0, 1)
"""Of the five kernels of MK-MMD: their bandwidths are 2^k times the mean squared distance."""

PRECISE = jax.lax.Precision.HIGHEST


def coral(source: Array, target: Array, *, means: bool = False) -> Array:
    """The squared difference of two covariances: ``||C_s - C_t||_F^2 / (4 d^2)``.

    Args:
      source: ``[N, d]``, features of the source domain; maps are flattened.
      target: ``[M, d]``, features of the target domain.
      means: the form of the Transfer-Learning-Library, which sees the means too: the mean squared difference of the
        means plus that of the covariances' entries, without the 4.

    Returns:
      A float32 scalar.

    Raises:
      DataError: the widths differ, or a domain has fewer than two examples.

    Source: Sun & Saenko, Deep CORAL, 2016, arXiv:1607.01719, equations 1 to 3.

    >>> x = jnp.array([[1.0], [-1.0]])
    >>> float(coral(x, x)), float(coral(x, 0 * x))
    (0.0, 1.0)
    """
    source, target = pair(source, target, "coral")
    mean, other = source.mean(0), target.mean(0)
    distance = jnp.sum((_covariance(source, mean) - _covariance(target, other)) ** 2) / source.shape[1] ** 2
    return jnp.mean((mean - other) ** 2) + distance if means else distance / 4


def mk_mmd(source: Array, target: Array, *, exponents: Sequence[float] = EXPONENTS, linear: bool = False) -> Array:
    """The maximum mean discrepancy of two domains under a sum of Gaussian kernels.

    ``E k(s, s') + E k(t, t') - 2 E k(s, t)`` with ``k = sum_k exp(-d^2 / (2 sigma_k^2))``, ``sigma_k^2 = 2^k`` times
    the mean of ``d^2`` over all pairs of both domains, through which no gradient flows. Pairs of an example with
    itself are left out, so the estimate is unbiased and may be negative. The Transfer-Learning-Library adds the
    constant ``2 / (N - 1)``.

    Args:
      source: ``[N, d]``, features of the source domain; maps are flattened.
      target: ``[M, d]``, features of the target domain.
      exponents: the ``k`` of each kernel.
      linear: the estimate from N pairs of neighbours in the batch (the last one's is the first) instead of all pairs.

    Returns:
      A float32 scalar.

    Raises:
      DataError: the widths differ, a domain has fewer than two examples, or ``linear`` and the numbers of examples
        differ.

    Source: Long et al., Learning Transferable Features with Deep Adaptation Networks, 2015, arXiv:1502.02791.

    >>> x = jnp.array([[0.0], [1.0], [2.0]])
    >>> bool(mk_mmd(x, x + 5) > mk_mmd(x, x + 1))
    True
    """
    source, target = pair(source, target, "mk_mmd")
    return _discrepancy(_gaussians(source, target, exponents), len(source), linear, "mk_mmd")


def jmmd(
    source: Sequence[Array],
    target: Sequence[Array],
    *,
    exponents: Sequence[float] = EXPONENTS,
    sigmas: Sequence[float | None] | None = None,
    linear: bool = False,
) -> Array:
    """The discrepancy of the joint distributions of several layers: kernels of the layers are multiplied.

    Args:
      source: one array ``[N, d]`` per layer, of the source domain; the last is mostly the softmax of the outputs.
      target: one array ``[M, d]`` per layer, of the target domain.
      exponents: as in :func:`mk_mmd`, for the layers without a sigma of their own.
      sigmas: per layer the sigma of one fixed kernel, or ``None``: the Transfer-Learning-Library takes .92 for the
        softmax of the outputs.
      linear: as in :func:`mk_mmd`.

    Returns:
      A float32 scalar.

    Raises:
      DataError: the layers do not match in number, width or examples.

    Source: Long et al., Deep Transfer Learning with Joint Adaptation Networks, 2017, arXiv:1605.06636.

    >>> x, p = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[0.9], [0.5], [0.1]])
    >>> bool(jmmd((x, p), (x + 5, p)) > jmmd((x, p), (x + 1, p)))
    True
    """
    sigmas = (None,) * len(source) if sigmas is None else sigmas
    if not len(source) == len(target) == len(sigmas) or not len(source):
        raise DataError(
            f"jmmd() got {len(source)} layers of the source, {len(target)} of the target and {len(sigmas)} sigmas. "
            "Expected one of each per layer, and one layer at least."
        )
    layers = [pair(one, other, "jmmd") for one, other in zip(source, target, strict=True)]
    counts = {(len(one), len(other)) for one, other in layers}
    if len(counts) > 1:
        raise DataError(f"jmmd() got layers of {sorted(counts)} examples. Expected the same examples in every layer.")
    kernel = jnp.ones(())
    for (one, other), sigma in zip(layers, sigmas, strict=True):
        kernel = kernel * _gaussians(one, other, exponents, sigma)
    return _discrepancy(kernel, counts.pop()[0], linear, "jmmd")


def bsp(source: Array, target: Array, *, k: int = 1) -> Array:
    """The ``k`` largest squared singular values of either domain's features, which batch spectral penalisation shrinks.

    Args:
      source: ``[N, d]``, features of the source domain, not centred.
      target: ``[M, d]``, features of the target domain.
      k: how many singular values; static.

    Returns:
      A float32 scalar. Gradients are exact where the k-th and the next value differ, and finite everywhere.

    Raises:
      DataError: the widths differ.
      TransferError: ``k`` is below 1 or above the number of singular values.

    Source: Chen et al., Transferability vs. Discriminability: Batch Spectral Penalization, 2019.

    >>> float(bsp(jnp.diag(jnp.array([1.0, 3.0])), jnp.eye(2)))
    10.0
    """
    source, target = pair(source, target, "bsp")
    most = min(*source.shape, *target.shape)
    if not is_whole(k) or k > most:
        raise TransferError(f"bsp() expects k from 1 to {most}, the number of singular values, got {k!r}.")
    return _largest(source, k) + _largest(target, k)


def afn(source: Array, target: Array, *, delta: float | Array = 1.0) -> Array:
    """The pull on the norms of features that adaptive feature norm needs: each norm should grow by ``delta``.

    ``mean (||f|| - stop(||f||) - delta)^2``, summed over both domains: the value is ``2 delta^2`` always, the gradient
    is what counts.

    Args:
      source: ``[N, d]``, features of the source domain.
      target: ``[M, d]``, features of the target domain.
      delta: the step of the norms, in units of the features.

    Returns:
      A float32 scalar.

    Raises:
      DataError: the widths differ.

    Source: Xu et al., Larger Norm More Transferable, 2019, arXiv:1811.07456.

    >>> float(afn(jnp.ones((2, 3)), jnp.zeros((2, 3))))
    2.0
    """
    source, target = pair(source, target, "afn")
    return sum((_grown(part, delta) for part in (source, target)), jnp.zeros(()))


def pair(source: Any, target: Any, name: str) -> tuple[Array, Array]:
    """The features of two domains as float32 ``[N, d]`` and ``[M, d]``, checked.

    Raises:
      DataError: they are no ``[N, ...]``, the widths differ, or a domain has fewer than two examples.

    >>> [part.shape for part in pair(jnp.ones((2, 2, 3)), jnp.ones((4, 6)), "coral")]
    [(2, 6), (4, 6)]
    """
    if min(jnp.ndim(source), jnp.ndim(target)) < 2:
        raise DataError(
            f"{name}() got features {describe(source)} and {describe(target)}. Expected [N, d] of the source and "
            "[M, d] of the target."
        )
    one, other = (jnp.reshape(part, (len(part), -1)).astype(jnp.float32) for part in (source, target))
    if one.shape[1] != other.shape[1]:
        raise DataError(
            f"{name}() got source features of width {one.shape[1]} and target features of width {other.shape[1]}. "
            "Expected one width: the same layer of one network."
        )
    if min(len(one), len(other)) < 2:
        raise DataError(
            f"{name}() got {len(one)} source and {len(other)} target examples. Expected at least two of each domain."
        )
    return one, other


def _covariance(features: Array, mean: Array) -> Array:
    centred = features - mean
    return jnp.matmul(centred.T, centred, precision=PRECISE) / (len(features) - 1)


def _gaussians(source: Array, target: Array, exponents: Sequence[float], sigma: float | None = None) -> Array:
    """The sum of kernels between all examples of both domains, ``[N + M, N + M]``."""
    features = jnp.concatenate([source, target])
    features = features - jax.lax.stop_gradient(features.mean(0))
    squares = jnp.sum(features**2, axis=1)
    distance = squares[:, None] + squares[None] - 2 * jnp.matmul(features, features.T, precision=PRECISE)
    distance = jnp.maximum(jnp.where(jnp.eye(len(features), dtype=bool), 0.0, distance), 0.0)
    if sigma is not None:
        return jnp.exp(-distance / (2 * sigma**2))
    scale = jnp.maximum(jax.lax.stop_gradient(jnp.mean(distance)), 1e-30)  # features that are all alike: k = 1
    return sum((jnp.exp(-distance / (2 * 2.0**k * scale)) for k in exponents), jnp.zeros(()))


def _discrepancy(kernel: Array, count: int, linear: bool, name: str) -> Array:
    """The estimate from the kernel of all examples, of which the first ``count`` are the source's."""
    within, across, other = kernel[:count, :count], kernel[:count, count:], kernel[count:, count:]
    if linear:
        if len(other) != count:
            raise DataError(
                f"{name}(linear=True) got {count} source and {len(other)} target examples. Expected as many of each."
            )
        one = jnp.arange(count)
        two = (one + 1) % count
        return jnp.mean(within[one, two] + other[one, two] - across[one, two] - across[two, one])
    return _others(within) + _others(other) - 2 * jnp.mean(across)


def _others(kernel: Array) -> Array:
    """The mean over pairs of different examples."""
    count = len(kernel)
    return jnp.sum(jnp.where(jnp.eye(count, dtype=bool), 0.0, kernel)) / (count * (count - 1))


def _largest(features: Array, k: int) -> Array:
    # The singular vectors are held fixed: the gradient of |F v|^2 is then that of the squared singular value, and no
    # difference of two singular values is ever divided by.
    fixed = jax.lax.stop_gradient(features if features.shape[0] >= features.shape[1] else features.T)
    vectors = jnp.linalg.eigh(jnp.matmul(fixed.T, fixed, precision=PRECISE))[1][:, -k:]
    rows = features if features.shape[0] >= features.shape[1] else features.T
    return jnp.sum(jnp.matmul(rows, vectors, precision=PRECISE) ** 2)


def _grown(features: Array, delta: Any) -> Array:
    squares = jnp.sum(features**2, axis=1)
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return jnp.mean((norm - jax.lax.stop_gradient(norm) - delta) ** 2)
