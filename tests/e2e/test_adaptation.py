"""Domain adaptation from end to end: digits whose copies are noisy, turned or inverted, without labels for these.

The weights of the alignment losses were chosen with other seeds (3 and 4), on the shifted copies of the training
images. What is asked for holds on average over three seeds: where a shift leaves no more than chance, as inversion
does, a single run can lose several points.
"""

import itertools

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import ndimage

import transferjax as tj

STEPS, BATCH, WIDTH, TRAIN, SEEDS = 600, 64, 64, 1200, (0, 1, 2)
SHIFTS = {
    "rotation": lambda x: ndimage.rotate(x, 30, axes=(2, 1), reshape=False, order=1),
    "noise": lambda x: np.clip(x + np.random.default_rng(1).normal(size=x.shape) * 0.3, 0, 1),
    "inversion": lambda x: 1 - x,
}


class Network(nnx.Module):
    def __init__(self, rngs):
        self.one, self.norm1 = nnx.Conv(1, 16, (3, 3), rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.two, self.norm2 = nnx.Conv(16, 32, (3, 3), rngs=rngs), nnx.BatchNorm(32, rngs=rngs)
        self.body, self.features = nnx.Linear(128, WIDTH, rngs=rngs), nnx.BatchNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        pool = lambda x: nnx.avg_pool(x, (2, 2), (2, 2))
        x = pool(nnx.relu(self.norm1(self.one(x))))
        x = pool(nnx.relu(self.norm2(self.two(x))))
        return self.head(nnx.relu(self.features(self.body(x.reshape(len(x), -1)))))


def prepared(images):
    return (2 * images[..., None] - 1).astype(np.float32)


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order].reshape(-1, 8, 8) / 16, labels[order]


def batches(digits, seed, target=None):
    """Labelled examples of the source, and as many without labels of the target, drawn on their own."""
    rng = np.random.default_rng(seed)
    images, labels = prepared(digits[0][:TRAIN]), digits[1][:TRAIN]
    while True:
        rows, others = rng.integers(0, TRAIN, BATCH), rng.integers(0, TRAIN, BATCH)
        batch = {"inputs": images[rows], "labels": labels[rows]}
        yield batch if target is None else {**batch, "target_inputs": target[others]}


def trained(model, objective, tuning, tx, data):
    step = tj.make_step(objective, tuning, tx)
    state, frozen = tj.init(jax.random.key(1), model, tuning, tx)
    for batch in itertools.islice(data, STEPS):
        state, _ = step(state, frozen, batch)
    return model._replace(params=tuning.merge(state.trainable, frozen), extra=state.extra)


def rate(peak):
    return tj.optim.warmup_cosine(peak, STEPS)


@pytest.fixture(scope="module")
def sources(digits):
    """Per seed the network of the source, from which adaptation starts; and the same one after as many steps more
    without adaptation, which it has to beat."""

    def run(model, seed):
        objective = tj.objectives.cross_entropy(model.apply)
        return trained(model, objective, tj.full(), optax.adam(rate(2e-3)), batches(digits, seed))

    first = {seed: run(tj.interop.nnx(Network(nnx.Rngs(seed))), seed) for seed in SEEDS}
    return {seed: (model, run(model, seed)) for seed, model in first.items()}


def coral(model, digits, seed, target):
    objective = tj.objectives.adapt(
        tj.objectives.cross_entropy, model, tj.objectives.losses.coral, at="features", weight=3.0
    )
    return trained(model, objective, tj.full(), optax.adam(rate(2e-3)), batches(digits, seed, target))


def dann(model, digits, seed, target):
    init = tj.objectives.discriminator(WIDTH, hidden=(128,))
    model = tj.extend(model, "discriminator", init, key=jax.random.key(5 + seed))
    objective = tj.objectives.dann(tj.objectives.cross_entropy, model, at="features", steps=STEPS, weight=0.1)
    tuning = tj.chain(network=tj.train("model/**"), discriminator=tj.train("aux/**"))
    tx = tj.per_group(network=optax.adam(rate(2e-3)), discriminator=optax.adam(rate(6e-3), b1=0.5))
    return trained(model, objective, tuning, tx, batches(digits, seed, target))


def accuracy(model, images, labels):
    outputs, _ = model.apply(model.params, model.extra, images)
    return float((np.asarray(outputs).argmax(1) == labels).mean())


@pytest.mark.slow
@pytest.mark.parametrize("method", [coral, dann])
def test_labels_of_the_source_alone_win_back_a_third_of_what_a_shift_costs(digits, sources, method):
    images, labels = digits
    gains, rests = {name: [] for name in SHIFTS}, []
    for (name, shift), (seed, (first, baseline)) in itertools.product(SHIFTS.items(), sources.items()):
        clean = accuracy(baseline, prepared(images[TRAIN:]), labels[TRAIN:])
        test = prepared(shift(images[TRAIN:]))
        before = accuracy(baseline, test, labels[TRAIN:])
        after = accuracy(method(first, digits, seed, prepared(shift(images[:TRAIN]))), test, labels[TRAIN:])
        gains[name].append((before, after, (after - before) / (clean - before)))
        rests.append(clean)
    assert min(rests) > 0.95
    means = {name: np.mean(found, axis=0) for name, found in gains.items()}
    assert max(share for *_, share in means.values()) > 1 / 3, gains
    assert all(after > before - 0.02 for before, after, _ in means.values()), gains
