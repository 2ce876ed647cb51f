"""L-BFGS in one compiled program: for any smooth function, and for linear models at many strengths at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

SEARCH, FLATTER = 30, 0.5
FADING = 0.2  # about the curvature where a loss is flat, times the mean square of the examples, per strength


class Minimum(NamedTuple):
    """Where a minimisation ended.

    Attributes:
      point: a tree like the starting point.
      value: of the function there.
      gradient: the L2 norm of its gradient there.
      iterations: how many there were.
    """

    point: Any
    value: Any
    gradient: Any
    iterations: Any


class LinearPath(NamedTuple):
    """Linear models at many strengths.

    Attributes:
      kernels: ``[S, d, K]``.
      biases: ``[S, K]``.
      gradients: ``[S]``, the L2 norm of the gradient at each, divided by the sum of the weights.
      iterations: ``[S]``.
    """

    kernels: np.ndarray
    biases: np.ndarray
    gradients: np.ndarray
    iterations: np.ndarray


def minimise(function: Callable[[Any], Any], start: Any, *, iterations: int, tolerance: float) -> Minimum:
    """A minimum of a smooth function by L-BFGS with a zoom line search; pure, to be called under ``jax.jit``.

    Args:
      function: a tree of floats to a number.
      start: where to begin.
      iterations: at most this many.
      tolerance: it ends when the L2 norm of the gradient is at most this.

    Source: Liu and Nocedal, Mathematical Programming 45 (1989).

    >>> found = minimise(lambda x: ((x - 3.0) ** 2).sum(), jnp.zeros(2), iterations=20, tolerance=1e-4)
    >>> np.asarray(found.point).round(3)
    array([3., 3.], dtype=float32)
    """
    transform = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(function)

    def again(carry):
        _, _, _, norm, number = carry
        return (number < iterations) & (norm > tolerance)

    def turn(carry):
        point, state, _, _, number = carry
        value, gradient = value_and_grad(point, state=state)
        updates, state = transform.update(gradient, state, point, value=value, grad=gradient, value_fn=function)
        point = optax.apply_updates(point, updates)
        reached, after = value_and_grad(point, state=state)
        return point, state, reached, optax.tree.norm(after), number + 1

    value, gradient = jax.value_and_grad(function)(start)
    carry = (start, transform.init(start), value, optax.tree.norm(gradient), jnp.asarray(0))
    point, _, value, norm, number = jax.lax.while_loop(again, turn, carry)
    return Minimum(point, value, norm, number)


def softmax_loss(scores: Any, wanted: Any) -> Any:
    """Cross-entropy of each row, ``[N, K] -> [N]``; ``wanted`` are one-hot rows.

    >>> np.asarray(softmax_loss(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))).round(4)
    array([0.6931], dtype=float32)
    """
    return jax.nn.logsumexp(scores, axis=-1) - (scores * wanted).sum(-1)


def sigmoid_loss(scores: Any, wanted: Any) -> Any:
    """Binary cross-entropy of each row, summed over its labels; ``wanted`` are ones and zeros.

    >>> np.asarray(sigmoid_loss(jnp.zeros((1, 1)), jnp.ones((1, 1)))).round(4)
    array([0.6931], dtype=float32)
    """
    return (jax.nn.softplus(scores) - scores * wanted).sum(-1)


def squared_hinge_loss(scores: Any, wanted: Any) -> Any:
    """``max(0, 1 - sign * score)**2`` of each row, summed over its columns; ``wanted`` are ones and zeros.

    >>> squared_hinge_loss(jnp.zeros((1, 1)), jnp.ones((1, 1))).tolist()
    [1.0]
    """
    return (jnp.maximum(0.0, 1 - (2 * wanted - 1) * scores) ** 2).sum(-1)


def principal_basis(features: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal directions ``[d, min(N, d)]`` that span the weighted examples, and their weighted squares.

    A penalty on the squares of a kernel is the same in this basis, and the kernel that minimises a loss with such a
    penalty lies in it, so ``d > N`` costs no more than ``d = N``. Directions that no example has are zero.

    >>> basis, values = principal_basis(np.array([[3.0, 0.0], [1.0, 0.0]]), np.ones(2))
    >>> values.round(6).tolist()
    [0.0, 10.0]
    """
    scaled = np.sqrt(weights)[:, None] * features
    if features.shape[1] <= len(features):
        values, basis = np.linalg.eigh(scaled.T @ scaled)
        return basis, np.maximum(values, 0)
    values, vectors = np.linalg.eigh(scaled @ scaled.T)
    there = values > values[-1] * len(features) * np.finfo(np.float64).eps
    lengths = np.sqrt(np.where(there, values, 1.0))
    return np.where(there, scaled.T @ vectors / lengths, 0.0), np.where(there, values, 0.0)


def linear_path(
    features: np.ndarray,
    wanted: np.ndarray,
    weights: np.ndarray,
    strengths: np.ndarray,
    loss: Callable[[Any, Any], Any],
    *,
    curvature: tuple[float, float],
    free_bias: bool = True,
    iterations: int = 500,
    tolerance: float = 1e-8,
) -> LinearPath:
    """Linear models that minimise ``sum(weights * loss) + .5 * strength * sum(kernel**2)``, all strengths together.

    L-BFGS in float64, in the principal basis of the examples and scaled by the curvature along it, so that few
    iterations are needed at any strength; each costs two products of matrices, its line search none.

    Args:
      features: float64 ``[N, d]``, best centred when the bias is free.
      wanted: float64 ``[N, K]``, what ``loss`` compares with.
      weights: float64 ``[N]``, not negative.
      strengths: float64 ``[S]``, positive.
      loss: ``(scores [N, K], wanted [N, K]) -> [N]``, convex, a function of a module (it is compiled once).
      curvature: the least and the largest second derivative of the loss by a score that may be expected. Under a weak
        penalty examples are fitted so well that the loss is flat around them, which the scaling follows.
      free_bias: the bias is not penalised; otherwise as one more entry of the kernel.
      iterations: at most this many.
      tolerance: a strength is done when the L2 norm of its gradient is at most ``tolerance * sum(weights)``.

    Source: Liu and Nocedal, Mathematical Programming 45 (1989), through optax.

    >>> path = linear_path(np.array([[-1.0], [1.0]]), np.array([[0.0], [1.0]]), np.ones(2), np.ones(1), sigmoid_loss,
    ...     curvature=(0.01, 0.25))
    >>> path.kernels.shape, path.biases.shape, bool(path.kernels > 0)
    ((1, 1, 1), (1, 1), True)
    """
    basis, values = principal_basis(features, weights)
    size = max(values.sum() / weights.sum(), np.finfo(np.float64).tiny)
    with jax.enable_x64(True):
        found = _solve_path(
            features @ basis,
            values,
            wanted,
            weights,
            strengths,
            np.clip(FADING * strengths / size, *curvature),
            float(not free_bias),
            float(tolerance),
            loss=loss,
            iterations=int(iterations),
        )
        kernels, biases, gradients, counts = (np.asarray(part) for part in found)
    return LinearPath(basis @ kernels, biases, gradients, counts)


@functools.partial(jax.jit, static_argnames=("loss", "iterations"))
def _solve_path(x, values, wanted, weights, strengths, curvature, penal, tolerance, *, loss, iterations):
    """The path in a basis in which ``x.T @ (weights * x)`` is ``diag(values)``.

    Models are ``[S, d, K]`` and ``[S, K]``, scores ``[N, S, K]``. All strengths take their steps together, and those
    that are done stand still, so that nothing is copied to keep them.
    """
    limit = tolerance * weights.sum()
    pull = strengths[:, None, None], strengths[:, None] * penal
    bends = curvature[:, None] * values + strengths[:, None], curvature * weights.sum() + penal * strengths
    scale = 1 / jnp.sqrt(bends[0])[:, :, None], 1 / jnp.sqrt(bends[1])[:, None]
    product = lambda one, other: jax.tree.map(jnp.multiply, one, other)
    inner = lambda one, other: sum(jnp.einsum("s...,s...->s", *pair) for pair in zip(one, other))
    loss_of = lambda scores: weights @ loss(scores, wanted[:, None])
    start, directions = _shared_lbfgs()

    def gradient_at(model, scores):
        push = jax.grad(lambda scores: loss_of(scores).sum())(scores)
        return jnp.einsum("nd,nsk->sdk", x, push) + pull[0] * model[0], push.sum(0) + pull[1] * model[1]

    def step_length(model, scores, along, moved, open_):
        lean, bend = inner(product(pull, along), model), inner(product(pull, along), along)
        line = lambda t: loss_of(scores + t[:, None] * moved) + t * lean + 0.5 * t * t * bend
        return _lowest(line, open_)

    def again(carry):
        _, _, _, _, norm, number = carry
        return (number < iterations).all() & (norm > limit).any()

    def turn(carry):
        point, scores, gradient, state, norm, number = carry
        updates, state = directions(product(gradient, scale), state, point)
        along = product(updates, jax.tree.map(jnp.negative, scale))
        moved = jnp.einsum("nd,sdk->nsk", x, along[0]) + along[1]
        t = step_length(product(point, scale), scores, along, moved, norm > limit)
        point = point[0] - t[:, None, None] * updates[0], point[1] - t[:, None] * updates[1]
        scores = scores + t[:, None] * moved
        gradient = gradient_at(product(point, scale), scores)
        return point, scores, gradient, state, jnp.sqrt(inner(gradient, gradient)), number + (norm > limit)

    count, columns = len(strengths), wanted.shape[1]
    point = jnp.zeros((count, x.shape[1], columns)), jnp.zeros((count, columns))
    scores = jnp.zeros((len(x), count, columns))
    gradient = gradient_at(point, scores)
    norm, number = jnp.sqrt(inner(gradient, gradient)), jnp.zeros(count, int)
    carry = (point, scores, gradient, start(point), norm, number)
    point, _, _, _, norm, number = jax.lax.while_loop(again, turn, carry)
    kernels, biases = product(point, scale)
    return kernels, biases, norm / weights.sum(), number


def _shared_lbfgs() -> tuple[Callable[[Any], Any], Callable[[Any, Any, Any], Any]]:
    """L-BFGS of optax for many problems in step: one counter, the axis of the memory before theirs."""
    transform = optax.scale_by_lbfgs()
    axes = optax.ScaleByLBFGSState(None, 0, 0, 1, 1, 0)  # pyright: ignore[reportArgumentType]

    def start(points):
        state: Any = jax.vmap(transform.init, out_axes=axes._replace(count=0))(points)
        return state._replace(count=state.count[0])

    return start, jax.vmap(transform.update, in_axes=(0, axes, 0), out_axes=(0, axes))


def _lowest(values: Callable[[Any], Any], open_: Any) -> Any:
    """About where convex functions of a number that fall at 0 are lowest: Newton steps, kept between known bounds.

    Args:
      values: ``[S] -> [S]``, each of its own number.
      open_: bool ``[S]``; the answer for the others is 0.
    """
    ones = jnp.ones(open_.shape)
    slope_at = lambda t: jax.jvp(values, (t,), (ones,))[1]
    slopes = lambda t: jax.jvp(slope_at, (t,), (ones,))
    enough = FLATTER * abs(slope_at(0 * ones))
    steep = lambda slope: open_ & (abs(slope) > enough)

    def again(carry):
        _, _, _, slope, _, number = carry
        return (number < SEARCH) & steep(slope).any()

    def turn(carry):
        t, low, high, slope, bend, number = carry
        low, high = jnp.where(slope < 0, t, low), jnp.where(slope < 0, high, t)
        newton = t - slope / bend
        middle = jnp.where(jnp.isinf(high), 2 * t, (low + high) / 2)
        t = jnp.where(steep(slope), jnp.where((newton > low) & (newton < high), newton, middle), t)
        slope, bend = slopes(t)
        return t, low, high, slope, bend, number + 1

    slope, bend = slopes(ones)
    t = jax.lax.while_loop(again, turn, (ones, 0 * ones, ones + jnp.inf, slope, bend, 0))[0]
    return jnp.where(open_, t, 0.0)
