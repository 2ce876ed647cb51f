"""Layers behind a frozen network's modules start as nothing, and then they alone learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax import interop
from transferjax._errors import TransferError
from transferjax.interop import mark, pure
from transferjax.models import _bert, _initialise

TINY = _bert.Variant(layers=2, width=8, heads=2, hidden=12, vocabulary=20, positions=16)
TEXT = {"input_ids": jnp.array([[1, 2, 3], [4, 5, 6]]), "attention_mask": jnp.ones((2, 3), int)}
KEY = jax.random.key(0)
HOUSLBY = ["layers/*/attention", "layers/*/mlp"]


@pytest.fixture(scope="module")
def bert():
    build = lambda: _bert.build(TINY, 3)
    return interop.nnx(_initialise.materialise(build, KEY, _bert.std, "head/"))


@pytest.fixture(scope="module")
def vit():
    """Two blocks over tokens, whose first is read out."""

    def apply(params, x):
        x = mark("embed", x @ params["embed"])
        for number in range(2):
            x = mark(f"blocks/{number}", x + jnp.tanh(x.mean(1, keepdims=True) @ params["block"][str(number)]))
        return x[:, 0] @ params["head"]

    keys = jax.random.split(KEY, 4)
    square = lambda key: jax.random.normal(key, (4, 4))
    block = {"0": square(keys[1]), "1": square(keys[2])}
    return pure(apply, {"embed": square(keys[0]), "block": block, "head": square(keys[3])})


def train(model, inputs, selector, steps=3):
    """The model's outputs before and after some steps of the selected weights, and the state."""
    tuning, tx = tj.train(selector), optax.adam(0.1)
    state, frozen = tj.init(KEY, model, tuning, tx)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    batch = {"inputs": inputs, "labels": jnp.array([0, 1])}
    losses = []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


def outputs(model, inputs):
    return np.asarray(model.apply(model.params, model.extra, inputs)[0])


def test_bottlenecks_start_as_nothing_and_learn(bert):
    tuned = interop.bottleneck(bert, TEXT, HOUSLBY, 2, key=KEY)
    np.testing.assert_allclose(outputs(tuned, TEXT), outputs(bert, TEXT), rtol=1e-6)
    own = tuned.params["aux"]["bottleneck"]["layers"]
    assert sorted(own) == ["0", "1"]
    assert sorted(own["1"]) == ["attention", "mlp"]
    down = [own[n][m]["down"]["kernel"] for n in "01" for m in ("attention", "mlp")]
    assert len({float(kernel[0, 0]) for kernel in down}) == 4
    losses, state = train(tuned, TEXT, "aux/bottleneck/**")
    assert losses[-1] < losses[0]
    assert {path.split("/")[-2] for path in tj.paths(state.trainable)} == {"down", "up"}


def test_scale_and_shift_starts_as_nothing_and_learns(bert):
    tuned = interop.scale_and_shift(bert, TEXT, "layers/*/mlp")
    np.testing.assert_allclose(outputs(tuned, TEXT), outputs(bert, TEXT), rtol=1e-6)
    losses, _ = train(tuned, TEXT, "aux/ssf/**")
    assert losses[-1] < losses[0]


def test_scale_and_shift_computes_its_formula(vit):
    x = jax.random.normal(KEY, (2, 3, 4))
    tuned = interop.scale_and_shift(vit, x, "embed")
    tuned.params["aux"]["ssf"]["embed"] = {"scale": 2.0 * jnp.ones(4), "shift": jnp.arange(4.0)}
    at = lambda model: model.capture(model.params, {}, x, "embed")[2]["embed"]
    np.testing.assert_allclose(at(tuned), 2.0 * at(vit) + jnp.arange(4.0), rtol=1e-6)


def test_visual_prompts_are_appended_and_replaced_when_deep(vit):
    x = jax.random.normal(KEY, (2, 3, 4))
    tuned = interop.visual_prompts(vit, x, "embed", 5, key=KEY, deep="blocks/0")
    found = tuned.capture(tuned.params, {}, x, ["embed", "blocks/*"])[2]
    own = tuned.params["aux"]["prompt"]
    plain = vit.capture(vit.params, {}, x, "embed")[2]["embed"]
    np.testing.assert_array_equal(found["embed"][:, :3], plain)
    for name, prompt in (("embed", own["embed"]), ("blocks/0", own["blocks"]["0"])):
        assert found[name].shape == (2, 8, 4)
        np.testing.assert_array_equal(found[name][:, 3:], jnp.broadcast_to(prompt, (2, 5, 4)))
    assert not np.allclose(found["blocks/1"][0, 3:], own["blocks"]["0"])
    losses, _ = train(tuned, x, "aux/prompt/**")
    assert losses[-1] < losses[0]


def test_a_soft_prompt_stands_behind_the_text(bert):
    tuned = interop.soft_prompt(bert, TEXT, "embeddings", 4, key=KEY)
    found = tuned.capture(tuned.params, tuned.extra, TEXT, "embeddings")[2]["embeddings"]
    plain = bert.capture(bert.params, bert.extra, TEXT, "embeddings")[2]["embeddings"]
    np.testing.assert_allclose(found[:, :3], plain, rtol=1e-6)
    np.testing.assert_array_equal(found[1, 3:], tuned.params["aux"]["prompt"]["embeddings"])
    assert not np.allclose(outputs(tuned, TEXT), outputs(bert, TEXT))
    without_mask = {"input_ids": TEXT["input_ids"], "attention_mask": None}
    np.testing.assert_allclose(outputs(tuned, TEXT), outputs(tuned, without_mask), rtol=1e-5)
    losses, _ = train(tuned, TEXT, "aux/prompt/**")
    assert losses[-1] < losses[0]


def test_a_bad_size_or_place_is_named(bert, vit):
    x = jnp.ones((2, 3, 4))
    with pytest.raises(TransferError, match=r"bottleneck\(\) expects a whole number of at least 1 as size, got 0"):
        interop.bottleneck(bert, TEXT, HOUSLBY, 0, key=KEY)
    with pytest.raises(TransferError, match=r"expects a whole number of at least 1 as length, got 1\.5"):
        interop.visual_prompts(vit, x, "embed", 1.5, key=KEY)
    with pytest.raises(TransferError, match="expects inputs as a dict with 'input_ids'"):
        interop.soft_prompt(vit, x, "embed", 2, key=KEY)
    flat = pure(lambda params, x: mark("whole", (x * params["w"]).sum((1, 2))), {"w": jnp.ones(4)})
    with pytest.raises(TransferError, match=r"visual_prompts\(\) at 'whole': its output is .*Expected tokens"):
        interop.visual_prompts(flat, x, "whole", 2, key=KEY)
    counted = pure(lambda params, x: mark("count", jnp.argmax(x * params["w"], -1)), {"w": jnp.ones(4)})
    with pytest.raises(TransferError, match=r"bottleneck\(\) at 'count': its output is .*floating-point"):
        interop.bottleneck(counted, x, "count", 2, key=KEY)
