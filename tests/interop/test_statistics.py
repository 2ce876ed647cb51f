import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from transferjax import interop
from transferjax._errors import DataError, TransferError
from transferjax.tree import paths


@pytest.mark.parametrize(
    ("steps", "remaining", "expected"),
    [(1, 0.01, 0.01), (75, 0.01, 0.9404), (75, 0.001, 0.9120), (75, 0.5, 0.99), (100_000, 0.01, 0.99)],
)
def test_momentum_for_steps_forgets_in_time(steps, remaining, expected):
    momentum = interop.momentum_for_steps(steps, remaining)
    assert momentum == pytest.approx(expected, abs=1e-4)
    assert momentum**steps <= remaining + 1e-9 or momentum == 0.99


@pytest.mark.parametrize(("steps", "remaining"), [(0, 0.01), (5, 0.0), (5, 1.0)])
def test_momentum_for_steps_of_nothing(steps, remaining):
    with pytest.raises(TransferError, match=r"expects steps >= 1 and 0 < remaining < 1, got steps="):
        interop.momentum_for_steps(steps, remaining)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_the_momentum_of_every_batch_norm_is_replaced(model, x, key, momentum):
    batch = interop.batch_norm_momentum(model, 0.0)
    batch = batch.apply(batch.params, batch.extra, x, train="bn")[1]["bn"]
    changed = interop.batch_norm_momentum(model, momentum)
    extra = changed.apply(changed.params, changed.extra, x, train="bn")[1]["bn"]
    for name in ("mean", "var"):
        expected = momentum * model.extra["bn"][name] + (1 - momentum) * batch[name]
        np.testing.assert_allclose(extra[name], expected, rtol=1e-6, atol=1e-7)


def test_the_outermost_momentum_counts(model, x):
    twice = interop.batch_norm_momentum(interop.batch_norm_momentum(model, 0.0), 1.0)
    extra = twice.apply(twice.params, twice.extra, x, train="bn")[1]
    assert np.array_equal(extra["bn"]["mean"], model.extra["bn"]["mean"])


@pytest.mark.parametrize(("momentum", "shown"), [(1.5, "1.5"), (-1, "-1"), ("a", "str"), (True, "True")])
def test_a_momentum_that_is_none(models, momentum, shown):
    with pytest.raises(TransferError, match=rf"expects a static number in \[0, 1\], got {shown}"):
        interop.batch_norm_momentum(models["nnx"], momentum)


def batches(sizes=(3, 4, 1)):
    rng = np.random.default_rng(0)
    return [{"inputs": rng.normal(size=(n, 6, 6, 2)).astype(np.float32) * n + 1} for n in sizes]


def convolved(model, inputs):
    return model.capture(model.params, model.extra, inputs, "conv")[2]["conv"]


def test_one_batch_gives_exactly_its_own_statistics(model):
    (batch,) = batches((4,))
    zero = interop.batch_norm_momentum(model, 0.0)
    expected = jax.jit(lambda p, e, i: zero.apply(p, e, i, train="bn")[1])(model.params, model.extra, batch["inputs"])
    extra = interop.reestimate_statistics(model, model.params, [batch], train="bn")
    assert np.array_equal(extra["bn"]["mean"], expected["bn"]["mean"])
    assert np.array_equal(extra["bn"]["var"], expected["bn"]["var"])


def test_several_batches_of_any_size_give_the_statistics_of_all_examples(model):
    extra = interop.reestimate_statistics(model, model.params, iter(batches()), train="bn")
    every = convolved(model, np.concatenate([b["inputs"] for b in batches()]))
    np.testing.assert_allclose(extra["bn"]["mean"], every.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(extra["bn"]["var"], every.var((0, 1, 2)), rtol=1e-4)
    assert jax.tree.structure(extra) == jax.tree.structure(model.extra)


def test_train_true_needs_a_key_for_dropout(model, key):
    extra = interop.reestimate_statistics(model, model.params, batches(), key=key)
    only = interop.reestimate_statistics(model, model.params, batches(), train="bn")
    np.testing.assert_allclose(extra["bn"]["mean"], only["bn"]["mean"], rtol=1e-6)


def test_examples_of_weight_zero_are_left_out(model):
    (batch,) = batches((4,))
    padded = {"inputs": np.concatenate([batch["inputs"], 100 + batch["inputs"]]), "weight": np.repeat([1.0, 0.0], 4)}
    whole = {**batch, "weight": np.ones(4)}
    expected = interop.reestimate_statistics(model, model.params, [whole], train="bn")
    extra = interop.reestimate_statistics(model, model.params, [padded], train="bn")
    assert np.array_equal(extra["bn"]["var"], expected["bn"]["var"])


def test_it_starts_from_a_given_extra_and_is_compiled_once(models):
    model = models["nnx"]
    start = {"bn": {"mean": jnp.ones(3), "var": jnp.ones(3)}}
    first = interop.reestimate_statistics(model, model.params, batches((4,)), extra=start, train="bn")
    from transferjax.interop._statistics import _pool

    before = _pool._cache_size()
    again = interop.reestimate_statistics(model, model.params, batches((4,)), train="bn")
    assert _pool._cache_size() == before
    assert np.array_equal(first["bn"]["mean"], again["bn"]["mean"])


def two_norms(params, extra, x):
    new = {}
    for name in ("a", "b"):
        mean, var = extra[name]["mean"], extra[name]["var"]
        if interop.training(name):
            m = interop.momentum_in_use()
            mean, var = x.mean(0), x.var(0)
            new[name] = {
                "mean": m * extra[name]["mean"] + (1 - m) * mean,
                "var": m * extra[name]["var"] + (1 - m) * var,
            }
        else:
            new[name] = extra[name]
        x = (x - mean) / jnp.sqrt(var + 1e-5) + 1
    return x, {**new, "other": extra["other"]}


def test_modules_that_are_not_selected_keep_their_bits():
    norm = {"mean": jnp.full(2, 0.1), "var": jnp.full(2, 0.3)}
    model = interop.pure(two_norms, {}, {"a": norm, "b": norm, "other": {"mean": jnp.ones(1)}})
    data = [{"inputs": jax.random.normal(jax.random.key(k), (8, 2))} for k in range(3)]
    extra = interop.reestimate_statistics(model, {}, data, train="b")
    same = {path: np.array_equal(leaf, paths(model.extra)[path]) for path, leaf in paths(extra).items()}
    assert same == {"a/mean": True, "a/var": True, "b/mean": False, "b/var": False, "other/mean": True}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expects at least one batch, got none"),
        ([{"images": 1}], r"batch 0: expected a dict with 'inputs', got keys \['images'\]"),
        ([3], "batch 0: expected a dict with 'inputs', got int"),
        ([{"inputs": np.zeros((2, 6, 6, 2), np.float32), "weight": np.zeros(2)}], "batch 0 has no example"),
    ],
)
def test_bad_batches(models, data, message):
    with pytest.raises(DataError, match=message):
        interop.reestimate_statistics(models["nnx"], models["nnx"].params, data)


def test_nothing_to_estimate(models):
    message = r"found {} BatchNorms .* and train={} selects none of them. Write for example"
    with pytest.raises(TransferError, match=message.format(1, "'head'")):
        interop.reestimate_statistics(models["nnx"], models["nnx"].params, batches(), train="head")
    with pytest.raises(TransferError, match=message.format(0, "True")):
        interop.reestimate_statistics(interop.pure(lambda p, x: x, {}), {}, batches())


class DigitsNet(nnx.Module):
    def __init__(self, rngs):
        widths = (1, 16, 32)
        self.convolutions = nnx.List(
            [nnx.Conv(a, b, (3, 3), strides=2, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for width in widths[1:]])
        self.head = nnx.Linear(32 * 4, 10, rngs=rngs)

    def __call__(self, x):
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x)))
        return self.head(x.reshape(len(x), -1))


def trained(model, images, labels, steps=75):
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params, extra, state, x, y):
        def loss(params):
            logits, new = model.apply(params, extra, x, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        gradients, extra = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), extra, state

    params, extra, state = model.params, model.extra, tx.init(model.params)
    for number in range(steps):
        at = number * 32 % 480
        params, extra, state = step(params, extra, state, images[at : at + 32], labels[at : at + 32])
    return params, extra


def test_seventy_five_steps_on_500_digits_do_not_leave_stale_statistics():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels[order]
    source = interop.nnx(DigitsNet(nnx.Rngs(0)))
    far = jax.tree.map(lambda leaf: jnp.full_like(leaf, 5), source.extra)  # a source unlike the digits
    source = source._replace(extra=far)

    def accuracy(params, extra):
        return float((source.apply(params, extra, images[500:])[0].argmax(-1) == labels[500:]).mean())

    params, stale = trained(source, images[:500], labels[:500])
    data = [{"inputs": images[at : at + 100]} for at in range(0, 500, 100)]
    assert accuracy(params, stale) < 0.8
    assert accuracy(params, interop.reestimate_statistics(source, params, data)) > 0.93
    quick = interop.batch_norm_momentum(source, interop.momentum_for_steps(75))
    assert accuracy(*trained(quick, images[:500], labels[:500])) > 0.93
