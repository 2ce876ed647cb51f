"""A side network starts as nothing, computes its ladder, learns alone, and sends no gradient into the backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax import interop, program
from transferjax._errors import SelectionError, TransferError
from transferjax.interop import mark, pure, side_network
from transferjax.models import _bert, _initialise

KEY = jax.random.key(0)
TEXT = {"input_ids": jnp.array([[1, 2, 3], [4, 5, 6]]), "attention_mask": jnp.ones((2, 3), int)}


def normal(key, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, key), shape)


def backbone():
    """Three modules of two widths, called in another order than their names, and a linear head."""
    params = {"z": normal(0, 6, 8), "b": normal(1, 8, 8), "a": normal(2, 8, 5), "head": normal(3, 5, 3)}

    def apply(params, x):
        x = mark("z", jnp.tanh(x @ params["z"]))
        x = mark("b", jnp.tanh(x @ params["b"]))
        x = mark("a", x @ params["a"])
        return x.mean(1) @ params["head"]

    return pure(apply, params), normal(4, 2, 7, 6)


def bert():
    variant = _bert.Variant(layers=2, width=8, heads=2, hidden=12, vocabulary=20, positions=16)
    return interop.nnx(_initialise.materialise(lambda: _bert.build(variant, 3), KEY, _bert.std, "head/")), TEXT


def linen():
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8, name="first")(x))
            return nn.Dense(3, name="head")(nn.relu(nn.Dense(6, name="second")(x)))

    module, x = Network(), normal(4, 2, 5)
    return interop.linen(module, module.init(KEY, x)), x


CASES = {
    "plain": (backbone, "*"),
    "nnx": (bert, ["embeddings", "layers/*"]),
    "linen": (linen, ["first", "second"]),
}


def moved(model, name="side"):
    """The extended model with side weights as they could be after training."""
    aux = model.params["aux"]
    weights = jax.tree.map(lambda x: x + 0.5 * normal(x.size, *x.shape), aux[name])
    return model._replace(params={**model.params, "aux": {**aux, name: weights}})


def outputs(model, inputs):
    return np.asarray(model.apply(model.params, model.extra, inputs)[0])


@pytest.mark.parametrize("name", CASES)
def test_it_starts_as_nothing_and_learns_alone(name):
    build, at = CASES[name]
    model, inputs = build()
    tuned = side_network(model, inputs, at, 4, key=KEY)
    np.testing.assert_array_equal(outputs(tuned, inputs), outputs(model, inputs))
    assert not np.allclose(outputs(moved(tuned), inputs), outputs(model, inputs), atol=1e-3)
    tuning, tx = tj.train("aux/side/**"), optax.adam(0.05)
    state, frozen = tj.init(KEY, tuned, tuning, tx)
    step = tj.make_step(tj.objectives.cross_entropy(tuned.apply), tuning, tx)
    losses = []
    for _ in range(4):
        state, metrics = step(state, frozen, {"inputs": inputs, "labels": jnp.array([0, 1])})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    before, after = (tj.paths(tree["aux"]["side"]) for tree in (tuned.params, state.trainable))
    assert {path for path in before if not np.array_equal(before[path], after[path])} == set(before)


def test_the_ladder_is_its_formula_in_the_order_of_use():
    model, x = backbone()
    tuned = moved(side_network(model, x, ["a", "b", "z"], 4, key=KEY, activation=jnp.tanh))
    seen = model.capture(model.params, {}, x, "*")[2]
    side = jax.tree.map(np.asarray, tuned.params["aux"]["side"])
    state = None
    for path in "zba":
        own = side["rungs"][path]
        new = np.asarray(seen[path]) @ own["down"]["kernel"] + own["down"]["bias"]
        if state is None:
            assert "gate" not in own
            state = new
        else:
            gate = 1 / (1 + np.exp(-own["gate"] / 0.1))
            state = gate * new + (1 - gate) * state
        state = state + np.tanh(state @ own["mix"]["kernel"] + own["mix"]["bias"])
    expected = np.asarray(seen["a"]) + state @ side["up"]["kernel"] + side["up"]["bias"]
    found = tuned.capture(tuned.params, {}, x, "*")[2]
    np.testing.assert_allclose(found["a"], expected, rtol=1e-4, atol=1e-5)
    for path in "zb":
        np.testing.assert_array_equal(found[path], seen[path])


def test_no_gradient_of_the_side_network_enters_the_backbone():
    model, x = backbone()
    tuned = moved(side_network(model, x, "*", 4, key=KEY))
    total = lambda own, params: jnp.sum(own.apply(params, {}, x)[0])  # linear in what the last rung gives
    found = jax.grad(lambda params: total(tuned, params))(tuned.params)["model"]
    expected = jax.grad(lambda params: total(model, params))(model.params)
    for path in "zba":
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-4, atol=1e-5)
    assert not np.allclose(found["head"], expected["head"], atol=1e-2)


def test_the_backward_pass_leaves_the_backbone_out():
    """The products of a step: those of the forward pass, twice those of the side network, and the head's own."""
    model, x = backbone()
    tuned = side_network(model, x, "*", 4, key=KEY)
    products = lambda function, *args: program.cost(function, *args).by_primitive["dot_general"]
    plain = products(lambda params: model.apply(params, {}, x)[0], model.params)
    forward = products(lambda params: tuned.apply(params, {}, x)[0], tuned.params)
    side = forward - plain

    def loss(aux):
        return jnp.sum(tuned.apply({**tuned.params, "aux": aux}, {}, x)[0] ** 2)

    step = products(jax.value_and_grad(loss), tuned.params["aux"])
    head = 2 * 2 * 5 * 3
    assert plain + side < step <= plain + 3 * side + head


def test_two_side_networks_and_other_layers_stand_together():
    model, x = backbone()
    tuned = side_network(interop.scale_and_shift(model, x, "b"), x, ["z", "b"], 4, key=KEY, name="one")
    tuned = side_network(tuned, x, ["b", "a"], 3, key=KEY, name="two")
    np.testing.assert_allclose(outputs(tuned, x), outputs(model, x), rtol=1e-6)
    both = moved(moved(tuned, "one"), "two")
    assert not np.allclose(outputs(both, x), outputs(moved(tuned, "two"), x), atol=1e-3)
    assert sorted(tuned.params["aux"]) == ["one", "ssf", "two"]


def test_a_bad_size_or_place_is_named():
    model, x = backbone()
    with pytest.raises(TransferError, match=r"side_network\(\) expects a whole number of at least 1 as size, got 0"):
        side_network(model, x, "*", 0, key=KEY)
    with pytest.raises(SelectionError, match="matched none of"):
        side_network(model, x, "blocks/*", 4, key=KEY)
    shrinking = pure(lambda params, x: mark("b", mark("a", x * params["w"])[:, ::2]), {"w": jnp.ones(6)})
    with pytest.raises(TransferError, match=r"that differ only in width; 'a' gives \(2, 7, 6\) float32 and 'b'"):
        side_network(shrinking, x, "*", 4, key=KEY)
