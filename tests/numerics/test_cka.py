"""Gram matrices, their centring and HSIC, against scikit-learn and the formulas written out."""

import numpy as np
import pytest
from sklearn.metrics import pairwise_distances

from transferjax.numerics import _cka as cka

RNG = np.random.default_rng(0)


def hsic_1(first, second):
    """The unbiased estimator as Song et al. write it."""
    n, one = len(first), np.ones(len(first))
    k, m = first - np.diag(np.diag(first)), second - np.diag(np.diag(second))
    whole = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
    return whole / (n * (n - 3))


def test_squared_distances():
    x, y = RNG.standard_normal((2, 30, 5)) + 100
    np.testing.assert_allclose(cka.squared_distances(x), pairwise_distances(x) ** 2, atol=1e-9)
    np.testing.assert_allclose(cka.squared_distances(x, y[:7]), pairwise_distances(x, y[:7]) ** 2, atol=1e-9)
    assert not np.diagonal(cka.squared_distances(x)).any()


@pytest.mark.parametrize("threshold", [0.5, 2.0])
def test_the_bandwidth_is_a_multiple_of_the_median_distance(threshold):
    x = RNG.standard_normal((20, 4))
    d2 = pairwise_distances(x) ** 2
    np.testing.assert_allclose(cka.rbf_gram(x, threshold), np.exp(-d2 / (2 * threshold**2 * np.median(d2))), rtol=1e-9)


def test_the_mean_stands_in_for_a_median_of_zero():
    x = np.zeros((9, 2))
    x[0] = 1.0
    found = cka.rbf_gram(x)
    assert np.isfinite(found).all() and 0 < found[0, 1] < 1 and found[1, 2] == 1


def test_centred():
    x, n = RNG.standard_normal((12, 3)), 12
    kernel = np.exp(x @ x.T)
    h = np.eye(n) - 1 / n
    np.testing.assert_allclose(cka.centred(kernel.copy()), h @ kernel @ h, atol=1e-9)
    left_out = cka.centred(kernel.copy(), unbiased=True)
    np.testing.assert_allclose(left_out.sum(0), 0, atol=1e-9)
    other = np.cos(x @ x.T)
    product = np.vdot(left_out, cka.centred(other.copy(), unbiased=True)) / (n * (n - 3))
    assert product == pytest.approx(hsic_1(kernel, other), rel=1e-9)


@pytest.mark.parametrize("elements", [1 << 20, 8])
@pytest.mark.parametrize("widths", [(5, 9), (9, 700), (800, 700)])
def test_hsic_of_linear_kernels(widths, elements, monkeypatch):
    monkeypatch.setattr(cka, "ELEMENTS", elements)
    x, y = (RNG.standard_normal((600, width)).astype(np.float32) + 2 for width in widths)
    y[:, :5] += x[:, :5]
    k, m = (z.astype(np.float64) @ z.T.astype(np.float64) for z in (x, y))
    h = np.eye(600) - 1 / 600
    pairs = [(k, m), (k, k), (m, m)]
    np.testing.assert_allclose(cka.linear_hsic(x, y), [np.trace(h @ a @ h @ b) for a, b in pairs], rtol=1e-8)
    exact = [hsic_1(a, b) * 600 * 597 for a, b in pairs]
    np.testing.assert_allclose(cka.linear_hsic(x, y, unbiased=True), exact, rtol=1e-6, atol=1e-6 * max(exact))
