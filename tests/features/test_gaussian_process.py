"""The Gaussian process against scikit-learn's at fixed hyperparameters."""

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from transferjax._errors import DataError
from transferjax.features import _gaussian_process
from transferjax.features._gaussian_process import gaussian_process


def examples():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)) * [1, 2, 3] + 1
    return x, np.stack([np.sin(x[:, 0]) * 20 + 50, x[:, 1] - x[:, 2]], 1) + 0.1 * rng.normal(size=(40, 2))


def peer_of(length, noise):
    return GaussianProcessRegressor(RBF(length), alpha=noise, normalize_y=True, optimizer=None)


@pytest.mark.parametrize(("length", "noise"), [(2.0, 0.1), (5.0, 0.01)])
def test_posterior_and_likelihood_are_those_of_scikit_learn(length, noise):
    x, y = examples()
    readout = gaussian_process(x, y, length_scales=length, noises=noise, standardise=False)
    peer = peer_of(length, noise).fit(x, y)
    np.testing.assert_allclose(readout.predict(readout.params, x + 0.2), peer.predict(x + 0.2), atol=1e-4 * y.std())
    found = readout.report.column("log marginal likelihood")[0]
    np.testing.assert_allclose(found, peer.log_marginal_likelihood_value_, rtol=1e-9)


def test_the_pair_with_the_largest_likelihood_is_taken():
    x, y = examples()
    lengths, noises = [0.5, 2.0, 4.0], [0.01, 0.1]
    readout = gaussian_process(x, y, length_scales=lengths, noises=noises, standardise=False)
    wanted = [(a, b, peer_of(a, b).fit(x, y).log_marginal_likelihood_value_) for a in lengths for b in noises]
    np.testing.assert_allclose([row[:3] for row in readout.report.rows], wanted, rtol=1e-8)
    best = max(wanted, key=lambda row: row[2])
    assert readout.report.metadata["length scale"] == best[0] and readout.report.metadata["noise"] == best[1]
    np.testing.assert_allclose(
        readout.predict(readout.params, x), peer_of(*best[:2]).fit(x, y).predict(x), atol=1e-4 * y.std()
    )


def test_length_scales_follow_the_distances():
    x, y = examples()
    tried = sorted(set(gaussian_process(x, y, standardise=False).report.column("length scale")))
    distances = np.sqrt(((x[:, None] - x) ** 2).sum(-1))
    np.testing.assert_allclose(tried, np.median(distances[distances > 0]) * np.array([0.25, 0.5, 1, 2, 4]))


def test_classes_are_one_hot_rows():
    x, y = examples()
    codes = np.digitize(y[:, 0], [45, 55])
    readout = gaussian_process(x, codes, length_scales=2.0, noises=0.1, standardise=False)
    wanted = peer_of(2.0, 0.1).fit(x, np.eye(3)[codes]).predict(x)
    np.testing.assert_allclose(readout.predict(readout.params, x), wanted, atol=1e-5)


def test_what_does_not_fit_is_named(monkeypatch):
    x, y = examples()
    with pytest.raises(DataError, match=r"length_scales are 0\.0; expected numbers above 0"):
        gaussian_process(x, y, length_scales=0.0)
    with pytest.raises(DataError, match=r"noises are -1\.0; expected numbers above 0"):
        gaussian_process(x, y, noises=-1)
    monkeypatch.setattr(_gaussian_process, "MOST", 30)
    with pytest.raises(DataError, match=r"gaussian_process\(\) is for at most 30 examples; these are 40\. Write ridge"):
        gaussian_process(x, y)
