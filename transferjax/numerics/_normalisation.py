"""Batch normalisation with a derivative that passes over the input as seldom as it can."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalisation by the batch's own statistics, over all axes but the last.

    ``(x - mean) * rsqrt(variance + epsilon) * scale + bias`` with the biased variance ``E[x^2] - E[x]^2``, clipped
    at zero: what ``flax.nnx.BatchNorm`` computes. The derivative keeps ``x`` and four numbers per channel, where
    plain autodiff keeps a centred copy of ``x`` too. Statistics are float32 at least. Reverse mode only.

    Args:
      x: ``[..., C]``, at least one axis besides the last.
      scale: ``[C]``.
      bias: ``[C]``.
      epsilon: added to the variance.

    Returns:
      ``(normalised [..., C] in the dtype of x, mean [C], variance [C])``.

    >>> import jax.numpy as jnp
    >>> y, mean, variance = batch_norm(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.zeros(1), epsilon=0.0)
    >>> y.tolist(), mean.tolist(), variance.tolist()
    ([[-1.0], [1.0]], [2.0], [1.0])

    Source: Ioffe and Szegedy, arXiv:1502.03167.
    """
    return _batch_norm(float(epsilon), x, scale, bias)


def _statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(x.ndim - 1))
    mean = wide.mean(axes)
    return mean, jnp.maximum(0.0, jnp.square(wide).mean(axes) - jnp.square(mean))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_norm(epsilon: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    mean, variance = _statistics(x)
    factor = lax.rsqrt(variance + epsilon) * scale
    return ((x - mean) * factor + bias).astype(x.dtype), mean, variance


def _forward(epsilon: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    outputs: Any = _batch_norm(epsilon, x, scale, bias)
    return outputs, (x, scale, bias, *outputs[1:])


def _backward(epsilon: float, saved: Any, cotangents: Any) -> Any:
    """The input's cotangent is ``a * g + b * x + c`` with one ``a``, ``b`` and ``c`` per channel."""
    x, scale, bias, mean, variance = saved
    g, to_mean, to_variance = cotangents
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    root = lax.rsqrt(variance + epsilon)
    wide = g.astype(mean.dtype)
    total, moment = wide.sum(axes), (wide * x).sum(axes)
    to_scale = root * (moment - mean * total)
    to_variance = jnp.where(variance > 0, to_variance, 0.0)
    a = scale * root
    b = (2.0 * to_variance - a * root * to_scale) / count
    c = (to_mean - a * total) / count - b * mean
    return (a * g + b * x + c).astype(x.dtype), to_scale.astype(scale.dtype), total.astype(bias.dtype)


_batch_norm.defvjp(_forward, _backward)
