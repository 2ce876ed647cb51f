"""LogME against thuml's code, and against the evidence written as a Gaussian and maximised."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from transferjax._errors import DataError
from transferjax.numerics import _covariance
from transferjax.scores import logme

RNG = np.random.default_rng(0)


def reference(features, target):
    """The maximum over alpha and beta of log N(y; 0, FF'/alpha + I/beta) / N."""
    features = features.astype(np.float64)
    kernel, eye = features @ features.T, np.eye(len(features))

    def negative(logs):
        covariance = np.exp(-logs[0]) * kernel + np.exp(-logs[1]) * eye
        return -multivariate_normal(cov=covariance, allow_singular=True).logpdf(target) / len(target)

    starts = [(0.0, 0.0), (4.0, 2.0), (8.0, 1.0)]
    return -min(
        minimize(negative, s, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-11}).fun for s in starts
    )


@pytest.mark.parametrize("shape", [(60, 5), (30, 50), (24, 24)])
def test_it_is_the_maximum_of_the_whole_evidence(shape):
    features = RNG.normal(size=shape) + 0.3
    targets = features @ RNG.normal(size=(shape[1], 2)) + 2 * RNG.normal(size=(shape[0], 2))
    expected = [reference(features, target) for target in targets.T]
    assert logme(features, targets) == pytest.approx(np.mean(expected), rel=1e-7)
    assert logme(features, targets[:, 1]) == pytest.approx(expected[1], rel=1e-7)
    labels = (targets[:, 0] > 1).astype(int) + (targets[:, 0] > -1)
    expected = [reference(features, (labels == k).astype(float)) for k in range(3)]
    assert logme(features, labels) == pytest.approx(np.mean(expected), rel=1e-7)


@pytest.mark.parametrize("kind", ["logme", "logme-regression"])
def test_it_is_what_the_fixed_point_approaches(case, kind):
    """thuml's code takes at most eleven steps from below; with more examples than columns that is close."""
    found = logme(case["features"], case["targets" if kind.endswith("regression") else "labels"])
    assert found >= case[kind] - 1e-12
    if case["features"].shape[0] > case["features"].shape[1]:
        assert found == pytest.approx(case[kind], rel=2e-7)


def test_chunks_and_blocks_change_nothing(case, monkeypatch):
    expected = logme(case["features"], case["labels"])
    monkeypatch.setattr(_covariance, "ELEMENTS", 32)
    monkeypatch.setattr("transferjax.scores._evidence.BLOCK", 1)
    assert logme(case["features"], case["labels"]) == pytest.approx(expected, rel=1e-12)


def test_features_that_give_the_target_exactly_score_highest_and_finite():
    features = np.eye(3)[np.arange(30) % 3] + 0.0
    found = logme(features, np.arange(30) % 3)
    noisy = logme(features + 1e-3 * RNG.normal(size=features.shape), np.arange(30) % 3)
    assert np.isfinite(found) and found > noisy > 0


def test_classes_that_the_features_do_not_tell():
    labels = np.arange(400) % 2
    found = logme(RNG.normal(size=(400, 3)), labels)
    nothing = 0.5 * (np.log(1 / 0.5) - 1 - np.log(2 * np.pi))  # beta alone, no weights
    assert found >= nothing - 1e-9 and found == pytest.approx(nothing, abs=0.02)


def test_half_precision_is_taken():
    features = RNG.normal(size=(50, 4)).astype(np.float16)
    assert logme(features, np.arange(50) % 2) == logme(features.astype(np.float64), np.arange(50) % 2)


FEATURES = RNG.normal(size=(6, 3))
BAD = {
    "constant": (np.ones((6, 3)), np.arange(6) % 2, "features are constant: all 6 examples"),
    "NaN": (np.where(np.eye(6, 3) > 0, np.nan, 1), np.arange(6) % 2, "features are not finite in 3 of 6 examples"),
    "other number": (FEATURES, np.arange(5) % 2, "labels have 5 examples and features 6"),
    "other number of targets": (FEATURES, np.arange(5.0), "labels have 5 examples and features 6"),
    "one class": (FEATURES, np.full(6, 3), r"labels hold 1 class"),
    "one-hot": (FEATURES, np.eye(2, dtype=int)[np.arange(6) % 2], "write labels.argmax"),
    "zero target": (FEATURES, np.stack([np.ones(6), np.zeros(6)], 1), "target 1 of 2 is zero in every example"),
    "NaN target": (FEATURES, np.full(6, np.nan), "labels are not finite in 6 of 6"),
    "maps": (np.ones((6, 2, 2, 3)), np.arange(6) % 2, r"Maps \[N, h, w, c\] are pooled"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    features, labels, message = BAD[name]
    with pytest.raises(DataError, match=message):
        logme(features, labels)
