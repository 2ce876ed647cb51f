"""Second moments by chunks against numpy and scikit-learn."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from transferjax._errors import DataError
from transferjax.numerics import _covariance as cov

RNG = np.random.default_rng(0)


@pytest.fixture(params=[1 << 20, 64], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(cov, "ELEMENTS", request.param)


def table(count, width, dtype=np.float32):
    return (RNG.standard_normal((count, width)) @ RNG.standard_normal((width, width)) + 3).astype(dtype)


@pytest.mark.parametrize("shape", [(700, 5), (20, 300)])
def test_moments(chunks, shape):
    x = table(*shape)
    exact = x.astype(np.float64)
    mean = cov.column_mean(x)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov.scatter(x), exact.T @ exact, rtol=1e-10, atol=1e-8)
    np.testing.assert_allclose(cov.scatter(x, mean) / len(x), np.cov(exact.T, ddof=0), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(cov.gram(x, mean), (exact - mean) @ (exact - mean).T, rtol=1e-8, atol=1e-6)
    np.testing.assert_allclose(cov.gram(x, mean, x[:3]), cov.gram(x, mean)[:, :3], rtol=1e-8, atol=1e-6)
    fourth = np.square(np.square(exact - mean).sum(1)).sum()
    assert cov.fourth_moment(x, mean) == pytest.approx(fourth, rel=1e-10)


def test_rows_come_once_and_in_order(chunks):
    x = table(900, 3)
    parts = list(cov.row_chunks(x, np.ones(3)))
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), x.astype(np.float64) - 1)
    assert all(part.dtype == np.float64 and len(part) == rows.stop - rows.start for rows, part in parts)


def test_sums_of_groups(chunks):
    x, codes = table(800, 4), RNG.integers(0, 6, 800)
    codes[codes == 3] = 2  # a group of none
    exact = np.stack([x[codes == k].astype(np.float64).sum(0) for k in range(6)])
    np.testing.assert_allclose(cov.group_sums(x, codes, 6), exact, rtol=1e-12)
    assert not cov.group_sums(x, codes, 6)[3].any()


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("shape", [(60, 7), (20, 50), (30, 30)])
def test_the_spectrum_is_that_of_the_singular_values(shape, centre):
    x = table(*shape, np.float64)
    codes = RNG.integers(0, 4, len(x))
    found = cov.spectrum(x, centre=centre)
    u, s, _ = np.linalg.svd(x - x.mean(0) if centre else x, full_matrices=False)
    rank = len(s) - (centre and shape[0] <= shape[1])
    np.testing.assert_allclose(np.sqrt(found.values[::-1]), s[:rank], rtol=1e-6)
    one_hot = np.eye(4)[codes]
    expected = np.square(u[:, :rank].T @ one_hot)[::-1]
    np.testing.assert_allclose(cov.group_coordinates(found, x, codes, 4) ** 2, expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(cov.coordinates(found, x, one_hot) ** 2, expected, rtol=1e-5, atol=1e-9)


def test_the_spectrum_leaves_out_what_is_rounding():
    x = table(40, 3, np.float64)
    assert len(cov.spectrum(np.concatenate([x, x @ np.ones((3, 4))], axis=1)).values) == 3


@pytest.mark.parametrize("shape", [(500, 6), (30, 40), (12, 3), (4, 100)])
def test_ledoit_wolf_is_that_of_scikit_learn(shape):
    x = table(*shape, np.float64)
    peer = LedoitWolf().fit(x)
    covariance, share = cov.ledoit_wolf(x)
    assert share == pytest.approx(peer.shrinkage_, rel=1e-9)
    np.testing.assert_allclose(covariance, peer.covariance_, rtol=1e-8, atol=1e-10)
    found = cov.spectrum(x, centre=True)
    fourth = cov.fourth_moment(x, found.mean)
    assert cov.shrinkage(found.values / len(x), fourth, *x.shape) == pytest.approx(peer.shrinkage_, rel=1e-9)


def test_a_covariance_that_needs_no_shrinking():
    assert cov.shrinkage(np.ones(3), 0.0, 10, 3) == 0.0


def test_constant_features():
    x = np.full((900, 3), 0.1, np.float32)
    with pytest.raises(DataError, match="x are constant: all 900 examples have the same values"):
        cov.check_varies(x, "x")
    x[-1, -1] = 0.2
    cov.check_varies(x)
