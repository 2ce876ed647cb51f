"""Nearest neighbours and nearest means against scikit-learn."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, NearestCentroid

from transferjax._errors import DataError
from transferjax.features import _neighbours
from transferjax.features._neighbours import knn, nearest_mean

by_cosine = lambda distances: np.exp((1 - distances) / 0.07)


def examples(count=60):
    rng = np.random.default_rng(0)
    codes = rng.permutation(count) % 3
    return (rng.normal(size=(3, 5))[codes] + rng.normal(size=(count, 5))).astype(np.float32), codes


@pytest.mark.parametrize(("temperature", "peers"), [(0.07, by_cosine), (None, "uniform")])
def test_votes_are_those_of_scikit_learn(temperature, peers):
    x, codes = examples()
    readout = knn(x, codes, k=7, temperature=temperature)
    peer = KNeighborsClassifier(7, metric="cosine", weights=peers).fit(x, codes)
    test = x[::-1] + 0.3
    np.testing.assert_allclose(readout.predict(readout.params, test), peer.predict_proba(test), atol=2e-5)
    readout = knn(x, x[:, :2] * 3, k=7, temperature=temperature)
    peer = KNeighborsRegressor(7, metric="cosine", weights=peers).fit(x, x[:, :2] * 3)
    np.testing.assert_allclose(readout.predict(readout.params, test), peer.predict(test), atol=2e-4)


def test_labels_are_yes_where_more_than_half_of_the_votes_are():
    x, codes = examples()
    readout = knn(x, np.stack([codes == 0, codes == 1], 1), k=5)
    shares = knn(x, codes, k=5)
    np.testing.assert_allclose(
        readout.predict(readout.params, x), 2 * shares.predict(shares.params, x)[:, :2] - 1, atol=1e-6
    )


def test_weights_are_factors_of_the_votes():
    x, codes = examples()
    weights = np.where(codes == 0, 4.0, 1.0)
    plain = knn(x, codes, k=9, temperature=None)
    found = knn(x, codes, k=9, temperature=None, weights=weights)
    votes = np.asarray(plain.predict(plain.params, x)) * [4, 1, 1]
    np.testing.assert_allclose(found.predict(found.params, x), votes / votes.sum(1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.07, None])
def test_the_number_of_neighbours_is_chosen_by_leaving_one_out(temperature):
    x, codes = examples(40)
    tried = [9, 1, 4]
    report = knn(x, codes, k=tried, temperature=temperature).report
    for k, found in zip(tried, report.column("left-out accuracy")):
        right = 0
        for row in range(40):
            kept = np.arange(40) != row
            one = knn(x[kept], codes[kept], k=k, temperature=temperature)
            right += int(np.argmax(one.predict(one.params, x[[row]]))) == codes[row]
        assert found == pytest.approx(right / 40)
    best = int(np.argmax(report.column("left-out accuracy")))
    assert report.column("chosen")[best] and report.metadata["k"] == tried[best]
    assert knn(x, x[:, 0] * 3, k=tried).report.columns == ("k", "left-out R2", "chosen")


def test_blocks_change_nothing(monkeypatch):
    x, codes = examples()
    whole = knn(x, codes, k=[3, 5])
    wanted = whole.predict(whole.params, x)
    monkeypatch.setattr(_neighbours, "ENTRIES", 60 * 7)
    for jitted in (_neighbours._predict, _neighbours._others):
        jitted.clear_cache()
    found = knn(x, codes, k=[3, 5])
    assert found.report == whole.report
    np.testing.assert_allclose(found.predict(found.params, x), wanted, atol=1e-6)
    for jitted in (_neighbours._predict, _neighbours._others):
        jitted.clear_cache()


def test_an_example_of_zeros_has_no_direction():
    x, codes = examples()
    readout = knn(x, codes, k=60, temperature=None)
    np.testing.assert_allclose(readout.predict(readout.params, np.zeros((1, 5))), [[1 / 3] * 3], atol=1e-6)


def test_nearest_means_are_those_of_scikit_learn():
    x, codes = examples()
    readout, peer = nearest_mean(x, codes), NearestCentroid().fit(x, codes)
    test = x[::-1] + 0.3
    found = np.asarray(readout.predict(readout.params, test))
    assert (found.argmax(1) == peer.predict(test)).all()
    distances = ((test[:, None] - peer.centroids_) ** 2).sum(-1)
    np.testing.assert_allclose(
        found - found.mean(1, keepdims=True), -0.5 * (distances - distances.mean(1, keepdims=True)), atol=1e-5
    )
    assert readout.report.rows == ((0, 20), (1, 20), (2, 20))
    pair = nearest_mean(x, np.stack([codes == 0, codes == 1], 1))
    one = nearest_mean(x, (codes == 1).astype(int))
    scores = np.asarray(one.predict(one.params, test))
    np.testing.assert_allclose(pair.predict(pair.params, test)[:, 1], scores[:, 1] - scores[:, 0], atol=1e-5)


def test_what_does_not_fit_is_named():
    x, codes = examples(6)
    for k in (0, 7, 2.5, [], [1, 6]):
        with pytest.raises(DataError, match=r"k is .*; expected whole numbers from 1 to"):
            knn(x, codes, k=k)
    with pytest.raises(DataError, match=r"temperature is 0; expected a number above 0, or None for plain votes"):
        knn(x, codes, k=3, temperature=0)
    with pytest.raises(DataError, match=r"For targets write knn\(\) or ridge\(\)"):
        nearest_mean(x, codes / 2)
