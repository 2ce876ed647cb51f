"""Principal components and mixtures of Gaussians against scikit-learn."""

import itertools

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from transferjax.numerics import _mixture as mix

RNG = np.random.default_rng(0)


def clusters(count, width, parts, apart=4.0):
    means = apart * RNG.standard_normal((parts, width))
    codes = RNG.integers(0, parts, count)
    return means[codes] + RNG.standard_normal((count, width)), codes


@pytest.mark.parametrize("shape", [(300, 12), (25, 60)])
def test_principal_components_are_those_of_scikit_learn(shape):
    x = RNG.standard_normal(shape) * np.geomspace(1, 20, shape[1]) + 5
    for options, kept in [({"energy": 0.8}, 0.8), ({"count": 4}, 4), ({"energy": 0.95}, 0.95)]:
        peer = PCA(kept, svd_solver="full").fit(x)
        scores, variances = mix.principal_scores(x, **options)
        np.testing.assert_allclose(np.abs(scores), np.abs(peer.transform(x)), rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(variances, peer.explained_variance_ * (len(x) - 1) / len(x), rtol=1e-9)
    assert mix.principal_scores(x, count=1000)[0].shape[1] <= min(shape)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("rows", [mix.ROWS, 1])
@pytest.mark.parametrize("iterations", [1, 5, 100])
def test_em_is_that_of_scikit_learn(iterations, rows, monkeypatch):
    monkeypatch.setattr(mix, "ROWS", rows)
    x, _ = clusters(400, 3, 4, apart=1.5)
    floor = 1e-6 * x.var(0).mean()
    begin = mix._from_codes(x, mix.divide(x, 4), floor)
    precisions = np.einsum("kji,kjl->kil", begin.precisions, begin.precisions)
    peer = GaussianMixture(
        4, max_iter=iterations, reg_covar=floor, weights_init=begin.weights, means_init=begin.means,
        precisions_init=precisions,
    ).fit(x)  # fmt: skip
    found = mix.gaussian_mixture(x, 4, iterations=iterations)
    np.testing.assert_allclose(found.weights, peer.weights_, rtol=1e-6)
    np.testing.assert_allclose(found.means, peer.means_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(mix.responsibilities(found, x), peer.predict_proba(x), rtol=1e-5, atol=1e-8)
    assert found.likelihood == pytest.approx(peer.lower_bound_, rel=1e-9)


def test_every_step_raises_the_likelihood():
    x, _ = clusters(300, 4, 5, apart=1.0)
    found = [mix.gaussian_mixture(x, 6, iterations=n, tolerance=0.0).likelihood for n in range(1, 12)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(found)) and found[-1] > found[0] + 1e-3


def test_points_are_divided_where_they_are_apart():
    x, codes = clusters(200, 5, 4, apart=30.0)
    found = mix.divide(x, 4)
    assert len({(a, b) for a, b in zip(codes, found)}) == 4
    order, basis = RNG.permutation(200), np.linalg.qr(RNG.standard_normal((5, 5)))[0]
    turned = mix.divide((x @ basis)[order], 4)
    assert len({(a, b) for a, b in zip(found[order], turned)}) == 4


def test_points_that_coincide_are_not_divided():
    x = np.repeat(np.array([[0.0, 1.0], [2.0, 5.0]]), 10, axis=0)
    assert set(mix.divide(x, 7).tolist()) == {0, 1}
    found = mix.gaussian_mixture(x, 7)
    np.testing.assert_allclose(sorted(found.means[:, 0]), [0, 2], atol=1e-9)
    given = mix.gaussian_mixture(x, 2, start=np.arange(20) // 10)
    np.testing.assert_allclose(given.means, [[0, 1], [2, 5]], atol=1e-9)


def test_an_empty_component_does_no_harm():
    x, _ = clusters(60, 2, 2)
    begin = mix.gaussian_mixture(x, 2)
    far = begin._replace(means=begin.means + np.array([[0.0], [1e6]]))
    found = mix._step(x, far, 1e-6)
    assert np.isfinite(found.means).all() and np.isfinite(mix.responsibilities(found, x)).all()
