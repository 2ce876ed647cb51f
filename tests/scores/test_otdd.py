"""The data set distance: classes as Gaussians, examples moved at the least cost."""

import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from transferjax._errors import DataError, TransferError
from transferjax.scores import otdd

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(30, 3)), np.arange(30) % 3
OTHER, NAMES = RNG.normal(size=(30, 3)) * 1.5 + 1, np.arange(30) % 2 + 7


def by_hand():
    """The assignment of least cost, with scipy."""

    def gaussian(x):
        return x.mean(0), np.cov(x, rowvar=False)

    def apart(a, b):
        root = scipy.linalg.sqrtm(a[1])
        shared = scipy.linalg.sqrtm(root @ b[1] @ root)
        return ((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * np.real(shared))

    mine, theirs = [gaussian(X[c == Y]) for c in range(3)], [gaussian(OTHER[c == NAMES]) for c in (7, 8)]
    cost = [[((x - o) ** 2).sum() + apart(mine[y], theirs[n - 7]) for o, n in zip(OTHER, NAMES)] for x, y in zip(X, Y)]
    cost = np.array(cost)
    return -np.sqrt(cost[scipy.optimize.linear_sum_assignment(cost)].mean())


def test_it_is_the_least_cost_of_moving_one_onto_the_other():
    assert otdd(X, Y, OTHER, NAMES, epsilon=0.005, iterations=50000) == pytest.approx(by_hand(), rel=5e-3)


def test_the_names_and_the_order_of_examples_do_not_matter():
    found, order = otdd(X, Y, OTHER, NAMES), RNG.permutation(30)
    assert found == pytest.approx(otdd(X[order], 5 - Y[order], OTHER, NAMES * 3), rel=1e-6)
    assert found == pytest.approx(otdd(OTHER, NAMES, X, Y), rel=1e-3)


def test_one_data_set_twice_is_near_and_labels_tell():
    assert -0.5 < otdd(X, Y, X, Y, epsilon=0.01) <= 0
    far = X + 6.0 * (Y == 0)[:, None]
    assert otdd(far, Y, far, (Y + 1) % 3) == pytest.approx(otdd(far, Y, far, Y), abs=1e-6)
    assert otdd(far, Y, far, RNG.permutation(Y)) < otdd(far, Y, far, Y) - 0.5


def test_what_does_not_fit_is_named(monkeypatch):
    with pytest.raises(DataError, match=r"features are 3 wide and other features 2\. Expected equal widths"):
        otdd(X, Y, OTHER[:, :2], NAMES)
    with pytest.raises(DataError, match="other labels: class 9 has one example, which has no covariance"):
        otdd(X, Y, OTHER, [9, *NAMES[1:]])
    with pytest.raises(TransferError, match=r"otdd\(\) did not converge in 1 iterations"):
        otdd(X, Y, OTHER, NAMES, epsilon=1e-5, iterations=1)
    monkeypatch.setitem(sys.modules, "ott.geometry.geometry", None)
    with pytest.raises(TransferError, match=r"otdd\(\) needs ott-jax, which is not installed: pip install"):
        otdd(X, Y, OTHER, NAMES)
