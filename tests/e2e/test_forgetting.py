"""Two tasks, one after the other: what of the first is left, with elastic weight consolidation and without."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj

SEEDS, STRENGTH = (0, 1, 2), 50.0
SHUFFLED = np.random.default_rng(0).permutation(784)  # the second task: the same images with their pixels shuffled


def network(params, x):
    for layer in ("first", "second"):
        x = jax.nn.relu(x @ params[layer]["kernel"] + params[layer]["bias"])
    return x @ params["head"]["kernel"]


def fresh(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    widths = {"first": (784, 256), "second": (256, 256), "head": (256, 10)}
    draw = lambda key, pair: jax.random.normal(key, pair) * (2 / pair[0]) ** 0.5
    params = {
        name: {"kernel": draw(key, pair), "bias": jnp.zeros(pair[1])} for key, (name, pair) in zip(keys, widths.items())
    }
    del params["head"]["bias"]
    return tj.interop.pure(network, params)


def images(split):
    parts = list(tj.data.batches(tj.data.open("sample", split), 500, shuffle=False))
    pixels = np.concatenate([np.asarray(part["inputs"]) for part in parts]).reshape(-1, 784)
    return pixels.astype(np.float32) / 255, np.concatenate([np.asarray(part["labels"]) for part in parts])


def trained(model, inputs, labels, objective, steps, seed):
    tuning, tx = tj.full(), optax.adam(1e-3)
    step, rng = tj.make_step(objective, tuning, tx), np.random.default_rng(seed)
    state, frozen = tj.init(jax.random.key(seed), model, tuning, tx)
    for _ in range(steps):
        rows = rng.integers(0, len(inputs), 64)
        state, _ = step(state, frozen, {"inputs": inputs[rows], "labels": labels[rows]})
    return model._replace(params=tuning.merge(state.trainable, frozen))


@pytest.mark.slow
def test_ewc_forgets_less_of_the_first_task_at_equal_accuracy_on_the_second():
    (inputs, labels), (test, wanted) = images("train"), images("test")
    right = lambda model, x: float((np.argmax(model.apply(model.params, {}, x)[0], -1) == wanted).mean())
    found = {"plain": [], "ewc": []}
    for seed in SEEDS:
        model = fresh(seed)
        task = tj.objectives.cross_entropy(model.apply)
        first = trained(model, inputs, labels, task, 400, seed)
        fisher = tj.objectives.diagonal_fisher(first, [{"inputs": inputs, "labels": labels}])
        keep = tj.objectives.ewc(fisher, first.params, STRENGTH)
        for name, objective in (("plain", task), ("ewc", tj.objectives.total(task=task, keep=keep))):
            second = trained(first, inputs[:, SHUFFLED], labels, objective, 300, seed + 10)
            found[name].append((right(second, test), right(second, test[:, SHUFFLED])))
    plain, ewc = (np.mean(found[name], axis=0) for name in ("plain", "ewc"))
    print(f"first and second task: plain {plain.round(4)}, ewc {ewc.round(4)}")
    assert ewc[0] > plain[0] + 0.03  # what is left of the first task
    assert ewc[1] > plain[1] - 0.01


def test_l2_sp_starts_with_a_finite_gradient_of_zero():
    model = fresh(0)
    gradient = jax.grad(lambda params: tj.objectives.l2_sp(model.params)(params, {}, {}, None, True).value)(
        model.params
    )
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)
