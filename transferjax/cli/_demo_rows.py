"""The four rows of the demo: one network, four ways of making it learn 1,000 images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

import transferjax as tj
from transferjax.cli._hoisting import running
from transferjax.cli._loop import Progress, train
from transferjax.cli._tuning import HEAD

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
      flops: of one training step, with its share of what is computed once.
      predicted: ``[N]`` the class of each test image.
      hoisted: what was computed once per image, and the share of FLOPs that this saved; empty where nothing was.
    """

    accuracy: float
    seconds: float
    trainable: int
    flops: float
    predicted: Any
    hoisted: Mapping[str, Any]


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
    model = _fresh(seed) if name == SCRATCH else _pretrained(weights, seed)
    make = {HEAD_ONLY: lambda: tj.train(HEAD), LAST_BLOCKS: lambda: tj.last(LAST, tj.models.stages(MODEL))}
    tuning = make.get(name, tj.full)()
    return _tuned(name, settings, data, model, tuning, seed, progress)


def _pretrained(weights: Any, seed: int) -> tj.Model:
    return tj.models.load(MODEL, weights=weights, num_classes=CLASSES, key=jax.random.key(seed))[0]


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
    how = running(step, state, frozen, batches)
    flops = how.flops or _flops(step, state, frozen, next(iter(batches)))
    state = train(how.step, state, how.frozen, batches, progress, through=how.through)
    logits = jax.jit(lambda state, frozen, inputs: _logits(model, tuning, state, frozen, inputs))
    predicted = [np.argmax(logits(state, frozen, batch["inputs"]), -1) for batch in _in_order(data.test)]
    return _row(data, np.concatenate(predicted), begin, _count(state.trainable), flops, how.facts)


def _logits(model: tj.Model, tuning: tj.Tuning, state: Any, frozen: Any, inputs: Any) -> Any:
    return model.apply(tuning.merge(state.trainable, frozen), state.extra, inputs)[0]


def _batches(source: Any, settings: Settings, seed: int) -> Any:
    return tj.data.batches(source, settings.batch_size, seed=seed, epochs=settings.epochs)


def _in_order(source: Any) -> Iterable[Any]:
    return tj.data.batches(source, EVALUATION_BATCH, shuffle=False, drop_remainder=False)


def _row(data: Data, predicted: np.ndarray, begin: float, trainable: int, flops: float, hoisted: Any) -> Row:
    right = float(np.mean(predicted == data.test.labels()))
    return Row(right, time.perf_counter() - begin, trainable, flops, predicted, hoisted)


def _flops(step: Any, state: Any, frozen: Any, batch: Any) -> float:
    traced = step.jitted.trace(step.objective, state, frozen, batch, True)
    return tj.program.cost(traced.jaxpr).flops


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
