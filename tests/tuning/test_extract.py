"""An adapter from two sets of weights is the best of its rank, and says what it leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax._errors import SelectionError
from transferjax.tuning import extract_lora


@pytest.fixture
def base():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "fc": {"kernel": jax.random.normal(keys[0], (6, 5)), "bias": jnp.zeros(5)},
        "conv": {"kernel": jax.random.normal(keys[1], (3, 3, 4, 8))},
    }


def test_a_change_of_low_rank_comes_back_whole(base):
    tuning = tj.lora("**/kernel", rank=2)
    trainable, frozen = tuning.init(jax.random.key(1), base)
    trainable = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(2), x.shape), trainable)
    tuned = tuning.merge(trainable, frozen)
    found, report = extract_lora(base, tuned, "**/kernel", rank=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), tuning.merge(found, base), tuned)
    assert max(report.column("not kept")) < 1e-5
    assert report.metadata["changed leaves that are not selected"] == 0


def test_what_is_left_out_is_the_rest_of_the_singular_values(base):
    change = np.diag([3.0, 2.0, 1.0, 0.5, 0.1]).astype(np.float32)
    kernel = np.asarray(base["fc"]["kernel"])
    tuned = {**base, "fc": {"kernel": kernel + np.vstack([change, np.zeros((1, 5), np.float32)]), "bias": jnp.ones(5)}}
    _, report = extract_lora(base, tuned, "fc/kernel", rank=2)
    wanted = np.sqrt((1 + 0.25 + 0.01) / (9 + 4 + 1 + 0.25 + 0.01))
    np.testing.assert_allclose(report.column("not kept")[0], wanted, rtol=1e-5)
    assert report.metadata["changed leaves that are not selected"] == 1
    size = np.sqrt(14.26) / np.linalg.norm(kernel)
    np.testing.assert_allclose(report.column("relative change")[0], size, rtol=1e-5)


def test_no_change_is_no_adapter(base):
    found, report = extract_lora(base, base, "fc/kernel", rank=1)
    assert not np.any(found["fc"]["kernel"]["lora_a"])
    assert report.rows[0][1:] == (0.0, 0.0)


def test_trees_that_differ_and_bad_ranks_are_named(base):
    other = {**base, "fc": {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(5)}}
    with pytest.raises(SelectionError, match=r"'fc/kernel' is \(6, 5\) float32 in base and \(6, 4\) float32 in tuned"):
        extract_lora(base, other, "fc/kernel", rank=1)
    with pytest.raises(SelectionError, match="expects rank to be a whole number of at least 1, got 0"):
        extract_lora(base, base, "fc/kernel", rank=0)
    with pytest.raises(SelectionError, match="got rank 6 for the kernel 'fc/kernel'"):
        extract_lora(base, base, "fc/kernel", rank=6)
    with pytest.raises(SelectionError, match="'fc/bias' is"):
        extract_lora(base, base, "fc/bias", rank=1)
