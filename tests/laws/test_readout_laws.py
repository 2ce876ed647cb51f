"""Every read-out keeps the laws of read-outs, for every kind of labels that it takes."""

import functools

import jax
import numpy as np
import pytest

from transferjax._errors import DataError
from transferjax._report import Report
from transferjax.features._attentive import attentive
from transferjax.features._gaussian_process import gaussian_process
from transferjax.features._lda import lda
from transferjax.features._logistic import logistic
from transferjax.features._neighbours import knn, nearest_mean
from transferjax.features._readout import Readout
from transferjax.features._ridge import ridge
from transferjax.features._svm import svm

CLASSES, LABELS, NUMBERS, MATRIX = "classes", "labels", "targets [N]", "targets [N, K]"
EVERY = (CLASSES, LABELS, NUMBERS, MATRIX)
READOUTS = {
    "ridge": (functools.partial(ridge, strengths=2.0), EVERY),
    "logistic": (functools.partial(logistic, strengths=2.0), EVERY[:2]),
    "svm": (functools.partial(svm, strengths=2.0), EVERY[:2]),
    "knn": (functools.partial(knn, k=5), EVERY),
    "nearest_mean": (nearest_mean, EVERY[:2]),
    "lda": (functools.partial(lda, shrinkage=0.1), EVERY[:2]),
    "gaussian_process": (functools.partial(gaussian_process, length_scales=3.0, noises=0.1), EVERY),
    "attentive": (functools.partial(attentive, strength=2.0), EVERY),
}
EACH = [(name, kind) for name, (_, kinds) in READOUTS.items() for kind in kinds]
COUNT, WIDTH, POSITIONS = 24, 6, 2
# The probe is not convex, its float32 descent ends near a minimum; the others are exact but for rounding.
CLOSE = {"attentive": 2e-3}


def examples(name, count=COUNT, seed=0, kind=CLASSES):
    """Features as the read-out takes them, and labels that they tell something about."""
    rng = np.random.default_rng(seed)
    codes = np.arange(count) % 3
    x = (2 * np.eye(3, WIDTH)[codes] + rng.normal(size=(count, WIDTH)) + 0.5).astype(np.float32)
    numbers = x[:, :2] @ np.array([[1.0, -0.5], [0.5, 2.0]]) + 0.1 * rng.normal(size=(count, 2)) + 3
    labels = {CLASSES: codes, LABELS: x[:, :4] > 0.8, NUMBERS: numbers[:, 0], MATRIX: numbers}[kind]
    return (x.reshape(count, POSITIONS, -1) if name == "attentive" else x), labels


def outputs(readout, features):
    return np.asarray(readout.predict(readout.params, features))


def close(name, found, wanted):
    np.testing.assert_allclose(found, wanted, atol=CLOSE.get(name, 2e-5) * max(1.0, abs(wanted).max()))


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_what_a_readout_is(name, kind):
    fit, _ = READOUTS[name]
    x, labels = examples(name, kind=kind)
    before = x.copy(), labels.copy()
    readout = fit(x, labels)
    assert isinstance(readout, Readout) and isinstance(readout.report, Report) and readout.report.rows
    assert (x == before[0]).all() and (labels == before[1]).all()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(readout.params)} == {"float32"}
    found = readout.predict(readout.params, x)
    width = {CLASSES: (3,), LABELS: (4,), NUMBERS: (), MATRIX: (2,)}[kind]
    assert found.dtype == np.float32 and found.shape == (COUNT, *width)
    again = fit(jax.numpy.asarray(x), labels)
    jax.tree.map(np.testing.assert_array_equal, again.params, readout.params)


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_prediction_is_pure_and_fit_for_jit(name, kind):
    fit, _ = READOUTS[name]
    x, labels = examples(name, kind=kind)
    readout = fit(x, labels)
    found = outputs(readout, x)
    close(name, np.asarray(jax.jit(readout.predict)(readout.params, x)), found)
    close(name, np.concatenate([outputs(readout, x[:5]), outputs(readout, x[5:6]), outputs(readout, x[6:])]), found)
    close(name, outputs(readout, x.astype(np.float64)), found)


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_it_learns(name, kind):
    fit, _ = READOUTS[name]
    x, labels = examples(name, 240, kind=kind)
    test, wanted = examples(name, 240, seed=1, kind=kind)
    found = outputs(fit(x, labels), test)
    if kind == CLASSES:
        assert (found.argmax(-1) == wanted).mean() > 0.7
    elif kind == LABELS:
        chance = np.maximum(wanted.mean(), 1 - wanted.mean())
        assert ((found > 0) == wanted).mean() > chance + 0.1
    else:
        assert ((found - wanted) ** 2).mean() < 0.6 * wanted.var(axis=0).mean()


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_weights_say_how_often_an_example_counts(name, kind):
    fit, _ = READOUTS[name]
    x, labels = examples(name, kind=kind)
    test, _ = examples(name, seed=1, kind=kind)
    weights = np.ones(COUNT, int)
    weights[[1, 5, 9, 14]] = 0
    if name == "knn":  # its weights are factors of the votes; an example is one neighbour, whatever it weighs
        kept = weights > 0
        close(name, outputs(fit(x, labels, weights=3 * weights), test), outputs(fit(x[kept], labels[kept]), test))
        return
    weights[[0, 4, 8]] = 2, 3, 2
    rows = np.repeat(np.arange(COUNT), weights)
    close(name, outputs(fit(x, labels, weights=weights), test), outputs(fit(x[rows], labels[rows]), test))


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_the_order_of_examples_does_not_matter(name, kind):
    fit, _ = READOUTS[name]
    x, labels = examples(name, kind=kind)
    order = np.random.default_rng(2).permutation(COUNT)
    close(name, outputs(fit(x[order], labels[order]), x), outputs(fit(x, labels), x))


@pytest.mark.parametrize("name", READOUTS)
def test_the_order_of_classes_does_not_matter(name):
    fit, _ = READOUTS[name]
    x, labels = examples(name)
    places = np.array([2, 0, 1])
    close(name, outputs(fit(x, places[labels]), x)[:, places], outputs(fit(x, labels), x))


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_standardised_features_have_no_unit(name, kind):
    fit, _ = READOUTS[name]
    x, labels = examples(name, kind=kind)
    other = (x * np.array([3.0, 0.2, 10.0] * 2 if x.ndim == 2 else [3.0, 0.2, 10.0]) + 1).astype(np.float32)
    close(name, outputs(fit(other, labels, standardise=True), other), outputs(fit(x, labels, standardise=True), x))


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_a_constant_column_says_nothing(name, kind):
    fit, _ = READOUTS[name]
    x, labels = examples(name, kind=kind)
    more = np.concatenate([x, np.full((*x.shape[:-1], 1), 7.3, np.float32)], axis=-1)
    if name == "attentive":  # its attention is divided by the square root of the width
        assert np.isfinite(outputs(fit(more, labels, standardise=True), more)).all()
        return
    readout, other = fit(more, labels, standardise=True), fit(x, labels, standardise=True)
    if name != "lda":  # it shrinks towards the mean variance of all columns
        close(name, outputs(readout, more), outputs(other, x))
    elsewhere = more.copy()
    elsewhere[:, -1] = 9
    close(name, outputs(readout, elsewhere), outputs(readout, more))


@pytest.mark.parametrize("name", READOUTS)
def test_a_class_without_an_example_is_never_the_answer(name):
    fit, _ = READOUTS[name]
    x, labels = examples(name)
    wide = outputs(fit(x, np.array([1, 2, 4])[labels], num_classes=6), x)
    assert wide.shape == (COUNT, 6) and set(wide.argmax(-1)) <= {1, 2, 4}
    close(name, wide[:, [1, 2, 4]], outputs(fit(x, labels), x))
    with pytest.raises(DataError, match="labels skip class 0: 24 examples hold 3 of the 5 classes"):
        fit(x, np.array([1, 2, 4])[labels])


@pytest.mark.parametrize("name", READOUTS)
def test_more_columns_than_examples(name):
    fit, _ = READOUTS[name]
    rng = np.random.default_rng(0)
    labels = np.arange(12) % 3
    x = 6 * np.eye(3, 40)[labels] + rng.normal(size=(12, 40))
    readout = fit(x.reshape(12, 2, 20) if name == "attentive" else x, labels)
    assert (outputs(readout, x.reshape(12, 2, 20) if name == "attentive" else x).argmax(-1) == labels).all()


@pytest.mark.parametrize("name", READOUTS)
def test_what_no_readout_can_use_is_named(name):
    fit, kinds = READOUTS[name]
    x, labels = examples(name)
    bad = x.copy()
    bad[3].flat[0] = np.nan
    with pytest.raises(DataError, match="features are not finite in 1 of"):
        fit(bad, labels)
    with pytest.raises(DataError, match="features are constant: all 24 examples have the same"):
        fit(np.ones_like(x), labels)
    with pytest.raises(DataError, match="labels have 23 examples and features 24"):
        fit(x, labels[1:])
    with pytest.raises(DataError, match="weights have 23 examples and features 24"):
        fit(x, labels, weights=np.ones(23))
    with pytest.raises(DataError, match="weights are negative, not finite or all zero"):
        fit(x, labels, weights=-np.ones(COUNT))
    with pytest.raises(DataError, match=r"labels hold 1 class\(es\)"):
        fit(x, 0 * labels)
    if NUMBERS not in kinds:
        with pytest.raises(DataError, match=rf"{name}\(\) reads out .* these labels are targets\. For targets write"):
            fit(x, labels + 0.5)
    readout = fit(x, labels)
    wider = np.concatenate([x, x], axis=-1)
    for predict in (readout.predict, jax.jit(readout.predict)):
        with pytest.raises(DataError, match=r"features are .*; expected \[N, .*\], as wide as those of the fit"):
            predict(readout.params, wider)
