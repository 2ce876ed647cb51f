"""The linear support vector machine against scikit-learn's LinearSVC."""

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from transferjax._errors import DataError
from transferjax.features._svm import svm


def classification(classes=3, count=80):
    rng = np.random.default_rng(0)
    codes = rng.permutation(count) % classes
    return rng.normal(size=(classes, 5))[codes] + rng.normal(size=(count, 5)) + 1, codes, rng.uniform(0.5, 2, count)


def peer_of(strength):
    return LinearSVC(C=1 / strength, loss="squared_hinge", dual=False, tol=1e-10, max_iter=100000)


@pytest.mark.parametrize("strength", [0.1, 30.0])
def test_the_optimum_is_that_of_scikit_learn(strength):
    x, codes, weights = classification()
    readout = svm(x, codes, strengths=strength, weights=weights, standardise=False)
    peer = peer_of(strength).fit(x, codes, weights)
    np.testing.assert_allclose(readout.params["kernel"], peer.coef_.T, atol=1e-5)
    np.testing.assert_allclose(readout.predict(readout.params, x), peer.decision_function(x), atol=1e-5)


def test_standardised_and_of_two_classes():
    x, codes, _ = classification(2)
    readout = svm(x, codes, strengths=1.0)
    scaled = StandardScaler().fit_transform(x)
    wanted = peer_of(1.0).fit(scaled, codes).decision_function(scaled)
    found = readout.predict(readout.params, x)
    np.testing.assert_allclose(found[:, 1], wanted, atol=1e-5)
    np.testing.assert_allclose(found[:, 0], -wanted, atol=1e-5)


def test_the_choice_is_made_on_folds():
    x, codes, _ = classification()
    report = svm(x, codes, strengths=[1.0, 10.0, 1e6]).report
    losses = report.column("left-out loss")
    assert report.column("chosen")[int(np.argmin(losses))] and losses[2] == max(losses)
    assert report.metadata["chosen by"] == "5 stratified folds, seed 0"


def test_targets_are_refused():
    x, codes, _ = classification()
    with pytest.raises(DataError, match=r"For targets write ridge\(\), gaussian_process\(\) or knn\(\)"):
        svm(x, codes / 2)
