"""The laws of scores catch what breaks them."""

import itertools

import numpy as np
import pytest

from transferjax._errors import LawError
from transferjax.testing import check_score

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(30, 4))
LABELS = RNG.integers(0, 3, 30)
counter = itertools.count()


def between(features, labels):
    """How much of the features' variance the classes explain; keeps every law."""
    mean = features.mean(0)
    groups = [features[labels == value] for value in np.unique(labels)]
    explained = sum(len(group) * np.square(group.mean(0) - mean).sum() for group in groups)
    return float(explained / np.square(features - mean).sum())


def _overwriting(features, labels):
    found = between(features, labels)
    features -= 1
    return found


BROKEN = {
    "a numpy number": (lambda f, y: np.float64(between(f, y)), r"finite Python float' is broken: got \(\) float64"),
    "a whole number": (lambda f, y: 3, "got int. Write float"),
    "not a number": (lambda f, y: float("nan"), "finite Python float' is broken: got nan"),
    "overwrites": (_overwriting, "the features or labels changed during the call"),
    "forgets": (lambda f, y: float(next(counter)), "equal calls give equal scores' is broken: got"),
    "looks at the first": (lambda f, y: between(f, y) + float(f[0, 0]), "the order of the examples does not matter'"),
    "reads the numbers": (lambda f, y: between(f, y) + float(y.mean()), "the names of the classes do not matter'"),
    "reads a column": (lambda f, y: float(f[:, 0].var()), "a rotation of the features does not matter' is broken: ex"),
}


def test_a_good_score():
    check_score(between, FEATURES, LABELS, rotation=True)
    check_score(between, FEATURES.astype(np.float32), LABELS - 5, rotation=True, rtol=1e-5)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_scores(name):
    score, message = BROKEN[name]
    with pytest.raises(LawError, match=message):
        check_score(score, FEATURES, LABELS, rotation=True)


def test_the_difference_is_told():
    with pytest.raises(LawError, match=r"apart by .* \(allowed"):
        check_score(lambda f, y: float(f[0, 0]), FEATURES, LABELS)


def test_laws_can_be_left_out():
    check_score(lambda f, y: between(f, y) + float(y.mean()), FEATURES, LABELS, renaming=False)
    check_score(lambda f, y: float(f[:, 0].var()), FEATURES, LABELS)
