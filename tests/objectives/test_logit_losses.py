"""Distillation losses of logits against their peers (tests/fixtures/distill_logits) and their formulas."""

import dataclasses
import functools
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


def dkd_of(labels, *arguments):
    return lambda student, teacher, weight=None: losses.dkd(student, teacher, labels, *arguments, weight=weight)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(student, teacher):
    return np.sum(teacher * (np.log(teacher) - np.log(student)), -1)


def kd(s, t, labels, temperature=4.0):
    return temperature**2 * divergence(softmax(s / temperature), softmax(t / temperature)).mean()


def dkd(s, t, labels, alpha=1.0, beta=8.0, temperature=4.0):
    value = 0.0
    for own, other, label in zip(s, t, labels, strict=True):
        p, q = softmax(own / temperature), softmax(other / temperature)
        either = [np.array([part[label], 1 - part[label]]) for part in (p, q)]
        others = [np.delete(part, label) / (1 - part[label]) for part in (p, q)]
        value += alpha * divergence(*either) + beta * divergence(*others)
    return temperature**2 * value / len(s)


def dist(s, t, labels, beta=1.0, gamma=1.0, temperature=1.0):
    p, q = softmax(s / temperature), softmax(t / temperature)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return temperature**2 * (beta * inter + gamma * intra)


def standardised(s, t, labels, temperature=2.0):
    s, t = ((x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-7) for x in (s, t))
    return kd(s, t, labels, temperature)


def hard(s, t, labels):
    return -np.log(softmax(s)[np.arange(len(s)), t.argmax(-1)]).mean()


# Each with the arguments of one entry of the fixture, and its formula in float64.
CASES = {
    "kd": (lambda y: losses.kd, kd),
    "kd_1": (lambda y: partial(losses.kd, temperature=1.0), partial(kd, temperature=1.0)),
    "dkd": (dkd_of, dkd),
    "dkd_2": (lambda y: dkd_of(y, 0.5, 3.0, 2.0), partial(dkd, alpha=0.5, beta=3.0, temperature=2.0)),
    "dist": (lambda y: losses.dist, dist),
    "dist_4": (
        lambda y: partial(losses.dist, beta=2.0, gamma=0.5, temperature=4.0),
        partial(dist, beta=2.0, gamma=0.5, temperature=4.0),
    ),
    "logit_standardised_kd": (lambda y: losses.logit_standardised_kd, standardised),
    "hard": (lambda y: losses.hard, hard),
}
NAMES = ["kd", "dkd", "dist", "logit_standardised_kd", "hard"]
MATCHING = NAMES[:-1]  # 0 where student and teacher agree


def made(name, labels):
    return CASES[name][0](jnp.asarray(labels))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_peers(stored, name):
    loss, student, teacher = made(name, stored["labels"]), stored["student_logits"], stored["teacher_logits"]
    value, gradient = jax.jit(jax.value_and_grad(loss))(student, teacher)
    assert value.dtype == jnp.float32 and value.shape == ()
    np.testing.assert_allclose(value, stored[name], rtol=1e-5)
    expected = stored[f"{name}/gradient"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_formulas(name):
    rng = np.random.default_rng(3)
    student, teacher = (3 * rng.normal(size=(9, 5)).astype(np.float32) for _ in range(2))
    labels = rng.integers(5, size=9)
    expected = CASES[name][1](student.astype(np.float64), teacher.astype(np.float64), labels)
    np.testing.assert_allclose(made(name, labels)(student, teacher), expected, rtol=1e-5)


@pytest.mark.parametrize("name", MATCHING)
def test_equal_logits_have_no_loss_and_no_gradient(stored, name):
    logits = stored["student_logits"]
    value, gradient = jax.jit(jax.value_and_grad(made(name, stored["labels"])))(logits, logits)
    np.testing.assert_allclose(value, 0, atol=2e-6)
    np.testing.assert_allclose(gradient, 0, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_to_the_teacher(stored, name):
    loss = made(name, stored["labels"])
    gradient = jax.grad(loss, argnums=1)(stored["student_logits"], stored["teacher_logits"])
    assert not np.any(gradient)
    both = jax.grad(lambda x: loss(2 * x, x))(stored["student_logits"])  # where they share what they depend on
    alone = jax.grad(loss)(2 * stored["student_logits"], stored["student_logits"])
    np.testing.assert_allclose(both, 2 * alone, rtol=1e-5, atol=1e-7)


INPUTS = {
    "zeros": np.zeros((4, 3)),
    "alike": np.ones((4, 3)),
    "large": 1e4 * np.array([[1, -1, 0], [-1, 1, 0], [0, 0, 1], [1, 1, 1]]),
    "duplicates": np.array([[1, 2, 3.0]] * 4),
    "one example": np.array([[1, 2, 3.0]]),
}


@functools.cache
def compiled(name, rows):
    return jax.jit(jax.value_and_grad(made(name, np.arange(rows) % 3)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("student, dtype", [*((key, jnp.float32) for key in INPUTS), ("large", jnp.bfloat16)])
def test_values_and_gradients_are_finite_everywhere(name, student, dtype):
    x = jnp.asarray(INPUTS[student], dtype)
    loss = compiled(name, len(x))
    for teacher in (x, -x, jnp.roll(x, 1, axis=1), jnp.zeros_like(x)):
        value, gradient = loss(x, teacher)
        assert value.dtype == jnp.float32 and gradient.dtype == dtype
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits_are_compared_in_float32(stored, name):
    student, teacher = (jnp.asarray(stored[f"{who}_logits"], jnp.bfloat16) for who in ("student", "teacher"))
    loss = made(name, stored["labels"])
    expected = loss(student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_allclose(loss(student, teacher), expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_zero_drop_examples_whatever_they_hold(stored, name):
    keep = np.arange(12) % 3 > 0
    weight = jnp.asarray(keep, jnp.float32)
    dirty = lambda x: jnp.asarray(np.where(keep[:, None], x, np.nan))
    labels = np.where(keep, stored["labels"], -7)
    weighted = jax.jit(jax.value_and_grad(partial(made(name, labels), weight=weight)))
    value, gradient = weighted(dirty(stored["student_logits"]), dirty(stored["teacher_logits"]))
    kept = jax.jit(jax.value_and_grad(made(name, labels[keep])))
    expected = kept(stored["student_logits"][keep], stored["teacher_logits"][keep])
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient[keep], expected[1], rtol=1e-4, atol=1e-6)
    assert not np.any(gradient[~keep])


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_two_counts_an_example_twice(stored, name):
    twice = np.r_[np.arange(12), 0, 5]
    weight = jnp.ones(12).at[jnp.array([0, 5])].set(2.0)
    student, teacher = stored["student_logits"], stored["teacher_logits"]
    expected = made(name, stored["labels"][twice])(student[twice], teacher[twice])
    value = made(name, stored["labels"])(student, teacher, weight=weight)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert float(made(name, stored["labels"])(student, teacher, weight=jnp.zeros(12))) == 0


@pytest.mark.parametrize("name", NAMES)
def test_positions_of_sequences_count_as_examples_and_a_mask_drops_them(stored, name):
    student, teacher = (stored[f"{who}_logits"].reshape(3, 4, 10) for who in ("student", "teacher"))
    labels = stored["labels"].reshape(3, 4)
    flat = made(name, stored["labels"])(stored["student_logits"], stored["teacher_logits"])
    np.testing.assert_allclose(made(name, labels)(student, teacher), flat, rtol=1e-5)
    mask = np.arange(4) < np.array([4, 2, 3])[:, None]
    expected = made(name, labels[mask])(student[mask], teacher[mask])
    np.testing.assert_allclose(made(name, labels)(student, teacher, weight=mask), expected, rtol=1e-5)
    examples = np.array([1.0, 0.0, 1.0])  # of which each has all its positions
    expected = made(name, labels[[0, 2]])(student[[0, 2]], teacher[[0, 2]])
    np.testing.assert_allclose(made(name, labels)(student, teacher, weight=examples), expected, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_losses_run_under_vmap(stored, name):
    student, teacher = (stored[f"{who}_logits"].reshape(3, 4, 10) for who in ("student", "teacher"))
    labels = jnp.asarray(stored["labels"].reshape(3, 4))
    of = lambda s, t, y: CASES[name][0](y)(s, t)
    expected = [of(*parts) for parts in zip(student, teacher, labels, strict=True)]
    np.testing.assert_allclose(jax.vmap(of)(student, teacher, labels), expected, rtol=1e-5)


def test_dkd_with_the_weights_of_kd_is_kd():
    student, teacher, labels = jnp.array([[0.5, 2.0, -1.0]]), jnp.array([[1.0, 0.2, 0.4]]), jnp.array([1])
    others = 1 - jax.nn.softmax(teacher / 3)[0, 1]
    value = losses.dkd(student, teacher, labels, 1.0, others, 3.0)
    np.testing.assert_allclose(value, losses.kd(student, teacher, 3.0), rtol=1e-5)


def test_classes_that_the_teacher_holds_impossible_count_nothing():
    student, teacher = jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([[1.0, 0.0, -jnp.inf]])
    value, gradient = jax.value_and_grad(losses.kd)(student, teacher)
    np.testing.assert_allclose(value, losses.kd(student[:, :2], teacher[:, :2]), rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_hidden(stored, name):
    teacher = stored["teacher_logits"].copy()
    teacher[3, 4] = np.nan
    assert np.isnan(made(name, stored["labels"])(stored["student_logits"], teacher))
    assert np.isnan(made(name, stored["labels"])(teacher, stored["teacher_logits"]))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_all_of_the_largest_logits_are_the_logits(stored, temperature):
    student, teacher = stored["student_logits"], stored["teacher_logits"]
    top = losses.top_k(teacher, 10, temperature)
    assert np.all(np.asarray(top.rest) == -np.inf)
    value, gradient = jax.jit(jax.value_and_grad(losses.kd))(student, top, temperature)
    expected = jax.value_and_grad(losses.kd)(student, teacher, temperature)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(12, 10), (3, 4, 10)])
def test_the_largest_logits_leave_one_outcome_for_all_others(stored, shape):
    student, teacher = (stored[f"{who}_logits"].reshape(shape) for who in ("student", "teacher"))
    top = losses.top_k(teacher, 3, 2.0)
    assert top.indices.dtype == jnp.int32 and top.values.shape == (*shape[:-1], 3) and top.rest.shape == shape[:-1]
    order = np.argsort(-teacher, -1)
    np.testing.assert_array_equal(top.indices, order[..., :3])
    outcomes = []
    for logits in (student, teacher):
        p = np.take_along_axis(softmax(logits.astype(np.float64) / 2), order, -1)
        outcomes.append(np.concatenate([p[..., :3], p[..., 3:].sum(-1, keepdims=True)], -1))
    value = losses.kd(student, top, 2.0)
    np.testing.assert_allclose(value, 4 * divergence(*outcomes).mean(), rtol=1e-5)
    assert value < losses.kd(student, teacher, 2.0)
    np.testing.assert_allclose(losses.kd(teacher, top, 2.0), 0, atol=1e-6)


def test_the_largest_logits_are_masked_like_others_and_take_vmap(stored):
    student, teacher = stored["student_logits"], stored["teacher_logits"]
    top, keep = losses.top_k(teacher, 3), np.arange(12) > 3
    expected = losses.kd(student[keep], jax.tree.map(lambda x: x[keep], top))
    dirty = losses.TopK(
        np.where(keep[:, None], top.values, np.nan),
        np.where(keep[:, None], top.indices, -9),
        np.where(keep, top.rest, np.nan),
    )
    value, gradient = jax.value_and_grad(partial(losses.kd, weight=keep))(student, dirty)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.isfinite(gradient).all() and not np.any(gradient[~keep])
    each = jax.vmap(losses.kd)(student, top)
    np.testing.assert_allclose(np.mean(each), losses.kd(student, top), rtol=1e-5)


def test_classes_outside_the_students_are_nan(stored):
    student, teacher = stored["student_logits"][:, :5], stored["teacher_logits"]
    assert np.isnan(losses.kd(student, losses.top_k(teacher, 3)))
    assert np.isnan(losses.dkd(student, student, np.full(12, 5)))
    assert np.isnan(losses.dkd(student, student, np.full(12, -1)))


def test_impossible_others_have_finite_gradients():
    student, teacher = jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([[1.0, 0.0, -jnp.inf]])
    value, gradient = jax.value_and_grad(losses.kd)(student, losses.top_k(teacher, 2))
    np.testing.assert_allclose(value, losses.kd(student[:, :2], teacher[:, :2]), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_a_head_of_zeros_gets_no_gradient_from_what_it_cannot_correlate_with(stored):
    for loss in (losses.dist, losses.logit_standardised_kd):
        for constant in (0.0, 0.3, 1e3):
            gradient = jax.grad(loss)(jnp.full((12, 10), constant), stored["teacher_logits"])
            assert not np.any(gradient)


X = np.zeros((4, 3), np.float32)
CALLS = {
    "kd": losses.kd,
    "dkd": lambda s, t, **more: losses.dkd(s, t, np.zeros(4, np.int32), **more),
    "dist": losses.dist,
    "logit_standardised_kd": losses.logit_standardised_kd,
    "hard": losses.hard,
}


@pytest.mark.parametrize("name", CALLS)
def test_student_and_teacher_must_fit(name):
    with pytest.raises(
        tj.DataError, match=rf"{name}\(\) got logits of 3 classes of the student and 5 of the teacher. Expected the "
    ):
        CALLS[name](X, np.zeros((4, 5)))
    named = "hint, attention_transfer, rkd_distance, rkd_angle, similarity_preserving, correlation_congruence, pkt, vid"
    with pytest.raises(tj.DataError, match=f"Losses of features work with a teacher of other classes: {named} and crd"):
        CALLS[name](X, np.zeros((4, 5)))
    for one, other in ((X, X[:2]), (X[:, :1], X[:, :1]), (X[:0], X[:0]), (X, X[0]), (np.float32(1), np.float32(1))):
        with pytest.raises(
            tj.DataError, match=rf"{name}\(\) got logits \(.* of the teacher. Expected \[..., C\] of both, of one shape"
        ):
            CALLS[name](one, other)
    for weight in (np.ones(3), np.ones((4, 3)), np.float32(2)):
        with pytest.raises(tj.DataError, match=rf"{name}\(\) got weight \(.*. Expected one per example, \(4,\)."):
            CALLS[name](X, X, weight=weight)


def test_the_losses_that_the_message_names_are_there():
    with pytest.raises(tj.DataError) as raised:
        losses.kd(X, np.zeros((4, 5)))
    listed = str(raised.value).split("other classes: ")[1].split(", on the same")[0].replace(" and ", ", ")
    assert len(listed.split(", ")) == 9 and all(callable(getattr(losses, name)) for name in listed.split(", "))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "logit_standardised_kd", "top_k"])
def test_temperatures_are_positive(name, temperature):
    call = CALLS[name] if name in CALLS else lambda s, t, temperature: losses.top_k(s, 2, temperature)
    with pytest.raises(tj.TransferError, match=rf"{name}\(\) expects a temperature above 0, got {temperature!r}."):
        call(X, X, temperature=temperature)


def test_temperatures_may_be_arrays(stored):
    student, teacher = stored["student_logits"], stored["teacher_logits"]
    value = jax.jit(losses.kd)(student, teacher, jnp.float32(4.0))
    np.testing.assert_allclose(value, losses.kd(student, teacher), rtol=1e-6)


@pytest.mark.parametrize("labels", [np.zeros(4), np.zeros(3, np.int32), np.zeros((4, 3), np.int32)])
def test_labels_of_dkd_are_one_integer_per_example(labels):
    with pytest.raises(tj.DataError, match=r"dkd\(\) got labels \(.* for logits \(4, 3\) float32. Expected integers"):
        losses.dkd(X, X, labels)


@pytest.mark.parametrize("k", [0, 4, 1.0, True])
def test_top_k_wants_a_number_of_classes(k):
    with pytest.raises(tj.TransferError, match=r"top_k\(\) expects k from 1 to 3, the number of classes, got"):
        losses.top_k(X, k, 4.0)


def test_top_k_wants_logits():
    for logits in (np.float32(1), X[:, :1]):
        with pytest.raises(tj.DataError, match=r"top_k\(\) got logits \(.*. Expected \[..., C\] of two classes or"):
            losses.top_k(logits, 1, 4.0)


def test_the_largest_logits_must_fit_the_student():
    top = losses.top_k(X, 3, 4.0)
    for name, loss in CALLS.items():
        if name != "kd":
            with pytest.raises(tj.DataError, match=rf"{name}\(\) got a TopK of the teacher's logits. Expected all of"):
                loss(X, top)
    for student in (X[:2], X[:, :2], X[0], np.float32(1)):
        with pytest.raises(
            tj.DataError, match=r"kd\(\) got student logits .* and a TopK of 3 classes with leading axes \(4,\)"
        ):
            losses.kd(student, top)
    for strange in (
        dataclasses.replace(top, values=X[:, :2]),
        dataclasses.replace(top, rest=X),
        dataclasses.replace(top, indices=top.indices[0]),
    ):
        with pytest.raises(
            tj.DataError, match=r"kd\(\) got a TopK of values \(.*, indices \(.*, rest \(.*. Expected \[..., k\], \["
        ):
            losses.kd(X, strange)
    with pytest.raises(tj.DataError, match=r"kd\(\) got weight \(3,\) float64. Expected one per example, \(4,\)."):
        losses.kd(X, top, weight=np.ones(3))
