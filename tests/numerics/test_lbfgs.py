"""L-BFGS: minima of smooth functions, and linear models at many strengths against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from transferjax.numerics._lbfgs import (
    _lowest,
    linear_path,
    minimise,
    principal_basis,
    sigmoid_loss,
    softmax_loss,
    squared_hinge_loss,
)


def test_the_valley_of_rosenbrock():
    function = lambda p: (1 - p["x"]) ** 2 + 100 * (p["y"] - p["x"] ** 2) ** 2
    start = {"x": jnp.float32(-1.2), "y": jnp.float32(1.0)}
    found = jax.jit(lambda: minimise(function, start, iterations=200, tolerance=1e-3))()
    assert found.point["x"] == pytest.approx(1, abs=1e-2) and found.gradient <= 1e-3 and found.iterations < 100
    few = minimise(function, start, iterations=2, tolerance=1e-3)
    assert few.iterations == 2 and few.gradient > 1e-3


@pytest.mark.parametrize(
    "curve", [lambda t: (t - 5) ** 2, lambda t: jnp.logaddexp(t - 9, -t), lambda t: abs(t - 0.1) ** 3]
)
def test_a_line_is_searched_until_it_is_flat(curve):
    t, still = _lowest(jax.vmap(curve), jnp.array([True, False]))
    slope = jax.grad(curve)
    assert t > 0 and abs(slope(t)) <= 0.5 * abs(slope(0.0)) + 1e-6 and still == 0


@pytest.mark.parametrize(("count", "width"), [(20, 4), (6, 15)])
def test_the_basis_spans_the_examples_that_weigh(count, width):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(count, width)), rng.uniform(0.5, 2, count)
    weights[1] = 0
    basis, values = principal_basis(x, weights)
    assert basis.shape == (width, min(count, width))
    kept = values > 0
    np.testing.assert_allclose(basis[:, kept].T @ basis[:, kept], np.eye(kept.sum()), atol=1e-10)
    np.testing.assert_allclose((x @ basis).T @ (weights[:, None] * (x @ basis)), np.diag(values), atol=1e-9)
    there = weights > 0
    np.testing.assert_allclose(x[there] @ basis @ basis.T, x[there], atol=1e-9)


@pytest.mark.parametrize(("count", "width"), [(40, 4), (12, 30)])
@pytest.mark.parametrize("free_bias", [True, False])
@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss, squared_hinge_loss])
def test_minima_are_those_of_scipy(loss, free_bias, count, width):
    rng = np.random.default_rng(0)
    x, wanted, weights = rng.normal(size=(count, width)), np.eye(3)[np.arange(count) % 3], rng.uniform(0.5, 2, count)
    strengths = np.array([0.5, 20.0])
    path = linear_path(x, wanted, weights, strengths, loss, curvature=(0.01, 0.3), free_bias=free_bias)
    assert (path.gradients <= 1e-8).all() and (path.iterations > 0).all()

    def objective(flat, strength):
        model = flat.reshape(width + 1, 3)
        fit = weights @ loss(x @ model[:-1] + model[-1], wanted)
        return fit + 0.5 * strength * ((model[:-1] ** 2).sum() + (not free_bias) * (model[-1] ** 2).sum())

    with jax.enable_x64(True):
        both = jax.jit(jax.value_and_grad(objective))
        function = lambda flat, strength: tuple(np.asarray(part) for part in both(flat, strength))
        options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 2000}
        for number, strength in enumerate(strengths):
            start = np.zeros((width + 1) * 3)
            found = scipy.optimize.minimize(function, start, (strength,), "L-BFGS-B", jac=True, options=options)
            model = found.x.reshape(width + 1, 3)
            np.testing.assert_allclose(path.kernels[number], model[:-1], atol=1e-5)
            np.testing.assert_allclose(path.biases[number], model[-1], atol=1e-5)


def test_one_strength_of_many_is_that_strength_alone():
    rng = np.random.default_rng(0)
    x, wanted = rng.normal(size=(30, 4)), np.eye(3)[np.arange(30) % 3]
    fit = lambda strengths: linear_path(
        x, wanted, np.ones(30), np.array(strengths), softmax_loss, curvature=(0.01, 0.3)
    )
    np.testing.assert_allclose(fit([0.1, 1.0, 100.0]).kernels[1], fit([1.0]).kernels[0], atol=1e-7)
    few = linear_path(x, wanted, np.ones(30), np.array([0.1]), softmax_loss, curvature=(0.01, 0.3), iterations=1)
    assert few.iterations.tolist() == [1] and few.gradients[0] > 1e-8
