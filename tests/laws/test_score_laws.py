"""Every score keeps the laws of scores, with more examples than columns and with fewer."""

import tracemalloc

import numpy as np
import pytest

from transferjax import scores
from transferjax.numerics import _cka, _covariance
from transferjax.testing import check_score

ROTATED = ("gbc", "h_score", "h_score_regularized", "knn_accuracy", "logme", "nleep", "sfda", "transrate")
AS_THEY_ARE = ("parc",)
SIDES = {
    "leep": lambda f, y: scores.leep(np.exp(f) / np.exp(f).sum(1, keepdims=True), y),
    "nce": lambda f, y: scores.nce(f.argmax(1), y),
    "otdd": lambda f, y: scores.otdd(f, y, np.sin(f) + 1, y),
}
PAIRS = ("a_distance", "linear_cka", "mmd", "rbf_cka")
NEITHER = {"cka_matrix", "task2vec", "task2vec_distance"}  # return an array, or take no features


def case(count, width, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(4).repeat(2), rng.choice(4, count - 8, p=[0.5, 0.3, 0.1, 0.1])])
    means = rng.standard_normal((4, width))
    return (means[labels] + rng.standard_normal((count, width))).astype(np.float32), 5 * labels - 3


CASES = {"tall": case(120, 7), "wide": case(40, 60), "one more": case(31, 30)}


def test_every_score_has_its_laws():
    assert {*ROTATED, *AS_THEY_ARE, *SIDES, *PAIRS} | NEITHER == set(scores.__all__)


@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("name", ROTATED + AS_THEY_ARE)
def test_scores_of_features(name, size):
    check_score(getattr(scores, name), *CASES[size], rotation=name in ROTATED)


@pytest.mark.parametrize("name", SIDES)
def test_scores_of_predictions(name):
    features, labels = CASES["tall"]
    check_score(SIDES[name], features.astype(np.float64), labels)


@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("name", PAIRS)
def test_similarities(name, size):
    features, _ = CASES[size]
    score, other = getattr(scores, name), np.sin(features) + 0.1
    if name.endswith("cka"):
        check_score(lambda f, y: score(f, other[y]), features, np.arange(len(features)), rotation=True, renaming=False)
        check_score(lambda f, y: score(other[y], f), features, np.arange(len(features)), rotation=True, renaming=False)
    else:
        half = np.arange(len(features)) % 2
        check_score(lambda f, y: score(f[y == 0], f[y == 1]), features, half, renaming=False, rotation=True)


@pytest.mark.parametrize("name", ROTATED + AS_THEY_ARE)
def test_float32_and_float64_of_the_same_numbers(name):
    features, labels = CASES["tall"]
    score = getattr(scores, name)
    assert score(features, labels) == pytest.approx(score(features.astype(np.float64), labels), rel=1e-9)


@pytest.mark.parametrize("name", ROTATED + AS_THEY_ARE)
def test_true_labels_score_higher_than_shuffled_ones(name):
    features, labels = CASES["tall"]
    shuffled = np.random.default_rng(1).permutation(labels)
    assert getattr(scores, name)(features, labels) > getattr(scores, name)(features, shuffled)


@pytest.mark.parametrize("name", ["h_score", "h_score_regularized", "logme", "nleep", "parc"])
def test_the_scale_does_not_matter(name):
    features, labels = CASES["tall"]
    score = getattr(scores, name)
    assert score(1024 * features, labels) == pytest.approx(score(features, labels), rel=1e-6)


WHOLE = {
    **{name: getattr(scores, name) for name in ("h_score", "h_score_regularized", "knn_accuracy", "logme", "sfda")},
    "transrate": scores.transrate,
    "gbc": lambda f, y: scores.gbc(f, y, components=4),
    "linear_cka": lambda f, y: scores.linear_cka(f, f[::-1], unbiased=True),
    "mmd": lambda f, y: scores.mmd(f[: len(f) // 2], f[len(f) // 2 :]),
    "a_distance": lambda f, y: scores.a_distance(f[: len(f) // 2], f[len(f) // 2 :]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_no_score_makes_a_float64_copy_of_all_features(name, monkeypatch):
    """Nor one half of it: they are turned to float64 some rows at a time."""
    pairs = name in ("knn_accuracy", "mmd")  # of rows; the others make pairs of columns
    for module in (_covariance, _cka):
        monkeypatch.setattr(module, "ELEMENTS", 1 << 19 if pairs else 1 << 16)
    rng = np.random.default_rng(0)
    shape = (2048, 2048) if pairs else (8000, 128)
    features, labels = rng.standard_normal(shape, np.float32), rng.integers(0, 20, shape[0])
    tracemalloc.start()
    try:
        WHOLE[name](features, labels)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < features.size * 8 / 2
