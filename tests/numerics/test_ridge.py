"""Ridge regression from one decomposition: primal and dual, exact leave-one-out."""

import numpy as np
import pytest

from transferjax.numerics._ridge import decompose_ridge, left_out_ridge, solve_ridge


def problem(count, width):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, width)) + 3, rng.normal(size=(count, 2)) - 1, rng.uniform(0.1, 3, count)


def direct(x, y, weights, strength):
    """The normal equations, the bias a column without penalty."""
    wide = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    penalty = strength * np.diag([1.0] * x.shape[1] + [0.0])
    found = np.linalg.solve(wide.T @ (weights[:, None] * wide) + penalty, wide.T @ (weights[:, None] * y))
    return found[:-1], found[-1]


@pytest.mark.parametrize(("count", "width", "dual"), [(30, 4, False), (9, 9, False), (8, 20, True)])
def test_solutions_are_those_of_the_normal_equations(count, width, dual):
    x, y, weights = problem(count, width)
    ridge = decompose_ridge(x, y, weights)
    assert ridge.dual == dual
    for strength in (1e-2, 3.0, 1e4):
        for found, wanted in zip(solve_ridge(ridge, strength), direct(x, y, weights, strength)):
            np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("count", "width"), [(30, 4), (9, 9), (8, 20)])
@pytest.mark.parametrize("strength", [1e-6, 1.0, 1e3])
def test_left_out_predictions_are_those_of_fits_without_the_example(count, width, strength):
    x, y, weights = problem(count, width)
    found = next(left_out_ridge(decompose_ridge(x, y, weights), np.array([strength])))
    for row in range(count):
        kept = np.arange(count) != row
        kernel, bias = solve_ridge(decompose_ridge(x[kept], y[kept], weights[kept]), strength)
        np.testing.assert_allclose(found[row], x[row] @ kernel + bias, rtol=1e-5, atol=1e-6)


def test_rows_in_blocks(monkeypatch):
    x, y, weights = problem(30, 4)
    whole = list(left_out_ridge(decompose_ridge(x, y, weights), np.array([1.0, 10.0])))
    monkeypatch.setattr("transferjax.numerics._ridge.ROWS", 7)
    np.testing.assert_allclose(
        list(left_out_ridge(decompose_ridge(x, y, weights), np.array([1.0, 10.0]))), whole, rtol=1e-12
    )
