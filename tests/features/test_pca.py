"""Principal components and whitening against scikit-learn."""

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA

import transferjax as tj
from transferjax.features._pca import pca, whiten

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(50, 6)) * [9, 5, 3, 1, 0.5, 0.1]) @ np.linalg.qr(RNG.normal(size=(6, 6)))[0] + 4


def run(found, x):
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found.params))
    return np.asarray(jax.jit(found.apply)(found.params, x))


@pytest.mark.parametrize("count", [50, 4])
def test_pca_is_scikit_learns(count):
    x, dims = X[:count], min(4, count - 1)
    found, peer = pca(x, dims), PCA(dims).fit(x)
    expected = peer.transform(X)
    mapped = run(found, X)
    sign = np.sign((mapped * expected).sum(0))
    np.testing.assert_allclose(mapped, expected * sign, atol=1e-4)
    np.testing.assert_allclose([row[1] for row in found.report.rows], peer.explained_variance_, rtol=1e-8)
    np.testing.assert_allclose([row[2] for row in found.report.rows], peer.explained_variance_ratio_, rtol=1e-8)
    assert found.report.rows[-1][3] == pytest.approx(peer.explained_variance_ratio_.sum())
    kernel = np.asarray(found.params["kernel"])
    assert (np.take_along_axis(kernel, np.abs(kernel).argmax(0)[None], 0) > 0).all()


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999])
def test_a_share_of_the_variance_takes_as_many_as_scikit_learn(energy):
    assert pca(X, energy).report.metadata["dims"] == PCA(energy, svd_solver="full").fit(X).n_components_


def test_all_of_the_variance_is_all_directions_and_one_is_not_one_point_zero():
    assert pca(X, 1.0).report.metadata["dims"] == 6
    assert pca(X, 1).report.metadata["dims"] == 1
    assert pca(X[:, :1], 0.3).params["kernel"].shape == (1, 1)
    flat = X @ np.diag([1, 1, 0, 0, 0, 0])
    assert pca(flat, 1.0).report.metadata["dims"] == 2


def test_whitened_features_have_the_covariance_one_and_stay_close():
    found = whiten(X)
    mapped = run(found, X)
    np.testing.assert_allclose(np.cov(mapped, rowvar=False), np.eye(6), atol=2e-3)
    np.testing.assert_allclose(mapped.mean(0), 0, atol=1e-3)
    kernel = np.asarray(found.params["kernel"])
    np.testing.assert_allclose(kernel, kernel.T, atol=1e-5)  # symmetric: the closest of all whitenings
    np.testing.assert_allclose(run(found, mapped * 0 + X.mean(0)), 0, atol=1e-3)


def test_directions_without_variance_are_not_blown_up():
    flat = np.concatenate([X, X[:, :2]], axis=1)
    mapped = run(whiten(flat, ridge=0), flat)
    np.testing.assert_allclose(np.linalg.eigvalsh(np.cov(mapped, rowvar=False)), [0, 0, 1, 1, 1, 1, 1, 1], atol=1e-2)
    firm = whiten(flat, ridge=0.1)
    np.testing.assert_allclose(
        firm.report.metadata["largest factor"], 1 / np.sqrt(0.1 * np.trace(np.cov(flat, rowvar=False)) / 8), rtol=1e-3
    )


@pytest.mark.parametrize("energy", [0.0, 1.5, -0.1, float("nan")])
def test_a_share_lies_between_0_and_1(energy):
    with pytest.raises(tj.TransferError, match=r"pca\(\) expects a whole number of directions, or a float in \(0, 1\]"):
        pca(X, energy)


@pytest.mark.parametrize("dims", [0, 7, "2", True])
def test_directions_are_no_more_than_columns(dims):
    with pytest.raises(tj.TransferError, match=r"pca\(\) expects dims, a whole number from 1 to 6 \(no more than col"):
        pca(X, dims)


@pytest.mark.parametrize("fit", [lambda x: pca(x, 1), whiten])
def test_bad_features_raise(fit):
    with pytest.raises(tj.DataError, match=r"expected at least 2 examples and one column"):
        fit(X[:1])
    with pytest.raises(tj.DataError, match=r"features are constant: all 50 examples have the same values"):
        fit(np.full((50, 3), 0.1, np.float32))
    with pytest.raises(tj.DataError, match=r"features are not finite in 1 of 50 examples, first in row 3"):
        fit(np.where(np.arange(50)[:, None] == 3, np.inf, X))


def test_whitening_wants_a_ridge_of_at_least_0():
    with pytest.raises(tj.TransferError, match=r"whiten\(\) expects ridge, a number of at least 0, got -1"):
        whiten(X, ridge=-1)
