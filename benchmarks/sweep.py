"""A sweep: many runs as one program over one frozen base.

Sixteen linear heads on hoisted features of EfficientNet-Lite0 against one head, over the same batches; and eight LoRA
runs of MiniLM-L6 (rank 8 on query and value, batch 32 x 64 tokens) that differ in learning rate, against eight separate
steps. Times are medians of interleaved turns in one process, compilation apart; memory is XLA's own analysis. With
``--check`` it exits with 1 when a figure is missed. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import transferjax as tj

HEADS, RUNS, BATCH, SIZE, TOKENS, RANK, CLASSES = 16, 8, 32, 96, 64, 8, 10
BATCHES = 31
LIMITS = {"heads": 2.0, "lora": 1.05, "memory": 1.0}


def seconds(sides, turns):
    """Median seconds of each side in alternating turns, the first of which does not count."""
    times = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, run in sides.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def heads(turns):
    """Seconds of an epoch of residuals for one head, and for sixteen."""
    model, _ = tj.models.load("efficientnet_lite0", num_classes=CLASSES, key=jax.random.key(0))
    objective = tj.objectives.cross_entropy(model.apply)
    recipe = lambda hyper: (objective, tj.train("head/fc/**"), optax.adam(hyper.get("lr", 1e-3)))
    _, tuning, tx = recipe({})
    state, frozen = tj.init(jax.random.key(1), model, tuning, tx)
    generator = np.random.default_rng(0)
    batch = {
        "inputs": generator.normal(size=(BATCH, SIZE, SIZE, 3)).astype(np.float32),
        "labels": generator.integers(0, CLASSES, BATCH).astype(np.int32),
        "id": np.arange(BATCH),
    }
    hoisted = tj.hoist(tj.make_step(objective, tuning, tx), state, frozen, batch)
    residuals = [hoisted.prefix(frozen, state.extra, objective, batch)] * BATCHES
    apart, unmerged = tj.finetune.hoisted_recipe(recipe, hoisted, model)
    runs = tj.finetune.start_runs(
        apart, {"lr": np.geomspace(1e-4, 1e-2, HEADS).tolist()}, unmerged, key=jax.random.key(1)
    )
    held, kept = {"state": state, "runs": runs}, hoisted.keep(frozen)

    def one():
        for held["state"], metrics in tj.fit(hoisted.step, held["state"], kept, residuals):
            pass
        return metrics

    def many():
        for held["runs"], metrics in tj.finetune.sweep_steps(held["runs"], residuals):
            pass
        return metrics

    return seconds({"one": one, "many": many}, turns)


def lora(turns):
    """Seconds of a step of eight LoRA runs, together and apart, and XLA's memory of both programs."""
    model, _ = tj.models.load("minilm_l6", num_classes=2, key=jax.random.key(0))
    objective = tj.objectives.cross_entropy(model.apply)
    tuning = tj.lora("layers/*/attention/{query,value}/kernel", RANK)
    rates = np.geomspace(1e-4, 1e-2, RUNS).tolist()
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 1000, (BATCH, TOKENS))
    batch = {"inputs": {"input_ids": jnp.asarray(tokens)}, "labels": jnp.asarray(generator.integers(0, 2, BATCH))}
    runs = tj.finetune.start_runs(
        lambda hyper: (objective, tuning, optax.adamw(hyper["lr"])), {"lr": rates}, model, key=jax.random.key(1)
    )
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
    step = tj.make_step(objective, tuning, tx)
    states = []
    for rate in rates:
        state, frozen = tj.init(jax.random.key(1), model, tuning, tx)
        state.opt_state.hyperparams["learning_rate"] = jnp.asarray(rate)
        states.append(state)
    memory = step.jitted.lower(objective, states[0], frozen, batch, True).compile().memory_analysis()
    held = {"states": states, "runs": runs}

    def apart():
        pairs = [step(state, frozen, batch) for state in held["states"]]
        held["states"] = [state for state, _ in pairs]
        return [metrics for _, metrics in pairs]

    def together():
        [(held["runs"], metrics)] = tj.finetune.sweep_steps(held["runs"], [batch])
        return metrics

    found = seconds({"apart": apart, "together": together}, turns)
    r = held["runs"]
    arguments = (r.hyper, r.held, r.states, r.frozen, batch, r.finite, r.steady)
    swept = r.jitted.lower(*arguments).compile().memory_analysis()
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    allowed = base + RUNS * (peak(memory) - base)
    return {**found, "memory": peak(swept), "allowed": allowed, "programs": r.jitted._cache_size()}


def peak(memory):
    """Arguments, outputs that reuse none of them, and temporary memory, bytes."""
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + fresh + memory.temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="measured turns of each side")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    features, adapters = heads(arguments.turns), lora(arguments.turns)
    rows = [
        (f"{HEADS} heads on features, ms per step (one head)", features["many"], features["one"], LIMITS["heads"]),
        (
            f"{RUNS} LoRA runs, ms per step (sum of separate steps)",
            adapters["together"],
            adapters["apart"],
            LIMITS["lora"],
        ),
    ]
    scale = {0: 1e3 / BATCHES, 1: 1e3}
    rows = [(what, a * scale[n], b * scale[n], a / b, limit) for n, (what, a, b, limit) in enumerate(rows)]
    memory = (adapters["memory"] / 2**20, adapters["allowed"] / 2**20)
    rows.append(
        (
            f"{RUNS} LoRA runs, peak MiB (base once + {RUNS} x the rest)",
            *memory,
            memory[0] / memory[1],
            LIMITS["memory"],
        )
    )
    rows = [(*row, row[3] <= row[4]) for row in rows]
    facts = {"programs of the LoRA sweep": adapters["programs"], "load": " ".join(f"{n:.1f}" for n in os.getloadavg())}
    report = tj.Report("Sweeps", ("quantity", "sweep", "other", "ratio", "limit", "met"), tuple(rows), facts)
    print(report)
    return int(arguments.check and not all(report.column("met")))


if __name__ == "__main__":
    sys.exit(main())
