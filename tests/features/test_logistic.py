"""Logistic regression against scikit-learn's optimum, and its choice against folds by hand."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from transferjax._errors import DataError
from transferjax.features._logistic import logistic
from transferjax.features._targets import as_targets, fold_numbers


def classification(count, width, classes=4):
    rng = np.random.default_rng(0)
    codes = rng.permutation(count) % classes
    return (
        rng.normal(size=(classes, width))[codes] + rng.normal(size=(count, width)) + 1,
        codes,
        rng.uniform(0.5, 2, count),
    )


@pytest.mark.parametrize(("count", "width"), [(120, 6), (30, 50)])
def test_the_optimum_is_that_of_scikit_learn(count, width):
    x, codes, weights = classification(count, width)
    for strength in (0.1, 10.0):
        readout = logistic(x, codes, strengths=strength, weights=weights, standardise=False)
        peer = LogisticRegression(C=1 / strength, tol=1e-10, max_iter=10000).fit(x, codes, weights)
        np.testing.assert_allclose(readout.params["kernel"], peer.coef_.T, atol=1e-4)
        found = jax.nn.softmax(readout.predict(readout.params, x))
        np.testing.assert_allclose(found, peer.predict_proba(x), atol=1e-4)
        assert readout.report.metadata["converged"]


def test_two_classes_are_a_softmax_over_two_columns():
    x, codes, _ = classification(60, 5, classes=2)
    readout = logistic(x, codes, strengths=2.0, standardise=False)
    peer = LogisticRegression(C=1.0, tol=1e-10).fit(x, codes)
    kernel = np.asarray(readout.params["kernel"])
    np.testing.assert_allclose(kernel[:, 1] - kernel[:, 0], peer.coef_[0], atol=1e-4)


def test_each_label_is_a_regression_of_its_own():
    x, codes, weights = classification(60, 5)
    yes = np.stack([codes == 0, codes > 1], axis=1)
    readout = logistic(x, yes, strengths=0.5, weights=weights, standardise=False)
    for column in range(2):
        peer = LogisticRegression(C=2.0, tol=1e-10).fit(x, yes[:, column], weights)
        np.testing.assert_allclose(readout.params["kernel"][:, column], peer.coef_[0], atol=1e-4)
        np.testing.assert_allclose(readout.predict(readout.params, x)[:, column], peer.decision_function(x), atol=1e-4)


def test_the_choice_is_made_on_folds_standardised_by_their_training_part():
    x, codes, _ = classification(60, 5)
    strengths = [0.1, 1.0, 10.0, 1000.0]
    readout = logistic(x, codes, strengths=strengths, folds=3, seed=4)
    folds, losses = fold_numbers(as_targets(codes, None), 3, 4), np.zeros(4)
    for fold in range(3):
        train, test = folds != fold, folds == fold
        mean, std = x[train].mean(0), x[train].std(0)
        for number, strength in enumerate(strengths):
            peer = LogisticRegression(C=1 / strength, tol=1e-10, max_iter=1000).fit(
                (x[train] - mean) / std, codes[train]
            )
            probabilities = peer.predict_log_proba((x[test] - mean) / std)
            losses[number] -= probabilities[np.arange(test.sum()), codes[test]].sum() / 60
    np.testing.assert_allclose(readout.report.column("left-out loss"), losses, rtol=1e-4)
    assert readout.report.metadata["strength"] == strengths[int(losses.argmin())]
    assert readout.report.metadata["chosen by"] == "3 stratified folds, seed 4"
    only = logistic(x, codes, strengths=readout.report.metadata["strength"])
    np.testing.assert_array_equal(only.params["kernel"], readout.params["kernel"])


def test_what_it_says_when_it_has_not_arrived():
    x, codes, _ = classification(60, 5)
    report = logistic(x, codes, strengths=1e-3, iterations=2).report
    assert report.metadata["iterations"] == 2 and not report.metadata["converged"]


def test_a_class_with_one_example_and_labels_that_are_targets():
    x, codes, _ = classification(20, 5, classes=2)
    codes[0] = 2
    with pytest.raises(DataError, match=r"class 2 has 1 example\(s\), and choosing among several strengths"):
        logistic(x, codes)
    with pytest.raises(
        DataError, match=r"logistic\(\) reads out classes or several yes-or-no labels; these labels are"
    ):
        logistic(x, x[:, 0])
