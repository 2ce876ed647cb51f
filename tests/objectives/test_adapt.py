"""Objectives for two domains: what they add up, what they pass on, where their gradients go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import transferjax as tj
from transferjax._context import tracing_step
from transferjax.objectives import losses

RNG = np.random.default_rng(0)
COUNT, WIDTH, HIDDEN, CLASSES = 8, 5, 4, 3
BATCH = {
    "inputs": RNG.normal(size=(COUNT, WIDTH)).astype(np.float32),
    "labels": RNG.integers(0, CLASSES, COUNT),
    "target_inputs": RNG.normal(size=(COUNT, WIDTH)).astype(np.float32) + 1,
}
PARAMS = {
    "body": jnp.asarray(RNG.normal(size=(WIDTH, HIDDEN)), jnp.float32),
    "head": jnp.asarray(RNG.normal(size=(HIDDEN, CLASSES)), jnp.float32),
}


def network(params, x):
    maps = tj.interop.mark("maps", jnp.tanh(x @ params["body"])[:, None, :] * jnp.array([[1.0], [3.0]]))
    return tj.interop.mark("body", maps.mean(1)) @ params["head"]


MODEL = tj.interop.pure(network, PARAMS)
CROSS_ENTROPY = tj.objectives.cross_entropy


def features(params, x):
    return 2 * np.tanh(np.asarray(x) @ np.asarray(params["body"]))


def opposed(width=HIDDEN, name="discriminator", outputs=1):
    init = tj.objectives.discriminator(width, hidden=(6,), outputs=outputs)
    return tj.extend(MODEL, name, init, key=jax.random.key(0))


def dann(model=None, **options):
    return tj.objectives.dann(CROSS_ENTROPY, model or opposed(), at="body", **(options or {"steps": 100}))


OBJECTIVES = {
    "coral": lambda: (tj.objectives.adapt(CROSS_ENTROPY, MODEL, losses.coral, at="body"), MODEL),
    "mk_mmd": lambda: (tj.objectives.adapt(CROSS_ENTROPY, MODEL, losses.mk_mmd, at="maps"), MODEL),
    "bsp": lambda: (tj.objectives.adapt(CROSS_ENTROPY, MODEL, losses.bsp, at="body", weight=1e-3), MODEL),
    "afn": lambda: (tj.objectives.adapt(CROSS_ENTROPY, MODEL, losses.afn, at="body"), MODEL),
    "mcc": lambda: (tj.objectives.adapt(CROSS_ENTROPY, MODEL, tj.objectives.on_target(losses.mcc)), MODEL),
    "apart": lambda: (tj.objectives.adapt(CROSS_ENTROPY, MODEL, losses.coral, at="body", together=False), MODEL),
    "jan": lambda: (tj.objectives.jan(CROSS_ENTROPY, MODEL, at="body"), MODEL),
    "dann": lambda: (dann(), opposed()),
    "cdan": lambda: (
        tj.objectives.cdan(CROSS_ENTROPY, opposed(HIDDEN * CLASSES), at="body", progress=0.5),
        opposed(HIDDEN * CLASSES),
    ),
    "cdan_entropy": lambda: (
        tj.objectives.cdan(
            CROSS_ENTROPY, opposed(HIDDEN * CLASSES), at="body", progress=0.5, entropy_conditioning=True
        ),
        opposed(HIDDEN * CLASSES),
    ),
    "mdd": lambda: (
        tj.objectives.mdd(CROSS_ENTROPY, opposed(name="adversary", outputs=CLASSES), at="body", steps=100),
        opposed(name="adversary", outputs=CLASSES),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_value_is_the_sum_of_both_and_metrics_are_those_of_both(name):
    objective, model = OBJECTIVES[name]()
    loss = objective(model.params, model.extra, BATCH, None, True)
    apart = CROSS_ENTROPY(model.apply)(model.params, model.extra, BATCH, None, True)
    assert set(apart.metrics) | {"alignment"} <= set(loss.metrics)
    weight = 1e-3 if name == "bsp" else 1.0
    np.testing.assert_allclose(loss.value, apart.value + weight * loss.metrics["alignment"], rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["accuracy"], apart.metrics["accuracy"])


def test_the_loss_sees_the_features_of_both_domains():
    one, other = (features(PARAMS, BATCH[name]) for name in ("inputs", "target_inputs"))
    call = lambda objective: objective(PARAMS, {}, BATCH, None, True).metrics["alignment"]
    for at in ("body", "maps"):  # of maps the mean over positions
        found = call(tj.objectives.adapt(CROSS_ENTROPY, MODEL, losses.coral, at=at))
        np.testing.assert_allclose(found, losses.coral(one, other), rtol=1e-5)
    both = call(tj.objectives.adapt(CROSS_ENTROPY, MODEL, losses.coral, at=tj.glob("body") | tj.glob("maps")))
    np.testing.assert_allclose(both, 2 * losses.coral(one, other), rtol=1e-5)
    outputs = [part @ PARAMS["head"] for part in (one, other)]
    np.testing.assert_allclose(
        call(tj.objectives.adapt(CROSS_ENTROPY, MODEL, losses.mk_mmd)), losses.mk_mmd(*outputs), rtol=1e-4, atol=1e-6
    )
    target = tj.objectives.on_target(Partial(losses.mcc))
    found = call(tj.objectives.adapt(CROSS_ENTROPY, MODEL, target, at=None))
    np.testing.assert_allclose(found, losses.mcc(outputs[1]), rtol=1e-5)
    layers = [(part, jax.nn.softmax(logits)) for part, logits in zip((one, other), outputs)]
    found = call(tj.objectives.jan(CROSS_ENTROPY, MODEL, at="body"))
    np.testing.assert_allclose(found, losses.jmmd(*layers, sigmas=(None, 0.92)), rtol=1e-4, atol=1e-5)


def test_what_makes_the_objective_may_have_settings_and_arrays():
    weights = jnp.array([1.0, 2.0, 5.0])
    make = functools.partial(CROSS_ENTROPY, label_smoothing=0.2, class_weights=weights)
    found = tj.objectives.adapt(make, MODEL, losses.coral, at="body", weight=0.0)(PARAMS, {}, BATCH, None, True)
    alone = make(MODEL.apply)(PARAMS, {}, BATCH, None, True)
    np.testing.assert_allclose(found.value, alone.value, rtol=1e-6)
    assert float(found.weight["loss"]) == float(alone.weight["loss"])
    arrays = jax.tree.leaves(tj.objectives.adapt(make, MODEL, losses.coral))
    assert any(leaf is weights for leaf in arrays)
    weighted = {**BATCH, "weight": jnp.arange(8.0)}
    loss = tj.objectives.adapt(CROSS_ENTROPY, MODEL, losses.coral, weight=0.0)(PARAMS, {}, weighted, None, True)
    np.testing.assert_allclose(
        loss.value, CROSS_ENTROPY(MODEL.apply)(PARAMS, {}, weighted, None, True).value, rtol=1e-6
    )


def recorder():
    """A model whose extra is the mean of what it saw, and which counts its passes."""
    passes = []

    def apply(params, extra, inputs, *, key=None, train=False):
        passes.append((len(inputs), key, train))
        return inputs @ params["body"] @ params["head"], {"seen": 0.5 * extra["seen"] + 0.5 * inputs.mean()}

    return tj.Model(apply, None, PARAMS, {"seen": jnp.zeros(())}), passes


def test_one_pass_mixes_the_domains_and_two_move_the_statistics_one_after_the_other():
    model, passes = recorder()
    source, target = BATCH["inputs"].mean(), BATCH["target_inputs"].mean()
    key = jax.random.key(3)
    objective = tj.objectives.adapt(CROSS_ENTROPY, model, losses.coral, together=True)
    together = objective(PARAMS, model.extra, BATCH, key, "body")
    assert passes == [(2 * COUNT, key, "body")]
    np.testing.assert_allclose(together.extra["seen"], 0.5 * (source + target) / 2, rtol=1e-5)
    passes.clear()
    objective = tj.objectives.adapt(CROSS_ENTROPY, model, losses.coral)  # there is an extra
    apart = objective(PARAMS, model.extra, BATCH, key, True)
    assert [count for count, *_ in passes] == [COUNT, COUNT]
    assert not (jax.random.key_data(passes[0][1]) == jax.random.key_data(passes[1][1])).all()
    np.testing.assert_allclose(apart.extra["seen"], 0.5 * (0.5 * source) + 0.5 * target, rtol=1e-5)
    np.testing.assert_allclose(apart.value, together.value, rtol=1e-5)
    passes.clear()
    tj.objectives.adapt(CROSS_ENTROPY, model._replace(extra={}), losses.coral)(PARAMS, model.extra, BATCH, key, True)
    assert [count for count, *_ in passes] == [2 * COUNT]


def test_inputs_may_be_dicts_and_domains_of_unlike_size():
    model = tj.interop.pure(lambda params, x: (x["a"] + x["b"]) @ params["body"] @ params["head"], PARAMS)
    part = lambda name, rows: {"a": BATCH[name][:rows], "b": BATCH[name][:rows]}
    batch = {"inputs": part("inputs", 8), "target_inputs": part("target_inputs", 3), "labels": BATCH["labels"]}
    loss = tj.objectives.adapt(CROSS_ENTROPY, model, losses.coral)(PARAMS, {}, batch, None, False)
    outputs = [
        2 * BATCH[name][:n] @ PARAMS["body"] @ PARAMS["head"] for name, n in (("inputs", 8), ("target_inputs", 3))
    ]
    np.testing.assert_allclose(loss.metrics["alignment"], losses.coral(*outputs), rtol=1e-4)


def gradients(objective, model, step=None):
    value = lambda params: objective(params, model.extra, BATCH, None, True).metrics["alignment"]
    if step is None:
        return jax.jit(jax.grad(value))(model.params)
    with tracing_step(jnp.int32(step)):
        return jax.jit(jax.grad(value))(model.params)


def test_the_reversed_gradient_follows_the_progress():
    model = opposed()
    full = gradients(dann(model, progress=1.0), model)
    for step, p in ((0, 0.0), (10, 0.1), (500, 1.0)):
        found = gradients(dann(model, steps=100), model, step)
        given = gradients(dann(model, progress=p), model)
        expected = (2 / (1 + np.exp(-10 * p)) - 1) / (2 / (1 + np.exp(-10)) - 1)
        np.testing.assert_allclose(found["model"]["body"], expected * full["model"]["body"], rtol=1e-4, atol=1e-7)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), found, given)
        # the opponent learns at full rate whatever the progress
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found["aux"], full["aux"])
    outside = gradients(dann(model, steps=100), model)
    np.testing.assert_allclose(outside["model"]["body"], full["model"]["body"], rtol=1e-5)


def test_features_and_discriminator_pull_in_opposite_directions():
    objective, model = dann(progress=1.0), opposed()
    slope = gradients(objective, model)
    value = lambda params: float(objective(params, {}, BATCH, None, True).metrics["alignment"])
    moved = lambda part: jax.tree.map(lambda p, g: p - 0.05 * g, model.params[part], slope[part])
    assert value({**model.params, "aux": moved("aux")}) < value(model.params)
    assert value({**model.params, "model": moved("model")}) > value(model.params)


def test_the_metric_counts_whose_domain_is_known():
    model = tj.interop.pure(lambda params, x: tj.interop.mark("body", x) @ params, jnp.ones((2, 2)))
    weights = {"0": {"kernel": jnp.array([[1.0], [0.0]]), "bias": jnp.zeros(1)}}
    model = tj.extend(model, "discriminator", weights)
    objective = tj.objectives.dann(CROSS_ENTROPY, model, at="body", progress=0.5)
    source, target = np.array([[1.0, 0], [2, 0], [3, 0], [-1, 0]]), np.array([[-1.0, 0], [1, 0]])
    batch = {"inputs": source, "labels": np.zeros(4, int), "target_inputs": target}
    loss = objective(model.params, {}, batch, None, True)
    assert float(loss.metrics["domain_accuracy"]) == 0.5 * (0.75 + 0.5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_trains_network_and_opponent(accumulate):
    model = opposed()
    tuning = tj.chain(model=tj.train("model/**"), opponent=tj.train("aux/**"))
    tx = tj.per_group(model=optax.sgd(0.1), opponent=optax.sgd(0.1))
    step = tj.make_step(dann(model, steps=2), tuning, tx, accumulate=accumulate)
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    before = tuning.merge(tj.copy(state.trainable), frozen)
    for _ in range(2):
        state, metrics = step(state, frozen, BATCH)
    assert {"loss", "accuracy", "alignment", "domain_accuracy"} <= set(metrics)
    after = tuning.merge(state.trainable, frozen)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(moved))


def test_a_missing_opponent_is_named_with_the_line_that_adds_it():
    line = r"the model has no auxiliary weights 'discriminator'.*model = tj.extend\(model, 'discriminator', init\)"
    for make in (tj.objectives.dann, tj.objectives.cdan):
        with pytest.raises(tj.SelectionError, match=line):
            make(CROSS_ENTROPY, MODEL, at="body", steps=1)
    with pytest.raises(
        tj.SelectionError, match=r"no auxiliary weights 'adversary'.*tj.extend\(model, 'adversary', init"
    ):
        tj.objectives.mdd(CROSS_ENTROPY, opposed(), at="body", steps=1)
    with pytest.raises(tj.SelectionError, match=line):
        dann()({"model": PARAMS, "aux": {}}, {}, BATCH, None, True)


def test_an_opponent_of_another_width_is_named():
    with pytest.raises(tj.DataError, match=r"the auxiliary weights 'discriminator' take features of width 9, got 4"):
        dann(opposed(9))(opposed(9).params, {}, BATCH, None, True)


def test_the_opponent_sees_one_array():
    objective = tj.objectives.dann(CROSS_ENTROPY, opposed(), at="*", steps=1)
    with pytest.raises(tj.SelectionError, match=r"at selects 2 arrays. Expected one module with one output"):
        objective(opposed().params, {}, BATCH, None, True)


def test_progress_is_given_once_and_in_its_range():
    with pytest.raises(tj.TransferError, match=r"dann\(\) got neither of steps and progress. Expected steps=, the"):
        tj.objectives.dann(CROSS_ENTROPY, opposed(), at="body")
    with pytest.raises(tj.TransferError, match=r"dann\(\) got both of steps and progress. Expected steps=, the"):
        dann(steps=3, progress=0.5)
    with pytest.raises(tj.TransferError, match=r"dann\(\) expects steps, a whole number of at least 1, got 0"):
        dann(steps=0)
    with pytest.raises(tj.TransferError, match=r"dann\(\) expects progress in \[0, 1\], got 1.5"):
        dann(progress=1.5)


@pytest.mark.parametrize("width", [0, 2.5, "8"])
def test_a_discriminator_has_whole_widths(width):
    with pytest.raises(tj.TransferError, match=r"discriminator\(\) expects widths of at least 1, got"):
        tj.objectives.discriminator(width)


@pytest.mark.parametrize("made", [CROSS_ENTROPY(MODEL.apply), "cross_entropy", lambda: None])
def test_an_objective_that_is_made_already_is_refused(made):
    with pytest.raises(tj.TransferError, match=r"adapt\(\) expects what makes an objective of a network first, got"):
        tj.objectives.adapt(made, MODEL, losses.coral)


def test_layers_need_a_model_that_captures():
    with pytest.raises(
        tj.TransferError, match=r"adapt\(\) expects a Model that can say what its modules make; capture"
    ):
        tj.objectives.adapt(CROSS_ENTROPY, MODEL._replace(capture=None), losses.coral, at="body")
    with pytest.raises(tj.TransferError, match=r"a Model that can say what its modules make; got function"):
        tj.objectives.adapt(CROSS_ENTROPY, network, losses.coral, at="body")


def test_batches_and_layers_that_do_not_fit_raise():
    objective = tj.objectives.adapt(CROSS_ENTROPY, MODEL, losses.coral, at="body")
    call = lambda batch: objective(PARAMS, {}, batch, None, True)
    with pytest.raises(
        tj.DataError, match=r"the batch has no 'target_inputs': it has \['inputs', 'labels'\]. Expected"
    ):
        call({name: BATCH[name] for name in ("inputs", "labels")})
    with pytest.raises(
        tj.DataError, match=r"target_inputs are \(8, 4\) float32 and inputs \(8, 5\) float32. Expected both"
    ):
        call({**BATCH, "target_inputs": BATCH["target_inputs"][:, :4]})
    with pytest.raises(tj.DataError, match=r"Expected both domains alike but for the number of examples"):
        call({**BATCH, "target_inputs": BATCH["target_inputs"].astype(np.uint8)})
    total = tj.interop.pure(lambda params, x: tj.interop.mark("total", x.sum()) + x @ params["body"], PARAMS)
    with pytest.raises(tj.SelectionError, match=r"'total' is \(\) float32 for 16 examples. Expected an array \[B"):
        tj.objectives.adapt(CROSS_ENTROPY, total, losses.coral, at="total")(PARAMS, {}, BATCH, None, True)
