"""Losses of domain alignment against the Transfer-Learning-Library (tests/fixtures/alignment) and their formulas."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.objectives import losses

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "alignment" / "alignment.npz"
INPUTS = (
    "source", "target", "source_logits", "target_logits", "source_adversary", "target_adversary", "kernel",
    "wide_kernel",
)  # fmt: skip
COUNT = 12
DIAGONAL = 2 / (COUNT - 1)  # which the peer adds to every discrepancy


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(FIXTURE))


def joint(x, linear):
    soft = [jax.nn.softmax(x[name]) for name in ("source_logits", "target_logits")]
    return losses.jmmd((x["source"], soft[0]), (x["target"], soft[1]), sigmas=(None, 0.92), linear=linear) + DIAGONAL


def conditional(x, conditioning):
    return losses.cdan(
        lambda f: f @ x["wide_kernel"],
        x["source"],
        x["target"],
        x["source_logits"],
        x["target_logits"],
        coefficient=losses.reversal(0.3),
        entropy_conditioning=conditioning,
    )


LOSSES = {
    "coral_means": lambda x: losses.coral(x["source"], x["target"], means=True),
    "mk_mmd": lambda x: losses.mk_mmd(x["source"], x["target"]) + DIAGONAL,
    "mk_mmd_linear": lambda x: losses.mk_mmd(x["source"], x["target"], linear=True) + DIAGONAL,
    "jmmd": lambda x: joint(x, False),
    "jmmd_linear": lambda x: joint(x, True),
    "bsp": lambda x: losses.bsp(x["source"], x["target"]),
    "afn": lambda x: losses.afn(x["source"], x["target"], delta=0.7),
    "mcc": lambda x: losses.mcc(x["target_logits"]),
    "entropy": lambda x: losses.entropy(x["target_logits"]),
    "mdd": lambda x: losses.mdd(
        x["source_logits"], x["source_adversary"], x["target_logits"], x["target_adversary"], margin=4.0
    ),
    "dann": lambda x: losses.dann(
        lambda f: f @ x["kernel"], x["source"], x["target"], coefficient=losses.reversal(0.3)
    ),
    "cdan": lambda x: conditional(x, False),
    "cdan_entropy": lambda x: conditional(x, True),
}
SLACK = {"entropy": 3e-5}  # the peer takes log(p + 1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_the_peers(stored, name):
    x = {key: jnp.asarray(stored[key]) for key in INPUTS}
    value, gradients = jax.jit(jax.value_and_grad(LOSSES[name]))(x)
    np.testing.assert_allclose(value, stored[name], rtol=2e-5, atol=SLACK.get(name, 2e-5))
    touched = [key for key in INPUTS if f"{name}/{key}" in stored]
    assert touched
    for key in INPUTS:
        expected = stored.get(f"{name}/{key}", np.zeros_like(stored[key]))
        np.testing.assert_allclose(gradients[key], expected, rtol=1e-4, atol=1e-4, err_msg=key)


def test_coral_is_the_papers(stored):
    covariances = [np.cov(stored[name].astype(np.float64), rowvar=False) for name in ("source", "target")]
    expected = np.sum((covariances[0] - covariances[1]) ** 2) / (4 * 6**2)
    np.testing.assert_allclose(losses.coral(stored["source"], stored["target"]), expected, rtol=2e-5)
    shifted = losses.coral(stored["source"] + 100, stored["target"])
    np.testing.assert_allclose(shifted, expected, rtol=1e-3)  # the means do not count


def test_mk_mmd_of_unlike_numbers_is_the_unbiased_estimate():
    rng = np.random.default_rng(1)
    source, target = rng.normal(size=(5, 3)), rng.normal(size=(7, 3)) + 1
    both = np.concatenate([source, target])
    distance = ((both[:, None] - both[None]) ** 2).sum(-1)
    kernel = sum(np.exp(-distance / (2 * 2.0**k * distance.mean())) for k in range(-3, 2))
    np.fill_diagonal(kernel, 0)
    expected = kernel[:5, :5].sum() / 20 + kernel[5:, 5:].sum() / 42 - 2 * kernel[:5, 5:].mean()
    np.testing.assert_allclose(losses.mk_mmd(source, target), expected, rtol=2e-5, atol=2e-6)


def test_mk_mmd_keeps_its_digits_far_from_the_origin():
    rng = np.random.default_rng(2)
    source, target = (rng.normal(size=(6, 3)).astype(np.float32) + shift for shift in (0.0, 1.0))
    near, far = losses.mk_mmd(source, target), losses.mk_mmd(source + 1000, target + 1000)
    np.testing.assert_allclose(near, far, rtol=2e-3)


def test_information_maximisation_is_its_formula(stored):
    logits = stored["target_logits"].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -(p * np.log(p)).sum(1).mean() + (p.mean(0) * np.log(p.mean(0))).sum()
    np.testing.assert_allclose(losses.information_maximisation(stored["target_logits"]), expected, rtol=2e-5)


def test_bsp_sums_the_largest_squared_singular_values(stored):
    values = [np.linalg.svd(stored[name], compute_uv=False)[:3] for name in ("source", "target")]
    expected = sum((part.astype(np.float64) ** 2).sum() for part in values)
    np.testing.assert_allclose(losses.bsp(stored["source"], stored["target"], k=3), expected, rtol=2e-5)
    wide = losses.bsp(stored["source"].T, stored["target"].T, k=3)
    np.testing.assert_allclose(wide, expected, rtol=2e-5)


@pytest.mark.parametrize("k", [0, 7, 1.0])
def test_bsp_wants_a_number_of_singular_values(k):
    with pytest.raises(tj.TransferError, match=r"bsp\(\) expects k from 1 to 6, the number of singular values, got"):
        losses.bsp(jnp.ones((8, 6)), jnp.ones((8, 6)), k=k)


HARD = {
    "coral": lambda x: losses.coral(x, x),
    "mk_mmd": lambda x: losses.mk_mmd(x, x),
    "jmmd": lambda x: losses.jmmd((x, x), (x, x)),
    "bsp": lambda x: losses.bsp(x, x, k=2),
    "afn": lambda x: losses.afn(x, x),
    "entropy": losses.entropy,
    "information_maximisation": losses.information_maximisation,
    "mcc": losses.mcc,
    "mdd": lambda x: losses.mdd(x, x, x, x),
    "dann": lambda x: losses.dann(lambda f: f.sum(1), x, x),
    "cdan": lambda x: losses.cdan(lambda f: f.sum(1), x, x, x, x, entropy_conditioning=True),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("x", [np.zeros((4, 3)), np.ones((4, 3)), 1e4 * np.eye(4, 3)], ids=["zeros", "alike", "large"])
def test_values_and_gradients_are_finite_everywhere(name, x):
    value, gradient = jax.value_and_grad(HARD[name])(jnp.asarray(x, jnp.float32))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_the_gradient_is_reversed_and_the_value_kept():
    squares = lambda x, coefficient: jnp.sum(losses.reverse_gradient(x, coefficient) ** 2)
    for p in (0.0, 0.2, 1.0):
        coefficient = losses.reversal(p)
        np.testing.assert_allclose(coefficient, 2 / (1 + np.exp(-10 * p)) - 1, rtol=1e-6)
        value, gradient = jax.value_and_grad(squares)(jnp.arange(3.0), coefficient)
        assert float(value) == 5.0
        np.testing.assert_allclose(gradient, -coefficient * 2 * np.arange(3), rtol=1e-6)
    half = jax.grad(lambda x: losses.reverse_gradient(x, jnp.float32(0.5)).sum().astype(jnp.float32))
    assert half(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


TWO, THREE = np.zeros((4, 2), np.float32), np.zeros((4, 3), np.float32)


@pytest.mark.parametrize("loss", [losses.coral, losses.mk_mmd, losses.bsp, losses.afn])
def test_features_of_two_domains_must_fit(loss):
    name = loss.__name__
    with pytest.raises(tj.DataError, match=r"got source features of width 2 and target features of width 3. Expected"):
        loss(TWO, THREE)
    with pytest.raises(tj.DataError, match=rf"{name}\(\) got 4 source and 1 target examples. Expected at least two of"):
        loss(TWO, TWO[:1])
    with pytest.raises(tj.DataError, match=rf"{name}\(\) got features \(4,\) float32 and .* Expected \[N, d\] of the"):
        loss(TWO[:, 0], TWO)


def test_linear_estimates_want_as_many_of_each():
    with pytest.raises(tj.DataError, match=r"mk_mmd\(linear=True\) got 4 source and 3 target examples. Expected as"):
        losses.mk_mmd(TWO, TWO[:3], linear=True)


def test_layers_of_jmmd_must_fit():
    with pytest.raises(tj.DataError, match=r"jmmd\(\) got 2 layers of the source, 1 of the target and 2 sigmas"):
        losses.jmmd((TWO, TWO), (TWO,))
    with pytest.raises(
        tj.DataError, match=r"jmmd\(\) got layers of \[\(3, 3\), \(4, 4\)\] examples. Expected the same"
    ):
        losses.jmmd((TWO, TWO[:3]), (TWO, TWO[:3]))


@pytest.mark.parametrize("loss", [losses.entropy, losses.information_maximisation, losses.mcc])
@pytest.mark.parametrize("logits", [np.zeros(3), np.zeros((0, 3)), np.zeros((2, 2, 2))])
def test_logits_have_one_row_per_example(loss, logits):
    with pytest.raises(
        tj.DataError, match=rf"{loss.__name__}\(\) got logits .* Expected \[N, C\], one row per example"
    ):
        loss(logits)


def test_logits_must_fit_the_features():
    with pytest.raises(tj.DataError, match=r"cdan\(\) got logits \(4, 2\) and \(4, 3\) for features \(4, 2\) and"):
        losses.cdan(lambda f: f[:, 0], TWO, TWO, TWO, THREE)
    with pytest.raises(tj.DataError, match=r"Expected one row of logits per example, of the same classes"):
        losses.cdan(lambda f: f[:, 0], TWO, TWO, TWO, TWO[:3])
    with pytest.raises(tj.DataError, match=r"mdd\(\) got logits \(4, 2\) and \(4, 2\), and of the adversary \(4, 3\)"):
        losses.mdd(TWO, THREE, TWO, TWO)


@pytest.mark.parametrize("outputs", [lambda f: f, lambda f: f.sum()])
def test_a_discriminator_gives_one_logit_per_example(outputs):
    with pytest.raises(tj.DataError, match=r"dann\(\): the discriminator returns .* Expected one logit per example"):
        losses.dann(outputs, TWO, TWO)
