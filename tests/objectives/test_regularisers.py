"""Objectives that hold a network near its source, against float64 formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import transferjax as tj
from transferjax.objectives._regularisers import diagonal_fisher, ewc, l2_sp, mixout

RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
SOURCE = {"body": {"bias": draw(4), "kernel": draw(3, 4)}, "fc": {"kernel": draw(4, 9)}}
PARAMS = {"body": {"bias": draw(4), "kernel": draw(3, 4)}, "head": {"kernel": draw(4, 2)}}
BATCH = {"inputs": jnp.asarray(draw(6, 3)), "labels": jnp.arange(6) % 2}


def apply(params, extra, inputs, *, key=None, train=False):
    return jnp.tanh(inputs @ params["body"]["kernel"] + params["body"]["bias"]) @ params["head"]["kernel"], extra


MODEL = tj.Model(apply, None, jax.tree.map(jnp.asarray, PARAMS), {})
TASK = tj.objectives.cross_entropy(apply)
BODY = {"body": SOURCE["body"]}
FISHER = jax.tree.map(np.abs, {"body": {"bias": draw(4), "kernel": draw(3, 4)}})


def value(objective, params=PARAMS, key=None, train=True):
    return float(objective(params, {}, BATCH, key, train).value)


def squares(*leaves):
    return sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in leaves)


def far(name):
    return PARAMS["body"][name].astype(np.float64) - SOURCE["body"][name]


def test_l2_sp_is_half_the_squared_distance_and_half_the_squared_norm_of_the_head():
    distance, norm = squares(far("bias"), far("kernel")), squares(PARAMS["head"]["kernel"])
    assert value(l2_sp(SOURCE)) == pytest.approx(0.005 * (distance + norm), rel=1e-6)
    assert value(l2_sp(SOURCE, 1.0, head_strength=0.0)) == pytest.approx(0.5 * distance, rel=1e-6)
    loss = l2_sp(SOURCE, 0.2, head="{head/**,**/bias}", head_strength=3.0)(PARAMS, {}, BATCH, None, True)
    decayed = squares(PARAMS["head"]["kernel"], PARAMS["body"]["bias"])
    assert float(loss.value) == pytest.approx(0.1 * squares(far("kernel")) + 1.5 * decayed, rel=1e-6)
    found = {name: float(metric) for name, metric in loss.metrics.items()}
    expected = {"squared_distance": squares(far("kernel")), "squared_norm": decayed}
    assert found == pytest.approx(expected, rel=1e-6)


def test_l2_sp_begins_with_a_finite_gradient_of_zero():
    start = {**PARAMS, "body": SOURCE["body"]}
    gradients = jax.grad(lambda params: l2_sp(SOURCE, 0.5)(params, {}, BATCH, None, True).value)(start)
    assert not np.any(gradients["body"]["kernel"]) and not np.any(gradients["body"]["bias"])
    np.testing.assert_allclose(gradients["head"]["kernel"], 0.5 * PARAMS["head"]["kernel"], rtol=1e-6)
    moved = jax.grad(lambda params: l2_sp(SOURCE, 0.5)(params, {}, BATCH, None, True).value)(PARAMS)
    np.testing.assert_allclose(moved["body"]["kernel"], 0.5 * far("kernel"), rtol=1e-5)


def test_weights_beside_the_model_are_not_counted():
    extended = {"model": PARAMS, "aux": {"projector": draw(5)}}
    assert value(l2_sp(SOURCE), extended) == value(l2_sp({"model": SOURCE, "aux": {}})) == value(l2_sp(SOURCE))
    assert value(ewc(FISHER, SOURCE), extended) == value(ewc({"model": FISHER, "aux": {}}, SOURCE))


def test_half_precision_is_summed_in_float32():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    loss = l2_sp(SOURCE, 1.0)(half, {}, BATCH, None, True)
    assert loss.value.dtype == jnp.float32
    assert float(loss.value) == pytest.approx(value(l2_sp(SOURCE, 1.0)), rel=0.02)


@pytest.mark.parametrize("tuning", [tj.full(), tj.chain(low=tj.lora("body/kernel", 2), head=tj.train("head/**"))])
def test_a_step_with_l2_sp_beside_the_task_is_plain_sgd_on_the_sum(tuning):
    tx, objective = optax.sgd(0.1), tj.objectives.total(task=TASK, near=l2_sp(SOURCE, 0.3))
    state, frozen = tj.init(jax.random.key(0), MODEL, tuning, tx)

    def whole(trainable):
        params = tuning.merge(trainable, frozen)
        shared = sum(jnp.sum((params["body"][n] - SOURCE["body"][n]) ** 2) for n in ("bias", "kernel"))
        regular = 0.15 * (shared + jnp.sum(params["head"]["kernel"] ** 2))
        return TASK(params, {}, BATCH, None, True).value + regular

    expected = jax.tree.map(lambda w, g: w - 0.1 * g, state.trainable, jax.grad(whole)(state.trainable))
    after, metrics = tj.make_step(objective, tuning, tx)(state, frozen, BATCH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after.trainable, expected)
    assert metrics["loss"] == pytest.approx(float(metrics["task"] + metrics["near"]), rel=1e-6)


def test_ewc_weighs_each_distance_by_its_fisher_information():
    one = sum(float(np.sum(FISHER["body"][name] * far(name) ** 2)) for name in ("bias", "kernel"))
    assert value(ewc(FISHER, SOURCE)) == pytest.approx(0.5 * one, rel=1e-6)
    other = {"body": {"bias": FISHER["body"]["bias"], "kernel": tj.Hole()}}
    two = float(np.sum(FISHER["body"]["bias"] * far("bias") ** 2))
    assert value(ewc((FISHER, other), (SOURCE, BODY), 4.0)) == pytest.approx(2 * (one + two), rel=1e-6)


def log_gradient(x, label):
    """d log p(label | x) / d params, by hand in float64."""
    weights = jax.tree.map(lambda leaf: leaf.astype(np.float64), PARAMS)
    hidden = np.tanh(x @ weights["body"]["kernel"] + weights["body"]["bias"])
    logits = hidden @ weights["head"]["kernel"]
    p = np.exp(logits) / np.exp(logits).sum()
    to_logits = (np.arange(2) == label) - p
    to_hidden = weights["head"]["kernel"] @ to_logits * (1 - hidden**2)
    gradient = {"bias": to_hidden, "kernel": np.outer(x, to_hidden)}
    return p, {"body": gradient, "head": {"kernel": np.outer(hidden, to_logits)}}


def fisher_by_hand(labels=None):
    total = jax.tree.map(np.zeros_like, PARAMS)
    for number, x in enumerate(np.asarray(BATCH["inputs"], np.float64)):
        for label in (0, 1):
            p, gradient = log_gradient(x, label)
            share = p[label] if labels is None else float(labels[number] == label)
            total = jax.tree.map(lambda t, g, share=share: t + share * g**2 / 6, total, gradient)
    return total


def close(found, expected, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), found, expected)


@pytest.mark.parametrize("examples", [1, 4, 100])
def test_the_fisher_information_is_the_mean_of_squared_gradients(examples):
    close(diagonal_fisher(MODEL, [BATCH], examples=examples), fisher_by_hand())
    found = diagonal_fisher(MODEL, [BATCH], labels="data", examples=examples)
    close(found, fisher_by_hand(np.asarray(BATCH["labels"])))
    parts = [jax.tree.map(lambda x, part=part: x[part], BATCH) for part in (slice(0, 2), slice(2, 6))]
    close(diagonal_fisher(MODEL, parts, labels="data", examples=examples), found)
    soft = {**BATCH, "labels": jax.nn.one_hot(BATCH["labels"], 2)}
    close(diagonal_fisher(MODEL, [soft], labels="data"), found)


def test_examples_of_weight_zero_count_nothing_whatever_their_label():
    padded = {
        "inputs": jnp.concatenate([BATCH["inputs"], 9 * BATCH["inputs"][:2]]),
        "labels": np.append(BATCH["labels"], [-1, 7]),
        "weight": np.repeat([1.0, 0.0], [6, 2]),
    }
    close(diagonal_fisher(MODEL, [padded], labels="data"), diagonal_fisher(MODEL, [BATCH], labels="data"))


def test_drawn_labels_give_the_fisher_information_in_the_mean():
    many = {"inputs": jnp.tile(BATCH["inputs"], (5000, 1))}
    found = diagonal_fisher(MODEL, [many], key=jax.random.key(0), examples=1000)
    close(found, fisher_by_hand(), rtol=0.15)
    close(found, diagonal_fisher(MODEL, [many], key=jax.random.key(0), examples=700))


def test_a_part_of_the_fisher_information_protects_that_part():
    found = diagonal_fisher(MODEL, [BATCH], select="body/**")
    assert found["head"]["kernel"] == tj.Hole()
    close(found["body"], fisher_by_hand()["body"])
    assert value(ewc(found, MODEL.params)) == 0.0 < value(ewc(found, SOURCE))


def test_batch_norm_runs_in_inference_mode():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.bn, self.fc = nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.fc(self.bn(x))

    model = tj.interop.nnx(Net(nnx.Rngs(0)))
    inputs = BATCH["inputs"]
    p = np.asarray(jax.nn.softmax(model.apply(model.params, model.extra, inputs)[0]), np.float64)
    found = diagonal_fisher(model, [BATCH])
    np.testing.assert_allclose(found["fc"]["bias"], (p * (1 - p)).mean(0), rtol=1e-5)


def mixed(probability, seed):
    """What mixout makes of the weights of the body."""
    kept = jax.tree_util.Partial(lambda params, extra, batch, key, train: tj.Loss(jnp.zeros(()), params["body"], extra))
    objective = mixout(kept, BODY, probability, "body/**")
    return objective(PARAMS, {}, BATCH, jax.random.key(seed), True).metrics


def test_mixout_replaces_entries_so_that_the_expectation_is_the_weight():
    p, w, s = 0.3, PARAMS["body"]["kernel"].astype(np.float64), SOURCE["body"]["kernel"]
    found = mixed(p, 0)["kernel"]
    replaced, own = (s - p * s) / (1 - p), (w - p * s) / (1 - p)
    is_source = np.isclose(found, replaced, rtol=1e-5)
    np.testing.assert_allclose(found, np.where(is_source, replaced, own), rtol=1e-4, atol=1e-6)
    assert 0 < is_source.sum() < is_source.size
    every = jax.vmap(lambda seed: mixed(p, seed)["kernel"])(jnp.arange(20_000))
    np.testing.assert_allclose(every.mean(0), w, atol=0.04)
    np.testing.assert_allclose(np.isclose(every, replaced, rtol=1e-5).mean(), p, atol=0.01)
    np.testing.assert_allclose(mixed(0.0, 0)["kernel"], w, rtol=1e-6)


def test_mixout_leaves_inference_and_the_rest_alone():
    objective = mixout(TASK, BODY, 0.5, "body/**")
    assert value(objective, train=False) == value(TASK, train=False)
    assert value(objective, key=jax.random.key(0), train=False) == value(TASK, train=False)
    assert value(objective, key=jax.random.key(0)) != value(TASK)
    assert value(mixout(TASK, PARAMS, 0.9), key=jax.random.key(0)) == pytest.approx(value(TASK), rel=1e-4)
    extended = {"model": PARAMS, "aux": {"shift": draw(2)}}
    whole = lambda params, extra, batch, key, train: tj.Loss(jnp.sum(params["aux"]["shift"]), {}, extra)
    found = value(mixout(whole, BODY, 0.5, "body/**"), extended, jax.random.key(0))
    assert found == pytest.approx(float(extended["aux"]["shift"].sum()), rel=1e-6)


def test_mixout_trains_in_a_step():
    tuning, tx = tj.train("body/**"), optax.sgd(0.1)
    step = tj.make_step(mixout(TASK, BODY, jnp.float32(0.5), "body/**"), tuning, tx)
    state, frozen = tj.init(jax.random.key(0), MODEL, tuning, tx)
    state, metrics = step(state, frozen, BATCH)
    assert bool(metrics["finite"]) and np.any(state.trainable["body"]["kernel"] != PARAMS["body"]["kernel"])


WIDE = {**SOURCE, "head": {"kernel": draw(4, 9)}}
FC, SQUARES = {"fc": {"kernel": draw(4, 9) ** 2}}, jax.tree.map(np.square, PARAMS)
RAISES = [
    (lambda: l2_sp(SOURCE, -1.0), r"l2_sp\(\) expects strength as a number of at least 0, got -1.0"),
    (lambda: l2_sp(SOURCE, head_strength="1"), r"l2_sp\(\) expects head_strength as a number of at least 0, got '1'"),
    (lambda: ewc(FISHER, SOURCE, True), r"ewc\(\) expects strength as a number of at least 0, got True"),
    (lambda: l2_sp(MODEL), r"l2_sp\(\) expects params, got a Model: write model\.params"),
    (lambda: ewc(FISHER, MODEL), r"ewc\(\) expects params, got a Model: write model\.params"),
    (lambda: mixout(TASK, MODEL, 0.5), r"mixout\(\) expects params, got a Model: write model\.params"),
    (lambda: value(l2_sp({"other": draw(2)})), r"l2_sp\(\) found no leaf to hold near its reference: they share no pa"),
    (lambda: value(l2_sp(WIDE)), r"l2_sp\(\): 'head/kernel' is \(4, 2\) float32 here and \(4, 9\) float32 there\. Exp"),
    (lambda: value(l2_sp(SOURCE, head="**/bias")), r"l2_sp\(\): 'head/kernel' has no counterpart\..* Expected equal p"),
    (lambda: value(l2_sp(SOURCE, head="haed/**")), r"selector 'haed/\*\*' matched none of 3 parameters"),
    (lambda: ewc([FISHER], [SOURCE, SOURCE]), r"expects one reference for each former task, got 1 of fisher and 2 of"),
    (lambda: ewc([], []), r"expects one reference for each former task, got 0 of fisher and 0 of reference"),
    (lambda: value(ewc(FC, SOURCE)), r"ewc\(\): 'fc/kernel' has no counterpart\. Nearest: body/kern"),
    (lambda: value(ewc(SQUARES, WIDE)), r"ewc\(\): 'head/kernel' is \(4, 2\) float32 here and \(4, 9\) float32 there"),
    (lambda: value(mixout(TASK, BODY, 0.5), key=jax.random.key(0)), r"mixout\(\): 'head/kernel' has no counterpart"),
    (lambda: value(mixout(TASK, BODY, 0.5)), r"mixout\(\) needs a key in training: pass key=jax\.random\.key"),
    *[
        (functools.partial(mixout, TASK, BODY, p), r"mixout\(\) expects probability as a number in \[0, 1\), got")
        for p in (1.0, -0.1, "0.5", True, None, float("nan"))
    ],
    (lambda: ewc(SOURCE, FISHER), r"ewc\(\) got a Fisher information below 0 at body/bias, .*ewc\(fisher, reference\)"),
    (lambda: l2_sp(0.1, SOURCE), r"l2_sp\(\) expects strength as a number of at least 0, got dict"),
    (lambda: diagonal_fisher([BATCH], MODEL), r"diagonal_fisher\(\) expects a Model first, got list: use tj.interop"),
    (lambda: diagonal_fisher(MODEL, BATCH), r"diagonal_fisher\(\) expects batches, got dict: of one, write \[batch\]"),
    (lambda: diagonal_fisher(MODEL, [BATCH], labels="true"), r"expects labels as 'model' or 'data', got 'true'"),
    (
        lambda: diagonal_fisher(MODEL, [BATCH], labels="data", key=jax.random.key(0)),
        r"diagonal_fisher\(\) draws no labels from the data: leave key out, or write labels='model'",
    ),
    (lambda: diagonal_fisher(MODEL, [BATCH], examples=0), r"expects a whole number of at least 1 as examples, got 0"),
    (lambda: diagonal_fisher(MODEL, []), r"diagonal_fisher got no example\. Expected batches with inputs"),
    (
        lambda: diagonal_fisher(MODEL, [{"inputs": BATCH["inputs"]}], labels="data"),
        r"the batch has no 'labels': it has \['inputs'\]\. Expected inputs and labels\.",
    ),
    (
        lambda: diagonal_fisher(MODEL, [{**BATCH, "labels": BATCH["labels"] + 5}], labels="data"),
        r"the Fisher information is not finite at body/bias, body/kernel, head/kernel\. Expected finite inputs",
    ),
    (
        lambda: diagonal_fisher(MODEL._replace(apply=lambda p, e, x: (x.sum(1) * p["body"]["bias"][0], e)), [BATCH]),
        r"the model's outputs are \(6,\) float32; diagonal_fisher needs logits \[B, C\]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), RAISES)
def test_what_does_not_fit_raises(call, message):
    with pytest.raises(tj.TransferError, match=message):
        call()
