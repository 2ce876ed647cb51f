"""Linear discriminant analysis against scikit-learn."""

import jax
import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from transferjax._errors import DataError
from transferjax.features._lda import lda


def examples(count=60, width=5):
    rng = np.random.default_rng(0)
    codes = rng.permutation(count) % 3
    codes[:6] = 0
    mixing = np.eye(width) + 0.3 * rng.normal(size=(width, width)) / np.sqrt(width)
    return rng.normal(size=(3, width))[codes] + rng.normal(size=(count, width)) @ mixing + 3, codes


@pytest.mark.parametrize("solver", ["lsqr", "eigen"])
@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3, 1.0])
def test_posteriors_are_those_of_scikit_learn(shrinkage, solver):
    x, codes = examples()
    readout = lda(x, codes, shrinkage=shrinkage)
    peer = LinearDiscriminantAnalysis(solver=solver, shrinkage="auto" if shrinkage is None else shrinkage).fit(x, codes)
    found = jax.nn.log_softmax(readout.predict(readout.params, x))
    np.testing.assert_allclose(found, peer.predict_log_proba(x), atol=2e-5)


def test_more_columns_than_examples():
    x, codes = examples(24, 60)
    readout = lda(x, codes)
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x, codes)
    found = jax.nn.log_softmax(readout.predict(readout.params, x))
    np.testing.assert_allclose(found, peer.predict_log_proba(x), atol=1e-4)
    assert all(0 < used <= 1 for used in readout.report.column("shrinkage"))


def test_the_estimate_counts_an_example_as_often_as_its_weight_says():
    x, codes = examples()
    weights = np.random.default_rng(1).integers(1, 4, len(x))
    one, other = lda(x, codes, weights=weights), lda(np.repeat(x, weights, 0), np.repeat(codes, weights))
    np.testing.assert_allclose(one.report.column("shrinkage"), other.report.column("shrinkage"), rtol=1e-9)
    np.testing.assert_allclose(one.predict(one.params, x), other.predict(other.params, x), atol=1e-5)


def test_log_odds_of_each_label():
    x, codes = examples()
    readout = lda(x, np.stack([codes == 0, codes == 1], 1), shrinkage=0.1)
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(x, codes == 1)
    np.testing.assert_allclose(readout.predict(readout.params, x)[:, 1], peer.decision_function(x), atol=2e-5)


def test_one_column_is_not_shrunk():
    x, codes = examples()
    assert lda(x[:, :1], codes).report.column("shrinkage") == [0.0, 0.0, 0.0]


def test_what_does_not_fit_is_named():
    x, codes = examples()
    with pytest.raises(DataError, match=r"shrinkage is 2; expected a number from 0 to 1, or None for an estimate"):
        lda(x, codes, shrinkage=2)
    with pytest.raises(DataError, match=r"lda\(\) needs a class with two different examples\. For one each write"):
        lda(np.eye(3), [0, 1, 2])
    with pytest.raises(DataError, match=r"lda\(\) reads out .* For targets write ridge\(\)"):
        lda(x, codes / 2)
