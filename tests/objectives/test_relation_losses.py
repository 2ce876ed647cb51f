"""Distillation losses of relations against their peers (tests/fixtures/distill_logits) and their formulas."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.objectives import losses

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "distill_logits" / "distill_logits.npz"
partial = functools.partial


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(FIXTURE))


def smooth_l1(x):
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


def rkd_distance(s, t):
    own, other = (np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (s, t))
    return smooth_l1(own / own[own > 0].mean() - other / other[other > 0].mean()).mean()


def cosines(x):
    found = np.zeros((len(x),) * 3)
    for i, corner in enumerate(x):
        units = x - corner
        lengths = np.linalg.norm(units, axis=1, keepdims=True)
        units = np.divide(units, lengths, out=np.zeros_like(units), where=lengths > 0)
        found[i] = units @ units.T
    return found


def rkd_angle(s, t):
    return smooth_l1(cosines(s) - cosines(t)).mean()


def similarity_preserving(s, t, norm=2):
    grams = [x @ x.T for x in (s, t)]
    own, other = (g / np.linalg.norm(g, norm, axis=1, keepdims=True) for g in grams)
    return np.sum((own - other) ** 2) / len(s) ** 2


def correlation_congruence(s, t, kernel="gaussian", gamma=0.4, order=2, normalise=True):
    both = []
    for x in (s, t):
        x = x / np.linalg.norm(x, axis=1, keepdims=True) if normalise else x
        gram = x @ x.T
        if kernel == "gaussian":
            terms = [(2 * gamma) ** p / math.factorial(p) * gram**p for p in range(order + 1)]
            gram = np.exp(-2 * gamma) * sum(terms)
        both.append(gram)
    return np.mean((both[0] - both[1]) ** 2)


def pkt(s, t):
    both = []
    for x in (s, t):
        x = x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-7)
        kernel = (x @ x.T + 1) / 2
        both.append(kernel / kernel.sum(1, keepdims=True))
    return np.mean(both[1] * np.log((both[1] + 1e-7) / (both[0] + 1e-7)))


CASES = {
    "rkd_distance": (losses.rkd_distance, rkd_distance),
    "rkd_angle": (losses.rkd_angle, rkd_angle),
    "similarity_preserving": (losses.similarity_preserving, similarity_preserving),
    "similarity_preserving_1": tuple(partial(f, norm=1) for f in (losses.similarity_preserving, similarity_preserving)),
    "correlation_congruence": (losses.correlation_congruence, correlation_congruence),
    "correlation_congruence_raw": tuple(
        partial(f, normalise=False) for f in (losses.correlation_congruence, correlation_congruence)
    ),
    "correlation_congruence_bilinear": tuple(
        partial(f, kernel="bilinear", normalise=False) for f in (losses.correlation_congruence, correlation_congruence)
    ),
    "pkt": (losses.pkt, pkt),
}
NAMES = ["rkd_distance", "rkd_angle", "similarity_preserving", "correlation_congruence", "pkt"]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_peers(stored, name):
    student, teacher = stored["student_features"], stored["teacher_features"]
    value, gradient = jax.jit(jax.value_and_grad(CASES[name][0]))(student, teacher)
    assert value.dtype == jnp.float32 and value.shape == ()
    np.testing.assert_allclose(value, stored[name], rtol=1e-5)
    expected = stored[f"{name}/gradient"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_formulas(name):
    rng = np.random.default_rng(3)
    student, teacher = (rng.normal(size=(8, width)).astype(np.float32) for width in (5, 20))
    expected = CASES[name][1](student.astype(np.float64), teacher.astype(np.float64))
    np.testing.assert_allclose(CASES[name][0](student, teacher), expected, rtol=1e-5)


@pytest.mark.parametrize("options", [{"gamma": 0.1, "order": 4}, {"kernel": "bilinear"}, {"order": 1}])
def test_options_of_correlation_congruence_are_the_formulas(stored, options):
    student, teacher = stored["student_features"], stored["teacher_features"]
    expected = correlation_congruence(student.astype(np.float64), teacher.astype(np.float64), **options)
    value = losses.correlation_congruence(student, teacher, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_expansion_of_the_gaussian_kernel_approaches_it():
    rng = np.random.default_rng(4)
    student, teacher = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 6, 4)))
    kernels = [np.exp(-0.4 * ((x[:, None] - x) ** 2).sum(-1)) for x in (student, teacher)]
    value = losses.correlation_congruence(student, teacher, order=9)
    np.testing.assert_allclose(value, np.mean((kernels[0] - kernels[1]) ** 2), rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_equal_features_have_no_loss_and_no_gradient(stored, name):
    features = stored["student_features"]
    value, gradient = jax.jit(jax.value_and_grad(CASES[name][0]))(features, features)
    np.testing.assert_allclose(value, 0, atol=1e-7)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_flows_to_the_teacher(stored, name):
    loss = CASES[name][0]
    assert not np.any(jax.grad(loss, argnums=1)(stored["student_features"], stored["teacher_features"]))


INPUTS = {
    "zeros": np.zeros((4, 3)),
    "alike": np.ones((4, 3)),
    "large": 1e4 * np.array([[1, -1, 0], [-1, 1, 0], [0, 0, 1], [1, 1, 1]]),
    "duplicates": np.array([[1, 2, 3.0], [1, 2, 3], [-1, 0, 2], [-1, 0, 2]]),
    "a row of zeros": np.array([[1, 2, 3.0], [0, 0, 0], [-1, 0, 2], [2, 0, 2]]),
    "opposite": np.array([[1, 2, 3.0], [-1, -2, -3], [3, 0, 1], [-3, 0, -1]]),
    "one example": np.array([[1, 2, 3.0]]),
}


@functools.cache
def compiled(name):
    return jax.jit(jax.value_and_grad(CASES[name][0]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("student, dtype", [*((key, jnp.float32) for key in INPUTS), ("large", jnp.bfloat16)])
def test_values_and_gradients_are_finite_everywhere(name, student, dtype):
    x = jnp.asarray(INPUTS[student], dtype)
    loss = compiled(name)
    for teacher in (x, -x, jnp.roll(x, 1, axis=1), jnp.zeros_like(x)):
        value, gradient = loss(x, teacher)
        assert value.dtype == jnp.float32 and gradient.dtype == dtype
        assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_allclose(loss(x, x)[0], 0, atol=1e-7)
    np.testing.assert_allclose(loss(x, x)[1].astype(jnp.float32), 0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_example_has_no_relations_and_no_loss(name):
    value = CASES[name][0](np.array([[1.0, 2.0]]), np.array([[3.0, -1.0, 2.0]]))
    np.testing.assert_allclose(value, 0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_hidden(stored, name):
    student, teacher = stored["student_features"], stored["teacher_features"].copy()
    teacher[3, 4] = np.nan
    assert np.isnan(CASES[name][0](student, teacher)) and np.isnan(CASES[name][0](teacher, student))


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_flattened_and_half_precision_is_raised(stored, name):
    student, teacher = stored["student_features"], stored["teacher_features"]
    maps = CASES[name][0](student.reshape(12, 3, 2), teacher.reshape(12, 3, 3, 1))
    np.testing.assert_allclose(maps, CASES[name][0](student, teacher), rtol=1e-6)
    half, other = jnp.asarray(student, jnp.bfloat16), jnp.asarray(teacher, jnp.bfloat16)
    expected = CASES[name][0](half.astype(jnp.float32), other.astype(jnp.float32))
    np.testing.assert_allclose(CASES[name][0](half, other), expected, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_weights_of_zero_drop_examples_whatever_they_hold(stored, name):
    keep = np.arange(12) % 3 > 0
    dirty = [np.where(keep[:, None], stored[f"{who}_features"], np.nan) for who in ("student", "teacher")]
    weighted = jax.jit(jax.value_and_grad(partial(CASES[name][0], weight=keep.astype(np.float32))))
    value, gradient = weighted(*dirty)
    kept = [part[keep] for part in dirty]
    expected = jax.jit(jax.value_and_grad(CASES[name][0]))(*kept)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient[keep], expected[1], rtol=1e-4, atol=1e-5 * np.abs(expected[1]).max())
    assert not np.any(gradient[~keep])


@pytest.mark.parametrize("name", CASES)
def test_a_weight_of_two_counts_an_example_twice(stored, name):
    student, teacher, twice = stored["student_features"], stored["teacher_features"], np.r_[np.arange(12), 0, 5]
    weight = jnp.ones(12).at[jnp.array([0, 5])].set(2.0)
    expected = CASES[name][0](student[twice], teacher[twice])
    np.testing.assert_allclose(CASES[name][0](student, teacher, weight=weight), expected, rtol=1e-5)
    assert float(CASES[name][0](student, teacher, weight=jnp.zeros(12))) == 0


@pytest.mark.parametrize("name", NAMES)
def test_losses_run_under_vmap(stored, name):
    student, teacher = stored["student_features"].reshape(3, 4, 6), stored["teacher_features"].reshape(3, 4, 9)
    expected = [CASES[name][0](*parts) for parts in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(jax.vmap(CASES[name][0])(student, teacher), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_distances_and_angles_keep_their_digits_far_from_the_origin(name):
    rng = np.random.default_rng(2)
    student, teacher = (np.round(rng.normal(size=(6, width)) * 64).astype(np.float32) for width in (3, 5))
    near, far = CASES[name][0](student, teacher), CASES[name][0](student + 65536, teacher + 65536)
    np.testing.assert_allclose(near, far, rtol=1e-4)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_memory_does_not_grow_with_pairs_times_width(name):
    features = jax.ShapeDtypeStruct((64, 2048), jnp.float32)
    compiled = jax.jit(jax.grad(CASES[name][0])).lower(features, features).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 64 * 64 * 2048 / 8


FOUR = np.zeros((4, 2), np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_features_must_be_of_the_same_examples(name):
    for other in (FOUR[:3], FOUR[0], FOUR[:, :0]):
        with pytest.raises(
            tj.DataError, match=rf"{name}\(\) got features \(4, 2\) float32 of the student and \(.* of the teacher. Exp"
        ):
            CASES[name][0](FOUR, other)
    with pytest.raises(tj.DataError, match=r"Expected \[N, ...\] of both, of the same examples in one order, none emp"):
        CASES[name][0](FOUR[:0], FOUR[:0])
    with pytest.raises(tj.DataError, match=rf"{name}\(\) got weight \(3,\) float64. Expected one per example, \(4,\)"):
        CASES[name][0](FOUR, FOUR, weight=np.ones(3))


@pytest.mark.parametrize("norm", [0, 3, True, "2"])
def test_similarity_preserving_wants_one_of_two_norms(norm):
    with pytest.raises(tj.TransferError, match=r"similarity_preserving\(\) expects norm 2 or 1, got"):
        losses.similarity_preserving(FOUR, FOUR, norm=norm)


def test_correlation_congruence_wants_a_kernel_and_an_order():
    with pytest.raises(tj.TransferError, match=r"correlation_congruence\(\) expects kernel 'gaussian' or 'bilinear'"):
        losses.correlation_congruence(FOUR, FOUR, kernel="rbf")
    for order in (0, 2.0):
        with pytest.raises(
            tj.TransferError, match=r"correlation_congruence\(\) expects order, a whole number of at least"
        ):
            losses.correlation_congruence(FOUR, FOUR, order=order)
