"""LEEP and NCE against thuml's code, N-LEEP against scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from transferjax._errors import DataError
from transferjax.numerics import _mixture
from transferjax.scores import leep, nce, nleep

RNG = np.random.default_rng(0)


def test_they_are_those_of_the_peer(case):
    assert leep(case["probs"], case["labels"]) == pytest.approx(case["leep"], abs=1e-10)
    assert nce(case["probs"].argmax(1), case["labels"]) == pytest.approx(case["nce"], abs=1e-10)


def test_hard_probabilities_make_leep_nce():
    source, labels = RNG.integers(0, 5, 80), RNG.integers(0, 3, 80)
    assert leep(np.eye(9)[source], labels) == pytest.approx(nce(source, labels), abs=1e-12)  # four classes never come


def test_nce_of_labels_that_are_functions_of_each_other():
    source = np.arange(40) % 8
    assert nce(source - 3, 7 * (source % 2) - 5) == 0.0
    assert nce(np.zeros(40, int), source) == pytest.approx(-np.log(8))


def test_low_precision_probabilities_are_taken():
    probs = np.exp(RNG.normal(size=(50, 6)))
    probs /= probs.sum(1, keepdims=True)
    exact = leep(probs, np.arange(50) % 3)
    for dtype, tolerance in [(np.float32, 1e-6), (jnp.bfloat16, 1e-2), (np.float16, 1e-3)]:
        assert leep(jnp.asarray(probs).astype(dtype), np.arange(50) % 3) == pytest.approx(exact, abs=tolerance)


def test_nleep_is_leep_of_the_mixture(case):
    """With the mixture of scikit-learn, begun from the same parts."""
    features, labels = case["features"].astype(np.float64), case["labels"]
    reduced = PCA(0.8, svd_solver="full").fit_transform(features)
    floor = 1e-6 * reduced.var(0).mean()
    begin = _mixture._from_codes(reduced, _mixture.divide(reduced, 4), floor)
    precisions = np.einsum("kji,kjl->kil", begin.precisions, begin.precisions)
    peer = GaussianMixture(
        4, reg_covar=floor, weights_init=begin.weights, means_init=begin.means, precisions_init=precisions
    )
    probs = peer.fit(reduced).predict_proba(reduced)
    assert nleep(features, labels, components=4) == pytest.approx(leep(probs, labels), abs=1e-5)


def test_nleep_has_five_components_per_class_where_there_are_examples(monkeypatch):
    asked = []
    fit = _mixture.gaussian_mixture
    monkeypatch.setattr(
        "transferjax.scores._counts.gaussian_mixture",
        lambda points, count, **options: asked.append(count) or fit(points, count, **options),
    )
    for count in (100, 16):
        nleep(RNG.normal(size=(count, 3)), np.arange(count) % 3, iterations=1)
    assert asked == [15, 8]


GOOD = np.full((6, 2), 0.5)
LABELS = np.arange(6) % 2
BAD = {
    "logits": (lambda: leep(np.ones((6, 3)) * [3, -1, -1], LABELS), "source_probs are no probabilities: the least"),
    "sums": (lambda: leep(GOOD + 0.01, LABELS), "leep needs the class probabilities of the source"),
    "classes": (lambda: leep(LABELS, LABELS), r"source_probs are \(6,\) int64; expected numbers"),
    "NaN": (lambda: leep(GOOD * np.nan, LABELS), "source_probs are not finite in 6 of 6"),
    "numbers": (lambda: leep(GOOD, LABELS[:5]), "labels have 5 examples and source_probs 6"),
    "one class": (lambda: leep(GOOD, LABELS * 0), "labels hold 1 class"),
    "float labels": (lambda: leep(GOOD, LABELS * 1.0), r"labels are \(6,\) float64; expected integers"),
    "nce: probabilities": (lambda: nce(GOOD, LABELS), "nce needs the predicted classes of the source, integers"),
    "nce: floats": (lambda: nce(LABELS * 1.0, LABELS), r"source_labels are \(6,\) float64; nce needs"),
    "nce: numbers": (lambda: nce(LABELS, LABELS[:4]), "labels have 4 examples and source_labels 6"),
    "nce: one class": (lambda: nce(LABELS, LABELS * 0), "labels hold 1 class"),
    "nleep: few": (lambda: nleep(RNG.normal(size=(6, 2)), LABELS, components=7), "nleep got 6 examples for"),
    "nleep: none": (lambda: nleep(RNG.normal(size=(6, 2)), LABELS, components=0), "for a mixture of 0 components"),
    "nleep: constant": (lambda: nleep(np.ones((6, 2)), LABELS), "features are constant: all 6"),
    "nleep: NaN": (lambda: nleep(np.ones((6, 2)) * np.nan, LABELS), "features are not finite in 6"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    call, message = BAD[name]
    with pytest.raises(DataError, match=message):
        call()
