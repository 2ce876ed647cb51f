"""Units of one network in the order of another's: copies are found again bit by bit, and means get better."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import transferjax as tj
from transferjax._errors import DataError, SelectionError, TransferError
from transferjax.merging._permutations import apply_permutations, leaves_of, resolve
from transferjax.merging._rebasin import match_activations, rebasin
from transferjax.merging._symmetries import permutation_spec
from transferjax.models import _efficientnet_lite, _llama, _vit

MLP = {
    "P0": [("dense1/kernel", 1), ("dense1/bias", 0), ("dense2/kernel", 0)],
    "P1": [("dense2/kernel", 1), ("dense2/bias", 0), ("dense3/kernel", 0)],
}


def mlp_params(seed, *widths):
    random = np.random.default_rng(seed)
    layer = lambda a, b: {
        "kernel": jnp.asarray(random.normal(size=(a, b)) * (2 / a) ** 0.5, jnp.float32), "bias": jnp.zeros(b)
    }  # fmt: skip
    return {f"dense{n}": layer(a, b) for n, (a, b) in enumerate(itertools.pairwise(widths), 1)}


def hidden(params, x):
    x = x @ params["dense1"]["kernel"] + params["dense1"]["bias"]
    y = jax.nn.relu(x) @ params["dense2"]["kernel"] + params["dense2"]["bias"]
    return {"P0": jax.nn.relu(x), "P1": jax.nn.relu(y)}


def mlp(params, extra, x, *, key=None, train=False):
    return hidden(params, x)["P1"] @ params["dense3"]["kernel"] + params["dense3"]["bias"], extra


class CNN(nnx.Module):
    """Convolutions with BatchNorm: a residual one, a depthwise one, and a dense layer on flattened features."""

    def __init__(self, rngs):
        conv = partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        self.stem, self.stem_bn = conv(3, 12), nnx.BatchNorm(12, use_running_average=True, rngs=rngs)
        self.block, self.block_bn = conv(12, 12), nnx.BatchNorm(12, use_running_average=True, rngs=rngs)
        self.depthwise = conv(12, 12, feature_group_count=12)
        self.dense, self.head = nnx.Linear(12 * 16, 20, rngs=rngs), nnx.Linear(20, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem_bn(self.stem(x)))
        x = x + nnx.relu(self.block_bn(self.block(x)))
        x = nnx.avg_pool(self.depthwise(x), (2, 2), (2, 2))
        return self.head(nnx.relu(self.dense(x.reshape(len(x), -1))))


def drawn(make, seed=0):
    """A module as a Model with every leaf drawn at random: scales and variances about 1, means about 0."""
    model = tj.interop.nnx(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    random = np.random.default_rng(seed)
    weight = lambda x: jnp.asarray(random.normal(size=x.shape) * (x.size // x.shape[-1]) ** -0.5, x.dtype)
    vector = lambda x: jnp.asarray(random.uniform(0.5, 1.5, x.shape), x.dtype)
    params = {path: weight(x) if x.ndim > 1 else vector(x) for path, x in tj.paths(model.params).items()}
    extra = {path: vector(x) - path.endswith("mean") for path, x in tj.paths(model.extra).items()}
    return model._replace(params=tj.tree.nest(params), extra=tj.tree.nest(extra))


IMAGE, TOKENS = jax.random.normal(jax.random.key(0), (3, 8, 8, 3)), jnp.array([[5, 1, 3, 2], [0, 7, 7, 1]])
LLAMA = dict(layers=2, width=16, heads=4, kv_heads=2, hidden=20, vocabulary=24, positions=20)
LITE0 = _efficientnet_lite.VARIANTS["efficientnet_lite0"]
NETWORKS = {
    "MLP": (
        lambda: tj.Model(mlp, None, mlp_params(0, 6, 32, 24, 3), {}), jnp.arange(18.0).reshape(3, 6) % 5, 2),
    "CNN with BatchNorm": (lambda: drawn(CNN), IMAGE, 2),
    "EfficientNet": (
        lambda: drawn(lambda rngs: _efficientnet_lite.EfficientNetLite(
            _efficientnet_lite.Variant(0.25, 0.25, 32, 0.0), 5, rngs=rngs)),
        jax.random.normal(jax.random.key(1), (2, 32, 32, 3)), 15),
    "ViT": (lambda: drawn(lambda rngs: _vit.ViT(_vit.Variant(4, 24, 2, 3, size=8), 5, rngs=rngs)), IMAGE, 9),
    "Llama": (lambda: drawn(lambda rngs: _llama.Llama(_llama.Variant(**LLAMA), 5, rngs=rngs)), TOKENS, 9),
    "Llama, scanned": (
        lambda: drawn(lambda rngs: _llama.Llama(_llama.Variant(**LLAMA, scanned=True), 5, rngs=rngs)), TOKENS, 5),
}  # fmt: skip


def shuffled(source, spec, seed):
    random = np.random.default_rng(seed)
    orders = {name: random.permutation(group.size) for name, group in resolve(spec, leaves_of(source)).items()}
    return apply_permutations(source, spec, orders), orders


def same_bits(a, b):
    bits = lambda leaf: (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes())
    return jax.tree.map(bits, leaves_of(a)) == jax.tree.map(bits, leaves_of(b))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_with_permuted_units_computes_the_same_and_is_found_again_bit_by_bit(name):
    make, inputs, groups = NETWORKS[name]
    model = make()
    spec = permutation_spec(model, inputs)
    assert len(spec) == groups
    other, orders = shuffled(model, spec, 1)
    assert not same_bits(model, other)
    outputs, again = (jax.jit(one.apply)(one.params, one.extra, inputs)[0] for one in (model, other))
    assert np.std(outputs, 0).max() > 1e-3
    np.testing.assert_allclose(again, outputs, rtol=0, atol=1e-5 * float(jnp.abs(outputs).max()))
    found = rebasin(model, other, spec)
    assert same_bits(found.aligned, model)
    assert all((found.permutations[group] == np.argsort(order)).all() for group, order in orders.items())
    assert found.report.metadata["squared distance after"] == 0 < found.report.metadata["squared distance before"]


@pytest.mark.slow
def test_efficientnet_lite0_is_found_again():
    model = drawn(lambda rngs: _efficientnet_lite.EfficientNetLite(LITE0, 10, rngs=rngs))
    spec = permutation_spec(model, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert same_bits(rebasin(model, shuffled(model, spec, 1)[0], spec).aligned, model)


def test_units_that_are_next_to_dead_are_told_apart():
    params = mlp_params(0, 6, 64, 48, 3)
    faint = {name: {"kernel": layer["kernel"] * np.where(np.arange(layer["kernel"].shape[1]) % 2, 1, 1e-9)}
             for name, layer in params.items()}  # fmt: skip
    spec = {name: [entry for entry in entries if "kernel" in entry[0]] for name, entries in MLP.items()}
    assert same_bits(rebasin(faint, shuffled(faint, spec, 1)[0], spec).aligned, faint)


def test_units_that_a_leaf_holds_on_two_axes_are_found_again():
    random = np.random.default_rng(0)
    cell = {"in": random.normal(size=(2, 30)), "turn": random.normal(size=(30, 30)), "out": random.normal(size=(30, 2))}
    spec = {"state": [("in", 1), ("turn", 0), ("turn", 1), ("out", 0)]}
    assert same_bits(rebasin(cell, shuffled(cell, spec, 1)[0], spec).aligned, cell)


def test_a_noisy_copy_is_aligned_unit_by_unit():
    params = mlp_params(0, 6, 64, 48, 3)
    noisy = jax.tree.map(lambda x: x + 0.02 * np.random.default_rng(x.size).normal(size=x.shape).astype("f"), params)
    other, orders = shuffled(noisy, MLP, 1)
    found = rebasin(params, other, MLP)
    assert same_bits(found.aligned, noisy)
    assert found.report.column("moved") == [int((order != np.arange(len(order))).sum()) for order in orders.values()]
    before, after = found.report.column("cosine before"), found.report.column("cosine after")
    assert max(before) < 0.3 and min(after) > 0.95
    assert found.report.column("units") == [64, 48] and found.report.column("leaves") == [3, 3]


def test_one_group_gets_the_best_of_all_permutations():
    one, other = mlp_params(0, 3, 5, 2), mlp_params(1, 3, 5, 2)
    spec = {"P0": [("dense1/kernel", 1), ("dense2/kernel", 0)]}
    distance = lambda tree: sum(
        float(((np.float64(one[name]["kernel"]) - np.float64(tree[name]["kernel"])) ** 2).sum()) for name in one
    )
    every = [distance(apply_permutations(other, spec, {"P0": order})) for order in itertools.permutations(range(5))]
    found = rebasin(one, other, spec)
    assert distance(found.aligned) == min(every) == pytest.approx(found.report.metadata["squared distance after"])
    assert found.report.metadata["squared distance before"] == pytest.approx(distance(other))


def test_more_orders_are_never_worse_and_one_seed_gives_one_result():
    one, other = mlp_params(0, 6, 24, 24, 24, 3), mlp_params(1, 6, 24, 24, 24, 3)
    spec = {f"P{n}": [(f"dense{n}/kernel", 1), (f"dense{n}/bias", 0), (f"dense{n + 1}/kernel", 0)] for n in range(1, 4)}
    runs = [rebasin(one, other, spec, orders=n, seed=s) for n, s in ((1, 0), (6, 0), (6, 0), (1, 9))]
    few, more, again, other_seed = (run.report.metadata["squared distance after"] for run in runs)
    assert more <= few and more == again and few == other_seed
    assert same_bits(runs[1].aligned, runs[2].aligned)
    short = rebasin(one, other, spec, iterations=1).report.metadata
    assert few <= short["squared distance after"] <= short["squared distance before"]
    assert short["passes"] == 2


def test_a_network_that_is_aligned_stays_as_it_is():
    params = mlp_params(0, 6, 24, 16, 3)
    found = rebasin(params, jax.tree.map(lambda x: x + 0.01, params), MLP)
    assert found.report.metadata["start"] == "none" and found.report.column("moved") == [0, 0]


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return (images[order] / 16).astype("f"), labels[order]


TRAINED = 1200


def trained(model, images, labels, steps=150):
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, extra, opt_state):
        def loss(params):
            logits, new = model.apply(params, extra, images[:TRAINED], train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[:TRAINED]).mean(), new

        grads, extra = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), extra, opt_state

    params, extra, opt_state = model.params, model.extra, tx.init(model.params)
    for _ in range(steps):
        params, extra, opt_state = step(params, extra, opt_state)
    return model._replace(params=params, extra=extra)


def accuracy(model, images, labels):
    logits, _ = model.apply(model.params, model.extra, images[TRAINED:])
    return float((logits.argmax(-1) == labels[TRAINED:]).mean())


def mean(a, b):
    middle = lambda x, y: (x + y) / 2
    return a._replace(params=jax.tree.map(middle, a.params, b.params), extra=jax.tree.map(middle, a.extra, b.extra))


@pytest.fixture(scope="module")
def pair(digits):
    return [trained(tj.Model(mlp, None, mlp_params(seed, 64, 64, 64, 10), {}), *digits) for seed in (1, 2)]


def test_the_mean_of_two_networks_trained_apart_gets_better(pair, digits):
    one, other = pair
    found = rebasin(one, other, permutation_spec(one, digits[0][:1]))
    before, after = accuracy(mean(one, other), *digits), accuracy(mean(one, found.aligned), *digits)
    assert accuracy(found.aligned, *digits) == accuracy(other, *digits)
    assert after > before + 0.1


def test_units_matched_by_what_they_compute_make_the_mean_better_too(pair, digits):
    one, other = pair
    orders = match_activations(hidden(one.params, digits[0][:TRAINED]), hidden(other.params, digits[0][:TRAINED]))
    aligned = apply_permutations(other, MLP, orders)
    assert accuracy(mean(one, aligned), *digits) > accuracy(mean(one, other), *digits) + 0.1


class Normalised(nnx.Module):
    def __init__(self, rngs):
        self.dense1, self.bn1 = nnx.Linear(64, 64, rngs=rngs), nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.dense2, self.bn2 = nnx.Linear(64, 64, rngs=rngs), nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.dense1(x)))
        return self.head(nnx.relu(self.bn2(self.dense2(x))))


def test_statistics_estimated_again_repair_the_mean_of_networks_with_batchnorm(digits):
    one, other = (trained(tj.interop.nnx(Normalised(nnx.Rngs(seed))), *digits) for seed in (1, 2))
    middle = mean(one, rebasin(one, other, permutation_spec(one, digits[0][:1])).aligned)
    batches = [{"inputs": digits[0][:TRAINED]}]
    repaired = middle._replace(extra=tj.interop.reestimate_statistics(middle, middle.params, batches))
    assert accuracy(repaired, *digits) > accuracy(middle, *digits)


def test_activations_of_permuted_units_are_matched_whatever_their_scale():
    random = np.random.default_rng(0)
    maps = random.normal(size=(4, 3, 3, 7))
    maps[..., 2] = 1.0  # never changes
    order = random.permutation(7)
    found = match_activations(
        {"P0": maps, "P1": maps[..., :2]}, {"P0": 3 * maps[..., order] - 1, "P1": maps[..., 1::-1]}
    )
    assert found["P0"].tolist() == np.argsort(order).tolist() and found["P1"].tolist() == [1, 0]


def test_activations_that_cannot_be_compared_are_refused():
    with pytest.raises(DataError, match=r"activations of P1 are of one network only. Expected the same groups of both"):
        match_activations({"P0": np.ones((3, 2))}, {"P0": np.ones((3, 2)), "P1": np.ones((3, 2))})
    with pytest.raises(DataError, match=r"activations of 'P0' are \(3, 2\) float64 and \(3, 4\) float64"):
        match_activations({"P0": np.ones((3, 2))}, {"P0": np.ones((3, 4))})
    for table in (np.ones((1, 2)), np.full((3, 2), np.nan)):
        with pytest.raises(DataError, match=r"rows, or some that are not finite. Expected at least 2 rows"):
            match_activations({"P0": table}, {"P0": table})


def test_networks_that_are_unlike_are_refused():
    params = mlp_params(0, 6, 8, 8, 3)
    with pytest.raises(DataError, match="dense3/bias"):
        rebasin(params, {**params, "dense3": {"kernel": params["dense3"]["kernel"]}}, MLP)
    with pytest.raises(DataError, match=r"'dense2/bias' is \(8,\) float32 in the reference and \(9,\) float32"):
        rebasin(params, mlp_params(0, 6, 8, 9, 3), MLP)


def test_what_rebasin_cannot_do_it_says():
    params = mlp_params(0, 6, 8, 8, 3)
    with pytest.raises(
        TransferError, match="expects orders and iterations of at least 1, got orders=0, iterations=100"
    ):
        rebasin(params, params, MLP, orders=0)
    with pytest.raises(SelectionError, match=r"path 'dense9/bias' matched none of 6 leaves. Nearest: dense"):
        rebasin(params, params, {"P0": [("dense9/bias", 0)]})
    with pytest.raises(SelectionError, match=r"group 'P0' has only statistics \(extra/...\), and units are compared"):
        rebasin({"extra": {"mean": np.ones(3)}}, {"extra": {"mean": np.ones(3)}}, {"P0": [("extra/mean", 0)]})
    with pytest.raises(DataError, match="'dense1/bias' holds NaN or infinite weights: they match nothing"):
        rebasin(params, {**params, "dense1": {**params["dense1"], "bias": jnp.full(8, jnp.nan)}}, MLP)
