"""The four rows of the demo: one network, four ways of making it learn 1,000 images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import optax

import transferjax as tj
from transferjax.cli._loop import Progress, train

MODEL = "efficientnet_lite0"
CLASSES = 10
LAST = 6
"""Stages that learn in the second row: five blocks, and the head with its dense layer."""
EVALUATION_BATCH = 100
HEAD_ONLY, LAST_BLOCKS = "frozen features + linear head", f"last {LAST - 1} blocks + head"
FULL, SCRATCH = "full fine-tuning", "from scratch"
NAMES = (HEAD_ONLY, LAST_BLOCKS, FULL, SCRATCH)
RATES = {HEAD_ONLY: 3e-3, LAST_BLOCKS: 1e-3, FULL: 1e-3, SCRATCH: 1e-3}
"""The highest learning rate of each row; Adam, rising and then falling along a cosine."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the demo's figures.

    Attributes:
      size: pixels of a side to which the 28 x 28 images are enlarged on the device.
      epochs: passes over the training images.
      batch_size: images per step.
      images: training images.
      test_images: test images.
    """

    size: int
    epochs: int
    batch_size: int = 32
    images: int = 1000
    test_images: int = 2000


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of fine-tuning and what it gave.

    Attributes:
      accuracy: on the test images, in [0, 1].
      seconds: compilation, training and evaluation.
      trainable: parameters that learn.
      flops: of one training step.
      predicted: ``[N]`` the class of each test image, where it was asked for.
    """

    accuracy: float
    seconds: float
    trainable: int
    flops: float
    predicted: Any = None


@dataclasses.dataclass(frozen=True)
class Data:
    """The sample's training and test images."""

    train: Any
    test: Any


def open_data(settings: Settings) -> Data:
    """The bundled sample, or its first images."""
    train, test = tj.data.open("sample", "train"), tj.data.open("sample", "test")
    return Data(train.take(settings.images), test.take(settings.test_images))


def run_row(name: str, settings: Settings, data: Data, weights: Any, seed: int, progress: Progress) -> Row:
    """Trains and evaluates one row of ``NAMES``."""
    if name == HEAD_ONLY:
        return _probe(settings, data, weights, seed, progress)
    model = _fresh(seed) if name == SCRATCH else _pretrained(weights, seed)
    tuning = tj.last(LAST, tj.models.stages(MODEL)) if name == LAST_BLOCKS else tj.full()
    return _tuned(name, settings, data, model, tuning, seed, progress)


def _pretrained(weights: Any, seed: int, classes: int = CLASSES) -> tj.Model:
    return tj.models.load(MODEL, weights=weights, num_classes=classes, key=jax.random.key(seed))[0]


def _fresh(seed: int) -> tj.Model:
    return tj.models.create(MODEL, num_classes=CLASSES, key=jax.random.key(seed))


def _tuned(
    name: str, settings: Settings, data: Data, model: tj.Model, tuning: tj.Tuning, seed: int, progress: Progress
) -> Row:
    begin = time.perf_counter()
    model = tj.data.on_images(model, settings.size)
    batches = _batches(data.train, settings, seed)
    tx = optax.adam(tj.optim.warmup_cosine(RATES[name], len(batches)))
    state, frozen = tj.init(jax.random.key(seed), model, tuning, tx)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    flops = _flops(step, state, frozen, next(iter(batches)))
    state = train(step, state, frozen, batches, progress)
    logits = jax.jit(lambda state, frozen, inputs: _logits(model, tuning, state, frozen, inputs))
    predicted = [np.argmax(logits(state, frozen, batch["inputs"]), -1) for batch in _in_order(data.test)]
    return _row(data, np.concatenate(predicted), begin, _count(state.trainable), flops)


def _probe(settings: Settings, data: Data, weights: Any, seed: int, progress: Progress) -> Row:
    """Features once per image, then a linear head on them: what a frozen network allows."""
    begin = time.perf_counter()
    network = tj.data.on_images(_pretrained(weights, seed, classes=0), settings.size)
    forward = jax.jit(lambda params, extra, inputs: network.apply(params, extra, inputs)[0])
    one = lambda batch: forward(network.params, network.extra, batch["inputs"])
    features = lambda source: np.concatenate([one(batch) for batch in _in_order(source)])
    train_features, test_features = features(data.train), features(data.test)
    batches = _batches(tj.data.arrays(train_features, data.train.labels()), settings, seed)
    model, tuning = _linear(train_features, seed), tj.full()
    tx = optax.adam(tj.optim.warmup_cosine(RATES[HEAD_ONLY], len(batches)))
    state, frozen = tj.init(jax.random.key(seed), model, tuning, tx)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    batch = next(iter(_batches(data.train, settings, seed)))
    once = tj.program.cost(network.apply, network.params, network.extra, batch["inputs"]).flops / settings.epochs
    flops = once + _flops(step, state, frozen, next(iter(batches)))
    state = train(step, state, frozen, batches, progress)
    logits = model.apply(state.trainable, {}, test_features)[0]
    return _row(data, np.argmax(logits, -1), begin, _count(state.trainable), flops)


def _linear(features: np.ndarray, seed: int) -> tj.Model:
    """A dense layer on features ``[N, D]``."""
    width = features.shape[1]
    kernel = 0.1 * width**-0.5 * jax.random.normal(jax.random.key(seed), (width, CLASSES))
    params = {"fc": {"kernel": kernel, "bias": np.zeros(CLASSES, np.float32)}}

    def apply(params, extra, inputs, *, key=None, train=False):
        return inputs @ params["fc"]["kernel"] + params["fc"]["bias"], extra

    return tj.Model(apply, None, params, {})


def _logits(model: tj.Model, tuning: tj.Tuning, state: Any, frozen: Any, inputs: Any) -> Any:
    return model.apply(tuning.merge(state.trainable, frozen), state.extra, inputs)[0]


def _batches(source: Any, settings: Settings, seed: int) -> Any:
    return tj.data.batches(source, settings.batch_size, seed=seed, epochs=settings.epochs)


def _in_order(source: Any) -> Iterable[Any]:
    return tj.data.batches(source, EVALUATION_BATCH, shuffle=False, drop_remainder=False)


def _row(data: Data, predicted: np.ndarray, begin: float, trainable: int, flops: float) -> Row:
    right = float(np.mean(predicted == data.test.labels()))
    return Row(right, time.perf_counter() - begin, trainable, flops, predicted)


def _flops(step: Any, state: Any, frozen: Any, batch: Any) -> float:
    traced = step.jitted.trace(step.objective, state, frozen, batch, True)
    return tj.program.cost(traced.jaxpr).flops


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
