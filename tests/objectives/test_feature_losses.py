"""Losses between features of student and teacher, against torchdistill (tests/fixtures/distill_features)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.objectives import losses

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "distill_features" / "distill_features.npz"
RNG = np.random.default_rng(0)
MAP, OTHER_MAP = (jnp.asarray(RNG.normal(size=(5, 3, 3, 4)), jnp.float32) for _ in range(2))
ROWS, OTHER_ROWS = (jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32) for _ in range(2))
WEIGHT = jnp.array([1.0, 0.0, 2.0, 0.0, 0.5])
KEPT = np.array([0, 2, 4])


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(FIXTURE))


PEERS = {
    "hint": ("student_map", lambda x: losses.hint(x["student_map"], x["teacher_map"])),
    "attention_transfer": (
        "student_map",
        lambda x: losses.attention_transfer(x["student_map"], x["teacher_map"]),
    ),
    "attention_transfer_wide": (
        "student_map",
        lambda x: losses.attention_transfer(x["student_map"], x["wide_map"]),
    ),
    "vid": ("student_map", lambda x: losses.vid(x["student_map"], x["teacher_map"], x["raw_variance"])),
    "srd": ("student", lambda x: losses.srd(x["student"], x["teacher"])),
    "srd_1": ("student", lambda x: losses.srd(x["student"], x["teacher"], exponent=1.0)),
}


@pytest.mark.parametrize("name", PEERS)
def test_values_and_gradients_are_the_peers(stored, name):
    student, loss = PEERS[name]
    x = {key: jnp.asarray(array) for key, array in stored.items() if array.dtype == np.float32}
    value, gradients = jax.jit(jax.value_and_grad(loss))(x)
    np.testing.assert_allclose(value, stored[name], rtol=1e-5)
    expected = stored[f"{name}/{student}"]
    np.testing.assert_allclose(gradients[student], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_variances_of_vid_learn_as_the_peers(stored):
    x = {name: jnp.asarray(stored[name]) for name in ("student_map", "teacher_map", "raw_variance")}
    gradient = jax.grad(lambda raw: losses.vid(x["student_map"], x["teacher_map"], raw))(x["raw_variance"])
    np.testing.assert_allclose(gradient, stored["vid/raw_variance"], rtol=1e-5)


def test_where_the_papers_code_starts_the_variance_is_five():
    value = losses.vid(ROWS, ROWS, jnp.full(4, 4.9932394))
    np.testing.assert_allclose(value, 0.5 * np.log(5), rtol=1e-5)


def contrast(student, teacher, temperature, negatives=None):
    """InfoNCE both ways in float64."""
    student, teacher = (np.asarray(part, np.float64) for part in (student, teacher))
    student, teacher = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (student, teacher))
    bank = np.zeros((0, student.shape[1])) if negatives is None else np.asarray(negatives, np.float64)
    bank = bank / np.maximum(np.linalg.norm(bank, axis=1, keepdims=True), 1e-30)
    total = 0.0
    for i in range(len(student)):
        among = np.exp(np.concatenate([teacher, bank]) @ student[i] / temperature)
        back = np.exp(student @ teacher[i] / temperature)
        total -= 0.5 * (np.log(among[i] / among.sum()) + np.log(back[i] / back.sum()))
    return total / len(student)


def slopes(function, x, step=1e-6):
    """Central differences in float64."""
    x = np.asarray(x, np.float64)
    found = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[index] = step
        found[index] = (function(x + moved) - function(x - moved)) / (2 * step)
    return found


@pytest.mark.parametrize("negatives", [None, np.random.default_rng(3).normal(size=(7, 4))], ids=["batch", "bank"])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_crd_is_info_nce_both_ways(temperature, negatives):
    loss = lambda x: losses.crd(x, OTHER_ROWS, temperature, negatives=negatives)
    value, gradient = jax.value_and_grad(loss)(ROWS)
    np.testing.assert_allclose(value, contrast(ROWS, OTHER_ROWS, temperature, negatives), rtol=1e-5)
    expected = slopes(lambda x: contrast(x, OTHER_ROWS, temperature, negatives), ROWS)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_temperature_of_crd_may_learn():
    drop = (WEIGHT > 0).astype(jnp.float32)
    slope = jax.grad(lambda t: losses.crd(ROWS, OTHER_ROWS, t, weight=drop))(0.5)
    expected = slopes(lambda t: contrast(ROWS[KEPT], OTHER_ROWS[KEPT], float(t)), 0.5)
    np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_srd_of_maps_standardises_over_positions():
    flat = losses.srd(MAP.reshape(45, 4), OTHER_MAP.reshape(45, 4))
    np.testing.assert_allclose(losses.srd(MAP, OTHER_MAP), flat, rtol=1e-6)


VARIANCE = jnp.linspace(-1.0, 1.0, 4)
LOSSES = {
    "hint": (losses.hint, MAP, OTHER_MAP),
    "attention_transfer": (losses.attention_transfer, MAP, OTHER_MAP),
    "vid": (lambda s, t, **options: losses.vid(s, t, VARIANCE, **options), MAP, OTHER_MAP),
    "crd": (losses.crd, ROWS, OTHER_ROWS),
    "srd": (losses.srd, ROWS, OTHER_ROWS),
    "srd_1": (lambda s, t, **options: losses.srd(s, t, exponent=1.0, **options), ROWS, OTHER_ROWS),
    "srd_half": (lambda s, t, **options: losses.srd(s, t, exponent=0.5, **options), ROWS, OTHER_ROWS),
}
every = pytest.mark.parametrize("name", LOSSES)


@every
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4], ids=["zeros", "equal", "large"])
def test_at_equality_the_gradient_is_finite(name, scale):
    loss, student, _ = LOSSES[name]
    value, gradient = jax.value_and_grad(loss)(scale * student, scale * student)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if name in ("hint", "attention_transfer"):
        assert value == 0 and not gradient.any()
    if name.startswith("srd"):
        np.testing.assert_allclose(value, np.log(1e-12), rtol=1e-6)
        assert not gradient.any()


@every
def test_zeros_of_the_student_alone_have_a_finite_gradient(name):
    loss, student, teacher = LOSSES[name]
    assert np.isfinite(jax.grad(loss)(0 * student, teacher)).all()
    assert np.isfinite(jax.grad(loss)(student, 0 * teacher)).all()


@every
def test_no_gradient_flows_to_the_teacher(name):
    loss, student, teacher = LOSSES[name]
    own, other = jax.grad(loss, argnums=(0, 1))(student, teacher)
    assert own.any() and not other.any()


def test_no_gradient_flows_to_negatives():
    assert not jax.grad(lambda bank: losses.crd(ROWS, OTHER_ROWS, negatives=bank))(OTHER_ROWS + 1).any()


@every
def test_a_weight_of_zero_drops_the_example_whatever_it_holds(name):
    loss, student, teacher = LOSSES[name]
    holes = jnp.where(WEIGHT.reshape(-1, *(1,) * (student.ndim - 1)) > 0, 0.0, jnp.nan)
    drop = (WEIGHT > 0).astype(jnp.float32)
    value, gradient = jax.jit(jax.value_and_grad(loss))(student + holes, teacher + holes, weight=drop)
    expected, slope = jax.value_and_grad(loss)(student[KEPT], teacher[KEPT])
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    np.testing.assert_allclose(gradient[KEPT], slope, rtol=1e-4, atol=1e-6 * np.abs(slope).max())
    assert not gradient[jnp.array([1, 3])].any()


@pytest.mark.parametrize("name", ["hint", "attention_transfer", "vid"])
def test_the_mean_is_weighted(name):
    loss, student, teacher = LOSSES[name]
    each = np.array([loss(student[i : i + 1], teacher[i : i + 1]) for i in range(5)])
    expected = (each * WEIGHT).sum() / WEIGHT.sum()
    np.testing.assert_allclose(loss(student, teacher, weight=WEIGHT), expected, rtol=1e-5)
    assert loss(student, teacher, weight=jnp.zeros(5)) == 0.0


def test_a_weight_of_two_counts_as_two_examples_in_srd():
    twice = jnp.array([0, 0, 1, 2])
    one = losses.srd(ROWS[:3], OTHER_ROWS[:3], weight=jnp.array([2.0, 1.0, 1.0]))
    np.testing.assert_allclose(one, losses.srd(ROWS[twice], OTHER_ROWS[twice]), rtol=1e-5)


@every
def test_half_precision_is_computed_in_float32(name):
    loss, student, teacher = LOSSES[name]
    student, teacher = student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)
    value, gradient = jax.value_and_grad(loss)(student, teacher)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    expected = loss(student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


PAIRS = {
    name: LOSSES[name][0] if name == "vid" else getattr(losses, name)
    for name in ("hint", "attention_transfer", "vid", "crd", "srd")
}


@pytest.mark.parametrize("name", ["hint", "vid", "crd", "srd"])
def test_unlike_widths_need_a_projector(name):
    message = (
        rf"{name}\(\) got \(8, 16\) float32 of the student and \(8, 64\) float32 of the teacher: add a projector: "
        r"auxiliary weights of tj.extend that map \(..., 16\) to \(..., 64\), e.g. tj.extend\(model, \"projector\", "
        r"tj.objectives.projector\(16, 64\), key=key\) and tj.objectives.distill\(..., project=\"projector\"\)"
    )
    with pytest.raises(tj.DataError, match=message):
        PAIRS[name](jnp.ones((8, 16)), jnp.ones((8, 64)))


@pytest.mark.parametrize("name", PAIRS)
def test_unlike_positions_need_layers_of_one_size(name):
    with pytest.raises(tj.DataError, match=r"Expected one row per example and the same positions: choose layers of"):
        PAIRS[name](jnp.ones((2, 4, 4, 4)), jnp.ones((2, 8, 8, 4)))


def test_features_are_rows_of_examples():
    with pytest.raises(tj.DataError, match=r"hint\(\) got \(4,\) float32 of the student .* Expected features \[B,"):
        losses.hint(jnp.ones(4), jnp.ones(4))
    with pytest.raises(tj.DataError, match=r"of both, none empty"):
        losses.hint(jnp.ones((0, 4)), jnp.ones((0, 4)))


def test_attention_needs_maps():
    with pytest.raises(tj.DataError, match=r"attention_transfer\(\) got \(5, 4\) float32 .* Expected maps \[B, h, w"):
        losses.attention_transfer(ROWS, MAP)


@pytest.mark.parametrize("name", PAIRS)
def test_there_is_one_weight_per_example(name):
    with pytest.raises(tj.DataError, match=rf"{name}\(\) got weight \(3,\) float32. Expected one per example, \(5,\)"):
        PAIRS[name](MAP, OTHER_MAP, weight=jnp.ones(3))


def test_vid_needs_one_variance_per_channel():
    with pytest.raises(tj.DataError, match=r"vid\(\) got raw_variance \(3,\) float32 for features of width 4. Expect"):
        losses.vid(ROWS, ROWS, jnp.ones(3))


def test_crd_needs_embeddings():
    with pytest.raises(tj.DataError, match=r"crd\(\) got embeddings \(5, 3, 3, 4\). Expected \[B, d\]: pool maps"):
        losses.crd(MAP, OTHER_MAP)
    with pytest.raises(tj.DataError, match=r"crd\(\) got negatives \(7, 3\) float32. Expected \[M, 4\], as wide as"):
        losses.crd(ROWS, OTHER_ROWS, negatives=jnp.ones((7, 3)))
