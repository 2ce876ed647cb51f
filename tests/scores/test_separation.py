"""Separation of classes against thuml's code, scikit-learn, scipy and the formulas written out."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from transferjax._errors import DataError
from transferjax.numerics import _covariance
from transferjax.scores import gbc, h_score, h_score_regularized, parc, sfda, transrate

RNG = np.random.default_rng(0)
ALL = [gbc, h_score, h_score_regularized, parc, sfda, transrate]


@pytest.fixture(params=[1 << 20, 32], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(_covariance, "ELEMENTS", request.param)


def class_means(features, labels):
    """Every example's class mean, in its place."""
    found = np.zeros_like(features)
    for value in np.unique(labels):
        found[labels == value] = features[labels == value].mean(0)
    return found


def test_h_score_and_transrate_are_those_of_the_peer(case, chunks):
    assert h_score(case["features"], case["labels"]) == pytest.approx(case["h_score"], rel=1e-9)
    assert transrate(case["features"], case["labels"]) == pytest.approx(case["transrate"], rel=1e-9)


def test_h_score_of_columns_that_depend_on_each_other(case):
    features = case["features"].astype(np.float64)
    more = np.concatenate([features, features[:, :3] @ RNG.normal(size=(3, 4))], axis=1)
    assert h_score(more, case["labels"]) == pytest.approx(h_score(features, case["labels"]), rel=1e-6)


def test_the_regularised_h_score(case, chunks):
    features = case["features"].astype(np.float64)
    peer = LedoitWolf().fit(features)
    between = np.cov(class_means(features, case["labels"]), rowvar=False)
    expected = np.trace(np.linalg.pinv(peer.covariance_) @ ((1 - peer.shrinkage_) * between))
    assert h_score_regularized(case["features"], case["labels"]) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("eps", [1e-4, 1.0])
def test_transrate_takes_its_distortion(eps):
    features, labels = RNG.normal(size=(30, 4)), np.arange(30) % 3
    centred = features - features.mean(0)
    rate = lambda z: 0.5 * np.log(np.linalg.det(np.eye(4) + z.T @ z / (len(z) * eps)))
    expected = rate(centred) - np.mean([rate(centred[labels == k]) for k in range(3)])
    assert transrate(features, labels, eps=eps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("components", [64, 3])
def test_gbc_is_its_formula(case, components, chunks):
    features, labels = case["features"].astype(np.float64), case["labels"]
    kept = min(components, features.shape[1], len(features) - 1)
    reduced = PCA(kept, svd_solver="full").fit_transform(features)
    total = 0.0
    for a in np.unique(labels):
        for b in set(np.unique(labels)) - {a}:
            (m, n), (v, w) = ([f(reduced[labels == k], 0) for k in (a, b)] for f in (np.mean, np.var))
            both = (v + w) / 2
            total += np.exp(-np.sum((m - n) ** 2 / both) / 8 - 0.5 * np.sum(np.log(both / np.sqrt(v * w))))
    assert gbc(case["features"], labels, components=components) == pytest.approx(-total, rel=1e-7, abs=1e-12)


def test_gbc_bounds_the_variance_from_below():
    features = np.array([[0.0, 0], [0, 0], [0.01, 0], [0.01, 0]])
    expected = -2 * np.exp(-(0.01**2) / 1e-4 / 8)
    assert gbc(features, [0, 0, 1, 1]) == pytest.approx(expected, rel=1e-9)


def test_parc_is_the_rank_correlation_of_the_distances(case, chunks):
    features, labels = case["features"].astype(np.float64), case["labels"]
    one_hot = np.eye(len(np.unique(labels)))[np.unique(labels, return_inverse=True)[1]]
    upper = np.triu_indices(len(labels), 1)
    distances = [(1 - np.corrcoef(table))[upper] for table in (features, one_hot)]
    expected = spearmanr(distances[0], distances[1].round(9)).statistic
    assert parc(case["features"], labels) == pytest.approx(expected, rel=1e-9)


def test_parc_shares_the_ranks_of_ties():
    features = np.array([[0.0, 1, 2], [0, 1, 2], [0, 1, 2], [2, 1, 0], [2, 1, 0], [1, 5, 0]])
    labels = np.array([0, 1, 0, 1, 1, 0])
    upper = np.triu_indices(6, 1)
    expected = spearmanr((1 - np.corrcoef(features))[upper].round(9), (labels[:, None] != labels)[upper]).statistic
    assert parc(features, labels) == pytest.approx(expected, rel=1e-9)


def test_parc_of_distances_that_are_all_equal():
    assert parc(np.array([[0.0, 1.0], [0.0, 2.0], [0.0, 5.0]]), [0, 0, 1]) == pytest.approx(0.0)


def by_scikit_learn(features, labels, share):
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=share)
    if share >= 1e-4:
        return peer.fit(features, labels).predict_proba(features)
    return peer.set_params(shrinkage=0.0).fit(features, labels).predict_proba(features)


@pytest.mark.parametrize("scale", [0.2, 0.5, 3.0])
def test_sfda_is_two_discriminants_of_scikit_learn(stored, scale, chunks):
    features, labels = scale * stored["tall-features"].astype(np.float64), stored["tall-labels"]
    within = np.cov((features - class_means(features, labels)).T, ddof=0)
    share = max(np.exp(-5 * np.linalg.eigvalsh(within)[-1]), 1e-10)
    assert (share > 1e-4) == (scale < 1)
    probs = by_scikit_learn(features, labels, share)
    probs = np.exp(probs) / np.exp(probs).sum(1, keepdims=True)
    means = np.stack([features[labels == k].mean(0) for k in range(4)])
    others = np.stack([np.delete(means, k, 0).mean(0) for k in range(4)])
    sure = probs[np.arange(len(labels)), labels][:, None]
    mixed = sure * features + (1 - sure) * others[labels]
    expected = by_scikit_learn(mixed, labels, share)[np.arange(len(labels)), labels].mean()
    assert sfda(features, labels) == pytest.approx(expected, rel=1e-5)


FEATURES, LABELS = RNG.normal(size=(6, 3)), np.arange(6) % 2
BAD = {
    "constant": (np.ones((6, 3)), LABELS, "features are constant: all 6 examples"),
    "NaN": (np.full((6, 3), np.nan), LABELS, "features are not finite in 6 of 6 examples"),
    "other number": (FEATURES, LABELS[:5], "labels have 5 examples and features 6"),
    "one class": (FEATURES, LABELS * 0, "labels hold 1 class"),
    "floats": (FEATURES, LABELS * 1.0, r"labels are \(6,\) float64; expected integers"),
}


@pytest.mark.parametrize("score", ALL)
@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name, score):
    features, labels, message = BAD[name]
    with pytest.raises(DataError, match=message):
        score(features, labels)


def test_what_single_scores_need():
    with pytest.raises(DataError, match=r"class 7 has one example\. gbc needs two of every class"):
        gbc(FEATURES, [0, 0, 0, 3, 3, 7])
    with pytest.raises(DataError, match=r"every class has one example\. parc needs two of some class"):
        parc(FEATURES, np.arange(6))
    with pytest.raises(DataError, match=r"the features of example 2 are all the same number.*parc needs two columns"):
        parc(np.where(np.arange(6)[:, None] == 2, 4.0, FEATURES), LABELS)
    with pytest.raises(DataError, match="every class has the same features in all of its examples"):
        sfda(np.eye(2)[LABELS], LABELS)


@pytest.mark.parametrize("score", [h_score, h_score_regularized, parc, sfda, transrate])
def test_a_class_of_one_example_is_taken(score):
    assert np.isfinite(score(FEATURES, [0, 0, 0, 3, 3, 7]))
