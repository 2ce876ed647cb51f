"""(IA)^3: factors of out- and in-features, the bias along with them, and agreement with peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj

PARAMS = {
    "up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "down": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
}
OUT = {"ia3": ("ia3_l", lambda w: w.reshape(-1))}
IN = {"ia3_in": OUT["ia3"]}


def init(tuning, params=PARAMS):
    return tuning.init(jax.random.key(0), params)


def test_a_dense_network_agrees_with_peft(against_peft):
    against_peft("dense", "ia3", tj.ia3("**/kernel", feedforward="fc2/*"), {"fc1": OUT, "fc2": IN})


@pytest.mark.parametrize("method, feedforward, names", [("ia3", None, OUT), ("ia3_in", "conv/*", IN)])
def test_a_convolution_agrees_with_peft(against_peft, method, feedforward, names):
    against_peft("conv", method, tj.ia3("**/kernel", feedforward=feedforward), names)


def test_out_features_and_the_bias_are_scaled():
    tuning = tj.ia3("up/kernel")
    trainable, frozen = init(tuning)
    trainable["up"]["kernel"]["ia3"] = jnp.array([1.0, 2.0, 3.0])
    merged = tuning.merge(trainable, frozen)
    np.testing.assert_array_equal(merged["up"]["kernel"], [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(merged["up"]["bias"], [1, 2, 3])
    assert merged["down"] == PARAMS["down"]


def test_in_features_leave_the_bias_alone():
    tuning = tj.ia3("**/kernel", feedforward="down/*")
    trainable, frozen = init(tuning)
    trainable["down"]["kernel"]["ia3_in"] = jnp.array([1.0, 2.0, 3.0])
    merged = tuning.merge(trainable, frozen)
    np.testing.assert_array_equal(merged["down"]["kernel"], [[1, 1], [2, 2], [3, 3]])
    assert merged["down"]["bias"] is PARAMS["down"]["bias"]


def test_the_bias_belongs_to_the_tuning():
    message = r"'up/bias' is claimed by the groups '\w+' and '\w+'"
    with pytest.raises(tj.SelectionError, match=message):
        init(tj.chain(ia3=tj.ia3("up/kernel"), bias=tj.train("up/bias")))
    with pytest.raises(tj.SelectionError, match=message):
        init(tj.chain(bias=tj.bias_only(), ia3=tj.ia3("up/kernel")))
    tuning = tj.chain(ia3=tj.ia3("up/kernel"), bias=tj.train("down/bias"))
    trainable, frozen = init(tuning)
    assert len(jax.tree.leaves(trainable)) == 2
    assert jax.tree.all(jax.tree.map(jnp.array_equal, tuning.merge(trainable, frozen), PARAMS))


def test_a_kernel_without_bias():
    tuning = tj.ia3("w")
    trainable, frozen = init(tuning, {"w": jnp.ones((2, 3))})
    assert tuning.merge(trainable, frozen)["w"].shape == (2, 3)


def test_feedforward_that_matches_no_selected_kernel_raises():
    with pytest.raises(tj.SelectionError, match=r"feedforward='down/\*', which matches none of the selected kernels"):
        init(tj.ia3("up/kernel", feedforward="down/*"))


def test_a_bias_shared_by_two_kernels_raises():
    params = {"cell": {"kernel": jnp.ones((2, 3)), "recurrent": jnp.ones((3, 3)), "bias": jnp.ones(3)}}
    message = r"would scale the bias 'cell/bias' twice, with 'cell/kernel' and with 'cell/recurrent'"
    with pytest.raises(tj.SelectionError, match=message):
        init(tj.ia3("cell/{kernel,recurrent}"), params)


def test_a_bias_of_another_shape_raises():
    message = r"scales the bias 'bias' along with 'kernel': expected the shape \(3,\), got \(2,\) float32"
    with pytest.raises(tj.SelectionError, match=message):
        init(tj.ia3("kernel"), {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(2)})


def test_a_vector_raises():
    with pytest.raises(tj.SelectionError, match=r"ia3\(\) expects floating-point kernels .* 'up/bias' is \(3,\)"):
        init(tj.ia3("up/bias"))
