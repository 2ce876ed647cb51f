"""Maps between feature spaces against SciPy, scikit-learn, brute force and their formulas."""

import importlib.util
import sys

import jax
import numpy as np
import pytest
from scipy.linalg import fractional_matrix_power, orthogonal_procrustes, subspace_angles
from scipy.special import logsumexp
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict

import transferjax as tj
from transferjax.features._maps import FeatureMap, cca, coral, procrustes, ridge_map, subspace_alignment
from transferjax.features._transport import optimal_transport

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(5, 5))
X = RNG.normal(size=(40, 5)) @ MIX + 3
Y = RNG.normal(size=(60, 5)) @ RNG.normal(size=(5, 5)) - 1
PAIR = X @ RNG.normal(size=(5, 3)) + 0.5 * RNG.normal(size=(40, 3)) + 2

needs_ott = pytest.mark.skipif(importlib.util.find_spec("ott") is None, reason="ott-jax is not installed")
ott_warns = pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained:DeprecationWarning")


def run(found: FeatureMap, x, part=None):
    params = found.params if part is None else found.params[part]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found.params))
    return np.asarray(jax.jit(found.apply)(params, x))


def covariance(x):
    return np.cov(x, rowvar=False)


def test_coral_gives_the_target_s_mean_and_covariance():
    found = coral(X, Y, ridge=1e-9)
    mapped = run(found, X)
    np.testing.assert_allclose(mapped.mean(0), Y.mean(0), atol=1e-4)
    np.testing.assert_allclose(covariance(mapped), covariance(Y), rtol=1e-3, atol=1e-3)
    (_, before), (_, after) = found.report.rows
    np.testing.assert_allclose(
        before, np.linalg.norm(covariance(X) - covariance(Y)) / np.linalg.norm(covariance(Y)), rtol=1e-6
    )
    assert after < 1e-6 < before
    default = coral(X, Y)
    np.testing.assert_allclose(covariance(run(default, X)), covariance(Y), atol=0.05 * np.abs(covariance(Y)).max())


def test_coral_is_algorithm_1_on_standardised_features():
    x, y = ((part - part.mean(0)) / part.std(0, ddof=1) for part in (X, Y))
    expected = (
        x
        @ fractional_matrix_power(covariance(x) + np.eye(5), -0.5)
        @ fractional_matrix_power(covariance(y) + np.eye(5), 0.5)
    )
    np.testing.assert_allclose(run(coral(x, y, ridge=1.0), x), expected, atol=1e-5)


def test_coral_between_equals_changes_nothing_and_few_examples_stay_finite():
    np.testing.assert_allclose(run(coral(X, X), X), X, atol=1e-4)
    wide = RNG.normal(size=(6, 50)), RNG.normal(size=(7, 50))
    found = coral(*wide)
    assert np.isfinite(run(found, RNG.normal(size=(100, 50)))).all()
    source, target = (covariance(part) for part in wide)
    largest = np.linalg.eigvalsh(target)[-1] + 1e-3 * np.trace(target) / 50
    assert found.report.metadata["largest factor"] ** 2 <= largest / (1e-3 * np.trace(source) / 50)


def test_procrustes_is_scipys():
    other = X[:, ::-1] @ np.linalg.qr(MIX)[0] * 2 + RNG.normal(size=X.shape)
    rotation, total = orthogonal_procrustes(X, other)
    plain = procrustes(X, other, centre=False)
    np.testing.assert_allclose(run(plain, X), X @ rotation, atol=1e-4)
    scaled = procrustes(X, other, centre=False, scale=True)
    np.testing.assert_allclose(scaled.report.metadata["factor"], total / (X**2).sum(), rtol=1e-6)
    centred = procrustes(X, other)
    rotation, _ = orthogonal_procrustes(X - X.mean(0), other - other.mean(0))
    mapped = run(centred, X)
    np.testing.assert_allclose(mapped, (X - X.mean(0)) @ rotation + other.mean(0), atol=1e-4)
    met = 1 - ((mapped - other) ** 2).sum() / ((other - other.mean(0)) ** 2).sum()
    np.testing.assert_allclose(centred.report.metadata["met"], met, rtol=1e-4)
    both = procrustes(X, other, scale=True)
    met = 1 - ((run(both, X) - other) ** 2).sum() / ((other - other.mean(0)) ** 2).sum()
    np.testing.assert_allclose(both.report.metadata["met"], met, rtol=1e-4)


def test_procrustes_finds_a_rotation_again():
    rotation = np.linalg.qr(MIX)[0]
    found = procrustes(X, 3 * X @ rotation + 7, scale=True)
    np.testing.assert_allclose(run(found, Y), 3 * Y @ rotation + 7, atol=1e-3)
    assert found.report.metadata["met"] == pytest.approx(1.0)


@pytest.mark.parametrize("wide", [False, True])
def test_ridge_map_is_ridge_with_exact_leave_one_out(wide):
    x = np.concatenate([X, RNG.normal(size=(40, 60))], axis=1) if wide else X
    strengths = [0.1, 5.0, 100.0]
    found = ridge_map(x, PAIR, strengths)
    errors = []
    for strength in strengths:
        left_out = cross_val_predict(Ridge(strength), x, PAIR, cv=LeaveOneOut())
        errors.append(((left_out - PAIR) ** 2).mean())
    np.testing.assert_allclose([row[1] for row in found.report.rows], errors, rtol=1e-8)
    best = strengths[int(np.argmin(errors))]
    assert found.report.metadata["strength"] == best
    np.testing.assert_allclose(run(found, x), Ridge(best).fit(x, PAIR).predict(x), rtol=1e-3, atol=1e-3)
    met = 1 - min(errors) * PAIR.size / ((PAIR - PAIR.mean(0)) ** 2).sum()
    assert max(row[2] for row in found.report.rows) == pytest.approx(met)


def test_ridge_map_chooses_among_strengths_by_the_data():
    exact = ridge_map(X, X @ MIX)
    np.testing.assert_allclose(run(exact, Y), Y @ MIX, atol=1e-2)
    assert "first or last" in exact.report.metadata["note"]
    noise = ridge_map(X, RNG.normal(size=(40, 2)))
    assert noise.report.metadata["strength"] > exact.report.metadata["strength"]
    assert np.isfinite(
        run(ridge_map(RNG.normal(size=(4, 30)), RNG.normal(size=(4, 2))), RNG.normal(size=(9, 30)))
    ).all()


def test_cca_finds_scikit_learns_correlations():
    x, y = np.concatenate([X, RNG.normal(size=(40, 1))], 1), PAIR
    found = cca(x, y, 3, ridge=0.0)
    peer = CCA(3, max_iter=5000, tol=1e-12).fit(x, y)
    one, other = peer.transform(x, y)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(one.T, other.T)]
    np.testing.assert_allclose([row[1] for row in found.report.rows], expected, atol=1e-5)
    mapped, partner = run(found, x), run(found, y, "target")
    for a, b, c in zip(mapped.T, partner.T, expected):
        np.testing.assert_allclose([a.std(ddof=1), b.std(ddof=1), np.corrcoef(a, b)[0, 1]], [1, 1, c], atol=1e-4)
    assert mapped.shape == (40, 3)


def test_a_ridge_keeps_cca_from_finding_what_is_not_there():
    one, other = RNG.normal(size=(20, 15)), RNG.normal(size=(20, 15))
    fresh = RNG.normal(size=(500, 15)), RNG.normal(size=(500, 15))
    loose, firm = cca(one, other, 1, ridge=0.0), cca(one, other, 1, ridge=10.0)
    assert loose.report.rows[0][1] > 0.99 > firm.report.rows[0][1]
    assert np.isfinite(run(firm, fresh[0])).all()


def test_subspace_alignment_is_its_formula():
    found = subspace_alignment(X, Y, 2)
    own, theirs = PCA(2).fit(X), PCA(2).fit(Y)
    bases = own.components_.T, theirs.components_.T
    expected = (X - X.mean(0)) @ bases[0] @ bases[0].T @ bases[1]
    assert_same_up_to_sign(run(found, X), expected)
    assert_same_up_to_sign(run(found, Y, "target"), theirs.transform(Y))
    cosines = np.cos(np.sort(subspace_angles(*bases)))
    np.testing.assert_allclose([row[3] for row in found.report.rows], cosines, atol=1e-6)
    np.testing.assert_allclose([row[1] for row in found.report.rows], own.explained_variance_ratio_, rtol=1e-6)


def assert_same_up_to_sign(found, expected):
    sign = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found, expected * sign, atol=1e-4)


def test_maps_take_float16_jax_arrays_and_more_axes():
    found = coral(jax.numpy.asarray(X, jax.numpy.bfloat16), Y.astype(np.float16))
    assert run(found, X.reshape(4, 10, 5)).shape == (4, 10, 5)


@needs_ott
@ott_warns
def test_optimal_transport_is_sinkhorns_barycentric_projection():
    found = optimal_transport(X, Y, epsilon=0.05)
    cost = ((X[:, None] - Y[None]) ** 2).sum(-1)
    level = 0.05 * (X.var(0).sum() + Y.var(0).sum())
    f, g = np.zeros(40), np.zeros(60)
    for _ in range(5000):
        f = -level * (np.log(40) + logsumexp((g[None] - cost) / level, axis=1))
        g = -level * (np.log(60) + logsumexp((f[:, None] - cost) / level, axis=0))
    plan = np.exp((f[:, None] + g[None] - cost) / level)
    np.testing.assert_allclose(run(found, X), plan @ Y / plan.sum(1, keepdims=True), atol=2e-3)
    np.testing.assert_allclose(found.report.metadata["mean squared distance"], (plan * cost).sum(), rtol=1e-3)


@needs_ott
@ott_warns
def test_optimal_transport_respects_mass():
    weights = np.where(np.arange(60) < 30, 1.0, 0.0)
    found, expected = optimal_transport(X, Y, target_weights=weights), optimal_transport(X, Y[:30])
    np.testing.assert_allclose(run(found, X), run(expected, X), atol=1e-4)
    heavy = optimal_transport(X, Y, target_weights=weights + 1, source_weights=np.arange(40.0))
    assert np.abs(run(heavy, X) - run(expected, X)).max() > 0.1


@needs_ott
@ott_warns
def test_optimal_transport_says_what_it_cannot_do():
    with pytest.raises(
        tj.TransferError, match=r"optimal_transport\(\) did not converge in 10 iterations: the marginals"
    ):
        optimal_transport(X, Y, epsilon=1e-4, iterations=10)
    for epsilon in (0, -1.0, "small"):
        with pytest.raises(tj.TransferError, match=r"optimal_transport\(\) expects epsilon, a number above 0, got"):
            optimal_transport(X, Y, epsilon=epsilon)
    with pytest.raises(
        tj.TransferError, match=r"optimal_transport\(\) expects iterations, a whole number above 0, got"
    ):
        optimal_transport(X, Y, iterations=0)
    with pytest.raises(tj.DataError, match=r"optimal_transport\(\) got features of width 5 and 4. Expected one width"):
        optimal_transport(X, Y[:, :4])


def test_optimal_transport_names_what_to_install(monkeypatch):
    for name in ("ott", "ott.geometry", "ott.geometry.pointcloud"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        tj.TransferError, match=r"needs ott-jax, which is not installed: pip install 'transferjax\[transp"
    ):
        optimal_transport(X, Y)


UNPAIRED = {
    "coral": coral,
    "subspace_alignment": lambda x, y: subspace_alignment(x, y, 2),
}
PAIRED = {"procrustes": procrustes, "ridge_map": ridge_map, "cca": lambda x, y: cca(x, y, 2)}


@pytest.mark.parametrize("name", [*UNPAIRED, "procrustes"])
def test_unlike_widths_raise(name):
    with pytest.raises(tj.DataError, match=rf"{name}\(\) got features of width 5 and 4. Expected one width for both"):
        {**UNPAIRED, **PAIRED}[name](X, X[:, :4])


@pytest.mark.parametrize("name", PAIRED)
def test_paired_maps_want_as_many_of_both(name):
    with pytest.raises(tj.DataError, match=r"y have 39 examples and x 40. Expected one row of each per example"):
        PAIRED[name](X, X[:39])


@pytest.mark.parametrize("name", [*UNPAIRED, *PAIRED])
def test_empty_constant_and_broken_features_raise(name):
    fit = {**UNPAIRED, **PAIRED}[name]
    with pytest.raises(tj.DataError, match=r"expected at least 2 examples and one column"):
        fit(X, X[:0])
    broken = X.copy()
    broken[7, 2] = np.nan
    for pair in ((broken, X), (X, broken)):
        with pytest.raises(tj.DataError, match=r"not finite in 1 of 40 examples, first in row 7"):
            fit(*pair)
    with pytest.raises(tj.DataError, match=r"are constant: all 40 examples have the same values"):
        fit(X, np.full_like(X, 3.3))


@pytest.mark.parametrize("dims", [0, 6, 2.0, "2", True])
def test_dims_are_no_more_than_columns(dims):
    for fit in (cca, subspace_alignment):
        with pytest.raises(tj.TransferError, match=rf"{fit.__name__}\(\) expects dims, a whole number from 1 to 5"):
            fit(X, X, dims)
    with pytest.raises(tj.TransferError, match=r"expects dims, a whole number from 1 to 3"):
        cca(X[:4], X[:4], 4)


def test_strengths_and_ridges_are_positive():
    for strengths in ([], [0.0], [1.0, -1.0], [np.inf]):
        with pytest.raises(tj.TransferError, match=r"ridge_map\(\) expects strengths above 0, at least one"):
            ridge_map(X, PAIR, strengths)
    with pytest.raises(tj.TransferError, match=r"coral\(\) expects ridge, a number above 0, got 0"):
        coral(X, Y, ridge=0)
    with pytest.raises(tj.TransferError, match=r"cca\(\) expects ridge, a number of at least 0, got -1"):
        cca(X, PAIR, 1, ridge=-1)
