"""Similarities of features against the formulas written out, and neighbours against scikit-learn."""

import itertools

import jax
import numpy as np
import pytest
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from transferjax._errors import DataError
from transferjax.numerics import _covariance
from transferjax.scores import a_distance, cka_matrix, knn_accuracy, linear_cka, mmd, rbf_cka

RNG = np.random.default_rng(0)


@pytest.fixture(params=[1 << 20, 32], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(_covariance, "ELEMENTS", request.param)


def pair(count, width=6, other=9):
    x = RNG.normal(size=(count, width)) + 5
    return x.astype(np.float32), (x @ RNG.normal(size=(width, other)) + RNG.normal(size=(count, other))) - 3


def gram_cka(k, m):
    h = np.eye(len(k)) - 1 / len(k)
    product = lambda a, b: np.trace(h @ a @ h @ b)
    return product(k, m) / np.sqrt(product(k, k) * product(m, m))


def unbiased_cka(k, m):
    def product(a, b):
        n, one = len(a), np.ones(len(a))
        a, b = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
        cross = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
        return (np.trace(a @ b) + cross - 2 / (n - 2) * one @ a @ b @ one) / (n * (n - 3))

    return product(k, m) / np.sqrt(product(k, k) * product(m, m))


@pytest.mark.parametrize("count", [5, 40, 300])
def test_linear_cka(count, chunks):
    x, y = pair(count)
    k, m = x.astype(np.float64) @ x.T.astype(np.float64), y @ y.T
    a, b = x - x.mean(0, dtype=np.float64), y - y.mean(0)
    norm = np.linalg.norm
    assert linear_cka(x, y) == pytest.approx(norm(b.T @ a) ** 2 / (norm(a.T @ a) * norm(b.T @ b)), rel=1e-9)
    assert linear_cka(x, y, unbiased=True) == pytest.approx(unbiased_cka(k, m), rel=1e-7)
    assert linear_cka(y, x) == pytest.approx(linear_cka(x, y), rel=1e-12)


@pytest.mark.parametrize("threshold", [1.0, 0.3])
def test_rbf_cka(threshold, chunks):
    x, y = pair(40)
    kernels = []
    for table in (x.astype(np.float64), y):
        d2 = pairwise_distances(table) ** 2
        kernels.append(np.exp(-d2 / (2 * threshold**2 * np.median(d2))))
    assert rbf_cka(x, y, threshold) == pytest.approx(gram_cka(*kernels), rel=1e-8)
    assert rbf_cka(x, y, threshold, unbiased=True) == pytest.approx(unbiased_cka(*kernels), rel=1e-7)


def test_the_unbiased_form_is_about_zero_for_unrelated_features():
    unrelated = [pair(60, 40, 40)[0] for _ in range(40)]
    biased = [linear_cka(a, b) for a, b in zip(unrelated[::2], unrelated[1::2])]
    unbiased = [linear_cka(a, b, unbiased=True) for a, b in zip(unrelated[::2], unrelated[1::2])]
    assert np.mean(biased) > 0.3 and abs(np.mean(unbiased)) < 0.02


def layers(count):
    x, y = pair(count)
    return {"a": x, "b": np.tanh(x - 5)}, {"c": y, "d": y[:, :2] ** 2, "e": x[:, ::-1]}


def test_the_matrix_of_one_batch_is_the_unbiased_cka():
    xs, ys = layers(50)
    expected = [[linear_cka(x, y, unbiased=True) for y in ys.values()] for x in xs.values()]
    found = cka_matrix(xs, ys)
    assert found.shape == (2, 3) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    assert found[0, 2] == pytest.approx(1.0)


def test_batches_may_come_one_at_a_time():
    xs, ys = layers(230)
    edges = [0, 57, 115, 172, 230]  # what four equal parts are
    part = lambda side, rows: {name: array[rows] for name, array in side.items()}
    stream = ((part(xs, slice(a, b)), part(ys, slice(a, b))) for a, b in itertools.pairwise(edges))
    np.testing.assert_allclose(cka_matrix(xs, ys, batch=60), cka_matrix(stream), rtol=1e-12)


def test_the_size_of_the_batches_hardly_matters():
    xs, ys = layers(1200)
    np.testing.assert_allclose(cka_matrix(xs, ys, batch=60), cka_matrix(xs, ys, batch=1200), atol=0.03)


def test_mmd_is_its_formula(chunks):
    x, y = RNG.normal(size=(50, 4)) + 9, RNG.normal(size=(30, 4)) * 1.5 + 9.5
    both = np.concatenate([x, y])
    d2 = pairwise_distances(both) ** 2
    kernel = sum(np.exp(-d2 / (2 * 2.0**k * d2.mean())) for k in range(-3, 2))
    k, m, cross = kernel[:50, :50], kernel[50:, 50:], kernel[:50, 50:]
    within = (k.sum() - np.trace(k)) / (50 * 49) + (m.sum() - np.trace(m)) / (30 * 29)
    assert mmd(x, y) == pytest.approx(2 * cross.mean() - within, rel=1e-8)
    assert mmd(y, x) == pytest.approx(mmd(x, y), rel=1e-10)


def test_mmd_is_about_zero_for_one_distribution_and_falls_with_distance():
    x, y = RNG.normal(size=(2, 300, 5))
    assert abs(mmd(x, y)) < 0.01 and mmd(x, y) > mmd(x, y + 0.5) > mmd(x, y + 2)


def test_a_distance_is_the_error_with_each_example_left_out(chunks):
    x, y = RNG.normal(size=(25, 3)) + 4, RNG.normal(size=(15, 3)) + 4.6
    rows, signs = np.concatenate([x, y]), np.repeat([1.0, -1.0], [25, 15])
    weights = np.repeat([1 / 50, 1 / 30], [25, 15])
    centred = rows - weights @ rows
    ridge = 1e-3 * np.trace((centred.T * weights) @ centred) / 3 * np.diag([1, 1, 1, 0])
    wrong = []
    for i in range(40):
        kept = np.arange(40) != i
        design = np.concatenate([centred, np.ones((40, 1))], 1)
        moment = (design[kept].T * weights[kept]) @ design[kept] + ridge
        solved = np.linalg.solve(moment, design[kept].T @ (weights[kept] * signs[kept]))
        wrong.append(signs[i] * (design[i] @ solved) <= 0)
    error = (np.mean(wrong[:25]) + np.mean(wrong[25:])) / 2
    assert 0.1 < error < 0.5
    assert a_distance(x, y) == pytest.approx(-2 * (1 - 2 * error), abs=1e-12)
    assert a_distance(y, x) == pytest.approx(a_distance(x, y), abs=1e-12)


def test_a_distance_with_more_columns_than_examples():
    x, y = RNG.normal(size=(2, 20, 50))
    assert a_distance(x, y) > -1.2 > a_distance(x, y + 3)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_neighbours_are_those_of_scikit_learn(stored, k, chunks):
    features, labels = stored["tall-features"].astype(np.float64), stored["tall-labels"]
    peer = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = (cross_val_predict(peer, features, labels, cv=LeaveOneOut()) == labels).mean()
    assert knn_accuracy(features, labels, k=k) == pytest.approx(expected, abs=1e-12)


def test_all_others_vote_where_there_are_few():
    features = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert knn_accuracy(features, [0, 0, 1, 1], k=20) == 1.0


def test_classes_with_equal_votes_share_the_credit():
    features = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0]])
    assert knn_accuracy(features, [4, 4, 9], k=2) == pytest.approx((0.5 + 1 + 0) / 3)


def test_jax_arrays_are_taken_and_the_global_precision_stays():
    x, y = (jax.numpy.asarray(array) for array in pair(30))
    assert isinstance(linear_cka(x, y), float) and not jax.config.jax_enable_x64
    assert linear_cka(x, y) == pytest.approx(linear_cka(np.asarray(x), np.asarray(y)), rel=1e-12)


X, Y = pair(8)
LABELS = np.arange(8) % 2
BAD = {
    "mismatch": (lambda: linear_cka(X, Y[:5]), "y have 5 examples and x 8"),
    "NaN": (lambda: linear_cka(X, Y * np.nan), "y are not finite in 8 of 8"),
    "constant": (lambda: linear_cka(X * 0, Y), "x are constant: all 8 examples"),
    "rbf, constant": (lambda: rbf_cka(X, Y * 0), "y are constant: all 8 examples"),
    "rbf, threshold": (lambda: rbf_cka(X, Y, 0.0), "threshold is 0.0; expected a number above 0"),
    "few": (lambda: rbf_cka(X[:3], Y[:3], unbiased=True), r"the unbiased CKA got 3 examples\. Expected at least 4"),
    "noise": (
        lambda: linear_cka(np.eye(5), RNG.normal(size=(5, 2)), unbiased=True),
        "the unbiased HSIC of one side with itself is not above 0",
    ),
    "matrix, arrays": (lambda: cka_matrix(X, Y), r"cka_matrix got \(8, 6\) float32 and .* expected two mappings"),
    "matrix, nothing": (lambda: cka_matrix({}, {"a": Y}), "with at least one layer each"),
    "matrix, no batch": (lambda: cka_matrix([]), "cka_matrix got no batch. Expected an iterable of pairs"),
    "matrix, batch": (lambda: cka_matrix({"a": X}, {"b": Y}, batch=3), "batch is 3; expected a whole number"),
    "matrix, rows": (lambda: cka_matrix({"a": X}, {"b": Y[:7]}), "'b' have 7 examples and the first layer 8"),
    "matrix, stream": (lambda: cka_matrix([({"a": X}, {"b": Y[:7]})]), "'b' have 7 examples and the first layer 8"),
    "matrix, few": (lambda: cka_matrix([({"a": X[:3]}, {"b": Y[:3]})]), "the unbiased CKA got 3 examples"),
    "matrix, names": (
        lambda: cka_matrix([({"a": X}, {"b": Y}), ({"a": X}, {"c": Y})]),
        "batch 1 has the layers a, c; the first had a, b. Expected the same layers in every batch",
    ),
    "mmd, columns": (lambda: mmd(X, Y), r"x are \(8, 6\) float32 and y \(8, 9\) float64; expected the same columns"),
    "mmd, constant": (lambda: mmd(X * 0 + 0.1, X[:3] * 0 + 0.1), "mmd needs features that vary"),
    "mmd, one": (lambda: mmd(X, X[:1]), "expected at least 2 examples"),
    "distance, columns": (lambda: a_distance(X, Y), "expected the same columns of both, from one network"),
    "distance, constant": (lambda: a_distance(X * 0, X * 0), "a_distance needs features that vary"),
    "distance, NaN": (lambda: a_distance(X, X * np.nan), "y are not finite in 8"),
    "knn, zero": (lambda: knn_accuracy(X * (LABELS[:, None] > 0), LABELS), "example 0 are all zero, which"),
    "knn, k": (lambda: knn_accuracy(X, LABELS, k=0), "k is 0 and temperature 0.07; expected a whole number"),
    "knn, temperature": (lambda: knn_accuracy(X, LABELS, temperature=0.0), "temperature 0.0; expected"),
    "knn, constant": (lambda: knn_accuracy(X * 0 + 1, LABELS), "features are constant: all 8"),
    "knn, numbers": (lambda: knn_accuracy(X, LABELS[:5]), "labels have 5 examples and features 8"),
    "knn, one class": (lambda: knn_accuracy(X, LABELS * 0), "labels hold 1 class"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    call, message = BAD[name]
    with pytest.raises(DataError, match=message):
        call()
