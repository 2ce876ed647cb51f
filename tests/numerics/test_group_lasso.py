"""Group lasso by reweighting is the minimum that proximal gradient descent finds."""

import numpy as np
import pytest

from transferjax.numerics._group_lasso import group_lasso


def proximal(x, y, strength, steps=20000):
    """An independent solver: proximal gradient descent."""
    penalty = strength * np.linalg.norm(x.T @ y, axis=1).max()
    rate, kernel = 1 / np.linalg.norm(x, 2) ** 2, np.zeros((x.shape[1], y.shape[1]))
    for _ in range(steps):
        kernel = kernel - rate * x.T @ (x @ kernel - y)
        norms = np.linalg.norm(kernel, axis=1, keepdims=True)
        kernel = kernel * np.maximum(0, 1 - rate * penalty / np.maximum(norms, 1e-300))
    return np.linalg.norm(kernel, axis=1)


@pytest.mark.parametrize(("count", "width"), [(40, 8), (12, 30)])
@pytest.mark.parametrize("strength", [0.1, 0.6])
def test_it_is_the_minimum(count, width, strength):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(count, width)), rng.normal(size=(count, 3))
    x, y = x - x.mean(0), y - y.mean(0)
    expected = proximal(x, y, strength)
    np.testing.assert_allclose(group_lasso(x, y, strength, iterations=3000), expected, atol=2e-3 * expected.max())


def test_nothing_to_explain_is_zero():
    assert group_lasso(np.eye(3), np.zeros((3, 2)), 0.1).tolist() == [0, 0, 0]
