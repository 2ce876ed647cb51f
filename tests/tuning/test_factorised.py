"""PiSSA and OLoRA: LoRA that begins as a part of the kernel, and agreement with peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.testing import check_tuning

TUNINGS = {"pissa": tj.tuning.pissa, "olora": tj.tuning.olora}
START = pytest.mark.parametrize("name", TUNINGS)


def kernel(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@START
def test_the_beginning_agrees_with_peft(name, peft):
    """Singular vectors and the columns of Q have free signs: the products are compared, and the residual."""
    theirs = peft(f"start/{name}/weights")
    params = {m: {"kernel": jnp.asarray(peft("dense/base")[f"{m}.weight"].T)} for m in ("fc1", "fc2")}
    trainable, frozen = TUNINGS[name]("**/kernel", 3, alpha=6.0).init(jax.random.key(0), params)
    for module in params:
        a, b = trainable[module]["kernel"]["lora_a"], trainable[module]["kernel"]["lora_b"]
        their_a, their_b = theirs[f"{module}.lora_A"].T, theirs[f"{module}.lora_B"].T
        np.testing.assert_allclose(frozen[module]["kernel"], theirs[module].T, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(a @ b, their_a @ their_b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(jnp.abs(a), np.abs(their_a), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(jnp.abs(b), np.abs(their_b), rtol=1e-4, atol=1e-5)


def test_pissa_is_the_best_approximation():
    w = kernel(6, 5)
    trainable, frozen = tj.tuning.pissa("w", 2, alpha=8.0).init(jax.random.key(0), {"w": w})
    values = np.linalg.svd(np.asarray(frozen["w"]), compute_uv=False)
    np.testing.assert_allclose(values[:3], np.linalg.svd(np.asarray(w), compute_uv=False)[2:], rtol=1e-4)
    a, b = trainable["w"]["lora_a"], trainable["w"]["lora_b"]
    np.testing.assert_allclose(frozen["w"] + 4.0 * a @ b, w, atol=1e-5)


@START
def test_a_convolution_begins_as_it_was(name):
    params = {"w": kernel(3, 3, 2, 4)}
    tuning = TUNINGS[name]("w", 2)
    trainable, frozen = tuning.init(jax.random.key(0), params)
    assert trainable["w"]["lora_a"].shape == (3, 3, 2, 2) and trainable["w"]["lora_b"].shape == (2, 4)
    assert float(jnp.abs(frozen["w"] - params["w"]).max()) > 0.1
    check_tuning(tuning, params, atol=1e-6)


@START
def test_a_bfloat16_base_keeps_its_dtype(name):
    params = {"w": kernel(6, 5).astype(jnp.bfloat16)}
    tuning = TUNINGS[name]("w", 2)
    assert tuning.init(jax.random.key(0), params)[1]["w"].dtype == jnp.bfloat16
    check_tuning(tuning, params, atol=2**-8)


@START
def test_several_ranks(name):
    params = {"a": kernel(4, 4), "b": kernel(5, 4)}
    check_tuning(TUNINGS[name]("*", {"a": 1, "**": 2}, alpha={"b": 3.0, "**": 1.0}), params, atol=1e-6)


@START
def test_the_residual_stays_frozen_in_a_chain(name):
    params = {"w": kernel(4, 4), "head": kernel(4, 2)}
    tuning = tj.chain(head=tj.train("head"), low=TUNINGS[name]("w", 2))
    check_tuning(tuning, params, atol=1e-6)


@START
def test_a_rank_above_the_widths_raises(name):
    with pytest.raises(tj.SelectionError, match=rf"{name}\(\) got rank 5 for the kernel 'w' .* expected at most 4"):
        TUNINGS[name]("w", 5).init(jax.random.key(0), {"w": kernel(6, 4)})
