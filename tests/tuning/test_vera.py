"""VeRA: shared random matrices, two learnt vectors, and agreement with peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj

NAMES = {"vera_d": ("vera_lambda_d", lambda w: w), "vera_b": ("vera_lambda_b", lambda w: w)}


def deltas(tuning, params):
    """The change of each zero kernel when all vectors are one."""
    trainable, frozen = tuning.init(jax.random.key(0), params)
    return tuning.merge(jax.tree.map(jnp.ones_like, trainable), frozen)


def test_a_dense_network_agrees_with_peft_given_its_matrices(against_peft, peft):
    """peft draws its matrices with torch; ours are drawn otherwise, and both take the other's as given."""
    shared = peft("dense/vera/shared")
    tuning = tj.tuning.vera("**/kernel", 4, projections=(shared["vera_A"].T, shared["vera_B"].T))
    against_peft("dense", "vera", tuning, NAMES)


def test_the_matrices_are_drawn_as_stated():
    random = lambda part, rows: np.random.RandomState([7, part]).uniform(-1, 1, (rows, 3))
    expected = (random(0, 5) * np.sqrt(6 / 5)) @ (random(1, 4).T * np.sqrt(6 / 3))
    found = deltas(tj.tuning.vera("w", 3, seed=7), {"w": jnp.zeros((5, 4))})["w"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_first_numbers_never_change():
    """Saved vectors are worthless with other matrices: these are written down."""
    first = np.random.RandomState([0, 0]).uniform(-1.0, 1.0, 3)
    np.testing.assert_allclose(first, [-0.6985654925788556, -0.6089145522699582, -0.6693492302985695], rtol=1e-7)


def test_kernels_share_their_matrices():
    found = deltas(tj.tuning.vera("*", 2), {"wide": jnp.zeros((6, 5)), "narrow": jnp.zeros((3, 4))})
    scale = np.sqrt(6 / 3) / np.sqrt(6 / 6)
    np.testing.assert_allclose(found["narrow"], found["wide"][:3, :4] * scale, rtol=1e-5)


def test_the_key_decides_nothing_and_the_seed_all():
    params = {"w": jnp.zeros((4, 4))}
    one, other = (tj.tuning.vera("w", 2).init(jax.random.key(k), params)[0] for k in (0, 1))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one, other))
    assert not np.allclose(
        deltas(tj.tuning.vera("w", 2), params)["w"], deltas(tj.tuning.vera("w", 2, seed=1), params)["w"]
    )


def test_the_start_of_d():
    trainable, _ = tj.tuning.vera("w", 2, start=0.3).init(jax.random.key(0), {"w": jnp.zeros((4, 4))})
    np.testing.assert_allclose(trainable["w"]["vera_d"], [0.3, 0.3])


def test_projections_of_another_rank_raise():
    message = r"expects projections of rank 2, A \[in, 2\] and B \[2, out\]; got \(3, 4\) and \(2, 4\)"
    with pytest.raises(tj.SelectionError, match=message):
        tj.tuning.vera("w", 2, projections=(np.ones((3, 4)), np.ones((2, 4))))


def test_projections_that_are_no_matrices_raise():
    with pytest.raises(tj.SelectionError, match=r"expects projections as two matrices .* got \(\(3,\) float64\)"):
        tj.tuning.vera("w", 2, projections=(np.ones(3),))


def test_projections_that_are_too_narrow_raise():
    tuning = tj.tuning.vera("w", 2, projections=(np.ones((3, 2)), np.ones((2, 4))))
    message = r"got projections for at most \(3, 4\) features, but 'w' is \(4, 4\) float32"
    with pytest.raises(tj.SelectionError, match=message):
        tuning.init(jax.random.key(0), {"w": jnp.zeros((4, 4))})


@pytest.mark.parametrize("seed", [-1, 1.5, True, 2**32])
def test_a_bad_seed_raises(seed):
    with pytest.raises(tj.SelectionError, match=r"vera\(\) expects a seed from 0 to 2\*\*32 - 1, got"):
        tj.tuning.vera("w", 2, seed=seed)


def test_a_convolution_raises():
    with pytest.raises(
        tj.SelectionError, match=r"vera\(\) expects floating-point kernels \[in, out\]; 'w' is \(3, 3, 2, 2\)"
    ):
        tj.tuning.vera("w", 2).init(jax.random.key(0), {"w": jnp.zeros((3, 3, 2, 2))})
