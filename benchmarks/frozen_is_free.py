"""Frozen is free: a step costs what its trainable part costs, and no more than the best hand-written JAX.

Run ``python benchmarks/frozen_is_free.py``; with ``--check`` it exits with 1 when a figure is missed. Time is the
median ratio of interleaved pairs in one process: run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import transferjax as tj
from transferjax.finetune import training_mode
from transferjax.program import cost, measure

SPLITS = {"head": "head/fc/**", "last block and head": "{blocks/15,head}/**"}
TIME, MEMORY, FLOPS = 1.03, 1.02, 1.01


def hand_written(model, objective, mode, tx, selector, batch):
    """The step one would write by hand: None where the other half has the leaf, one jit, trainables donated."""
    combine = lambda a, b: jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)
    chosen = tj.mask(model.params, selector)
    learns = jax.tree.map(lambda x, m: jnp.copy(x) if m else None, model.params, chosen)
    frozen = jax.tree.map(lambda x, m: None if m else x, model.params, chosen)

    def step(learns, opt_state, extra, count, key, frozen, batch):
        def loss(learns):
            result = objective(combine(learns, frozen), extra, batch, jax.random.fold_in(key, count), mode)
            return result.value, (result.metrics, result.extra)

        (value, (metrics, extra_new)), gradients = jax.value_and_grad(loss, has_aux=True)(learns)
        updates, opt_state = tx.update(gradients, opt_state, learns)
        return optax.apply_updates(learns, updates), opt_state, extra_new, count + 1, {**metrics, "loss": value}

    key = jax.random.key(1)
    arguments = (learns, tx.init(learns), tj.copy(model.extra), jnp.zeros((), jnp.int32))
    compiled = jax.jit(step, donate_argnums=(0, 1, 2, 3)).lower(*arguments, key, frozen, batch).compile()
    return compiled, arguments, (key, frozen)


def against_hand_written(model, batch, name, selector, pairs):
    """Rows of time and temporary memory: ``make_step`` over the hand-written step of the same split."""
    tuning, tx = tj.train(selector), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    objective = tj.objectives.cross_entropy(model.apply)
    state, frozen = tj.init(jax.random.key(1), model, tuning, tx)
    step = tj.make_step(objective, tuning, tx)
    ours = step.jitted.lower(objective, state, frozen, batch, True).compile()
    mode = training_mode(tuning, state.trainable, frozen)
    theirs, arguments, rest = hand_written(model, objective, mode, tx, selector, batch)

    def run_ours():
        nonlocal state
        state, _ = jax.block_until_ready(step(state, frozen, batch))

    def run_theirs():
        nonlocal arguments
        *arguments, _ = jax.block_until_ready(theirs(*arguments, *rest, batch))

    ratio, ours_s, theirs_s = interleaved(run_ours, run_theirs, pairs)
    memory = [measure(compiled).temporary_bytes or 0 for compiled in (ours, theirs)]
    return [
        (f"{name}: seconds per step", ours_s, theirs_s, ratio, TIME),
        (f"{name}: temporary bytes", *memory, memory[0] / max(1, memory[1]), MEMORY),
    ]


def interleaved(a, b, pairs):
    """Median of the ratios a / b over pairs run in alternating order, and the median seconds of each."""
    for warm_up in (a, b, a, b):
        warm_up()
    times = []
    for number in range(pairs):
        first, second = (a, b) if number % 2 else (b, a)
        begin = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        spent = middle - begin, time.perf_counter() - middle
        times.append(spent if number % 2 else spent[::-1])
    median = lambda values: statistics.median(list(values))
    return median(x / y for x, y in times), median(x for x, _ in times), median(y for _, y in times)


def clipping_and_accumulation(model, batch):
    """Rows of FLOPs of a head-only step with clipping and accumulation, over the same without."""
    tuning, objective = tj.train(SPLITS["head"]), tj.objectives.cross_entropy(model.apply)

    def flops(tx, accumulate):
        state, frozen = tj.init(jax.random.key(1), model, tuning, tx)
        step = tj.make_step(objective, tuning, tx, accumulate=accumulate)
        tj.frozen_is_frozen(step, state, frozen, batch)
        return cost(step.jitted.trace(objective, state, frozen, batch, True)).flops

    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    plain = flops(optax.adamw(1e-3), 1)
    cases = {"clipped": (clipped, 1), "4 parts": (optax.adamw(1e-3), 4), "clipped, 4 parts": (clipped, 4)}
    found = {name: flops(*case) for name, case in cases.items()}
    return [(f"head, {name}: FLOPs", count, plain, count / plain, FLOPS) for name, count in found.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    parser.add_argument("--pairs", type=int, default=30, help="interleaved pairs per split")
    parser.add_argument("--size", type=int, default=96, help="height and width of the images in pixels")
    parser.add_argument("--batch", type=int, default=32, help="images per batch")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    images = rng.standard_normal((arguments.batch, arguments.size, arguments.size, 3))
    labels = rng.integers(0, 10, arguments.batch)
    batch = {"inputs": jnp.asarray(images, jnp.float32), "labels": jnp.asarray(labels, jnp.int32)}
    model = tj.models.create("efficientnet_lite0", num_classes=10, key=jax.random.key(0))
    rows = clipping_and_accumulation(model, batch)
    for name, selector in SPLITS.items():
        rows += against_hand_written(model, batch, name, selector, arguments.pairs)
    rows = [(*row, row[3] <= row[4]) for row in rows]
    columns = ("quantity", "make_step", "reference", "ratio", "at most", "met")
    facts = {
        "model": f"efficientnet_lite0, batch {arguments.batch} at {arguments.size}x{arguments.size}",
        "reference": "hand-written JAX for the same split; for FLOPs the step without clipping and accumulation",
        "pairs": arguments.pairs,
        "backend": jax.default_backend(),
    }
    print(tj.Report("Frozen is free", columns, tuple(rows), facts))
    return int(arguments.check and not all(row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
