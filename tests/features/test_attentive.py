"""The attentive probe: what it finds, where it starts, and what it is with one position."""

import numpy as np
import pytest

from transferjax._errors import DataError
from transferjax.features._attentive import attentive
from transferjax.features._logistic import logistic
from transferjax.features._ridge import ridge


def needles(count, seed=0):
    """One of five positions tells the class, and is marked; the others are noise."""
    rng = np.random.default_rng(seed)
    codes = rng.permutation(count) % 3
    x = rng.normal(size=(count, 5, 6)).astype(np.float32)
    place = rng.integers(0, 5, count)
    x[np.arange(count), place] = 3 * np.eye(6)[codes] + 4 * np.eye(6)[5]
    return x, codes


def test_it_finds_the_position_that_tells():
    x, codes = needles(120)
    readout = attentive(x, codes, strength=0.1)
    test, wanted = needles(200, seed=1)
    found = (readout.predict(readout.params, test).argmax(-1) == wanted).mean()
    mean = logistic(x.mean(1), codes, strengths=0.1)
    assert found > 0.97 > (mean.predict(mean.params, test.mean(1)).argmax(-1) == wanted).mean()
    assert readout.params["query"].argmax() == 5 and readout.report.metadata["converged"]


def test_one_position_is_plain_logistic_regression_and_ridge():
    x, codes = needles(60)
    one = x[:, 0]
    readout = attentive(x[:, :1], codes, strength=2.0, standardise=False)
    plain = logistic(one, codes, strengths=2.0, standardise=False)
    assert abs(readout.params["query"]).max() < 1e-6
    np.testing.assert_allclose(readout.predict(readout.params, x[:, :1]), plain.predict(plain.params, one), atol=5e-4)
    target = one[:, 0] * 2 + 3
    readout, plain = attentive(x[:, :1], target, strength=2.0), ridge(one, target, strengths=2.0)
    np.testing.assert_allclose(readout.predict(readout.params, x[:, :1]), plain.predict(plain.params, one), atol=5e-4)


def test_the_order_of_positions_does_not_matter_nor_their_number():
    x, codes = needles(60)
    readout = attentive(x, codes)
    found = readout.predict(readout.params, x)
    np.testing.assert_allclose(readout.predict(readout.params, x[:, ::-1]), found, atol=1e-5)
    np.testing.assert_allclose(readout.predict(readout.params, np.concatenate([x, x], 1)), found, atol=1e-5)


def test_what_does_not_fit_is_named():
    x, codes = needles(12)
    with pytest.raises(
        DataError, match=r"features are \(12, 6\) float32; expected \[N, T, d\]\. For pooled ones write"
    ):
        attentive(x[:, 0], codes)
    with pytest.raises(DataError, match=r"strength are 0\.0; expected numbers above 0"):
        attentive(x, codes, strength=0.0)
