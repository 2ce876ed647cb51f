"""Ridge regression against scikit-learn, and its choice against fits that leave one out."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge, RidgeClassifierCV, RidgeCV

from transferjax._errors import DataError
from transferjax.features._ridge import ridge

STRENGTHS = [0.1, 1.0, 10.0, 100.0]


def regression(count, width):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, width)) + 2
    return x, x[:, :3] @ rng.normal(size=(3, 2)) + rng.normal(size=(count, 2)) + 5, rng.uniform(0.2, 3, count)


@pytest.mark.parametrize(("count", "width"), [(40, 6), (15, 30)])
def test_the_fit_is_that_of_scikit_learn(count, width):
    x, y, weights = regression(count, width)
    for strength in (0.01, 10.0):
        readout = ridge(x, y, strengths=strength, weights=weights, standardise=False)
        peer = Ridge(strength).fit(x, y, weights)
        np.testing.assert_allclose(readout.params["kernel"], peer.coef_.T, atol=1e-6)
        np.testing.assert_allclose(readout.predict(readout.params, x), peer.predict(x), rtol=1e-5)
        single = ridge(x, y[:, 0], strengths=strength, weights=weights, standardise=False)
        np.testing.assert_allclose(single.params["kernel"], peer.coef_[0], atol=1e-6)


@pytest.mark.parametrize(("count", "width"), [(40, 6), (15, 30)])
def test_the_choice_is_that_of_scikit_learn(count, width):
    x, y, _ = regression(count, width)
    readout = ridge(x, y, strengths=STRENGTHS, standardise=False)
    peer = RidgeCV(STRENGTHS, store_cv_results=True).fit(x, y)
    np.testing.assert_allclose(
        readout.report.column("left-out squared error"), peer.cv_results_.mean(axis=(0, 1)), rtol=1e-8
    )
    assert readout.report.metadata["strength"] == peer.alpha_
    codes = np.digitize(y[:, 0], np.quantile(y[:, 0], [0.33, 0.66]))
    readout = ridge(x, codes, strengths=STRENGTHS, standardise=False)
    peer = RidgeClassifierCV(STRENGTHS).fit(x, codes)
    assert readout.report.metadata["strength"] == peer.alpha_
    np.testing.assert_allclose(readout.predict(readout.params, x), peer.decision_function(x), atol=1e-5)


def test_leaving_out_one_example_by_hand():
    x, y, weights = regression(12, 4)
    errors = []
    for row in range(12):
        kept = np.arange(12) != row
        readout = ridge(x[kept], y[kept], strengths=1.0, weights=weights[kept], standardise=False)
        errors.append(((readout.predict(readout.params, x[[row]])[0] - y[row]) ** 2).mean())
    readout = ridge(x, y, strengths=1.0, weights=weights, standardise=False)
    found = readout.report.column("left-out squared error")[0]
    np.testing.assert_allclose(found, np.average(errors, weights=weights), rtol=1e-5)


def test_strengths_that_are_not_positive():
    with pytest.raises(DataError, match=r"strengths are 1\.0, 0\.0; expected numbers above 0"):
        ridge(np.eye(3), [0, 1, 1], strengths=[1, 0])
