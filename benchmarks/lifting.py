"""Lifted leaves: adapters at the cost of their side path, a frozen base in fewer bytes.

LoRA of rank 8 on query and value of MiniLM-L6 with its published weights, batch 32 x 64 tokens. FLOPs are counted on
the program of the step and compared with the same network whose layers were written with a side path by hand. Run
``python benchmarks/lifting.py``; with ``--check`` it exits with 1 when a figure is missed. Times are medians of
interleaved steps in one process: run it on a machine that does nothing else. With ``--torch-python PYTHON`` (a Python
with torch, transformers and peft) the step of Hugging Face PEFT is measured too; that ratio is a goal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import transferjax as tj
from transferjax.models import _bert
from transferjax.program import cost, materialised

BATCH, TOKENS, RANK, CLASSES = 32, 64, 8, 2
ADAPTED = "layers/*/attention/{query,value}/kernel"
BASE = "{layers/**/kernel,embeddings/*/embedding}"
FLOPS, TIME, INT8, NF4, INT8_TIME, PEFT = 1.02, 1.05, 0.28, 0.16, 1.3, 1.1


def batch_of(vocabulary):
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, vocabulary, (BATCH, TOKENS))
    return {"inputs": {"input_ids": jnp.asarray(tokens)}, "labels": jnp.asarray(generator.integers(0, CLASSES, BATCH))}


def step_of(model, tuning, objective):
    tx = optax.adamw(1e-3)
    state, frozen = tj.init(jax.random.key(1), model, tuning, tx)
    step = tj.make_step(objective, tuning, tx)
    return step, state, frozen


def flops(step, state, frozen, batch):
    return cost(step.jitted.trace(step.objective, state, frozen, batch, True).jaxpr).flops


class SideLinear(nnx.Linear):
    """A dense layer with a low-rank path beside it, as one writes it by hand."""

    def __init__(self, inputs, outputs, *, rngs):
        super().__init__(inputs, outputs, rngs=rngs)
        self.side_a = nnx.Param(jax.random.normal(rngs.params(), (inputs, RANK)))
        self.side_b = nnx.Param(jnp.zeros((RANK, outputs)))

    def __call__(self, x):
        return super().__call__(x) + (x @ self.side_a[...]) @ self.side_b[...]


def by_hand(width):
    """MiniLM-L6 whose queries and values are such layers."""
    rngs = nnx.Rngs(0)
    module = _bert.build(_bert.VARIANTS["minilm_l6"], CLASSES)
    for layer in module.layers:
        layer.attention.query = SideLinear(width, width, rngs=rngs)
        layer.attention.value = SideLinear(width, width, rngs=rngs)
    return tj.interop.nnx(module)


def timed(sides, batch, turns):
    """Median milliseconds of each side's step, in alternating turns."""
    times = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, (step, state, frozen) in sides.items():
            begin = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            jax.block_until_ready(metrics)
            sides[name] = (step, state, frozen)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def peft(arguments):
    """Milliseconds of Hugging Face PEFT, in a process of its own."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "peft_torch.py")
    command = [arguments.torch_python, script, "--turns", str(arguments.turns)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def size(tree, selector=None):
    leaves = tj.paths(tree).items()
    return sum(leaf.nbytes for path, leaf in leaves if selector is None or any(path.startswith(p) for p in selector))


def measure(arguments):
    model, _ = tj.models.load("minilm_l6", num_classes=CLASSES, key=jax.random.key(0))
    batch = batch_of(1000)
    objective = tj.objectives.cross_entropy(model.apply)
    lora = tj.lora(ADAPTED, RANK)
    sides = {
        "lifted": step_of(model, lora, objective),
        "merged": step_of(model, lora._replace(lifted=None), objective),
        "int8": step_of(model, tj.tuning.quantise(BASE, "int8", lora), objective),
        "nf4": step_of(model, tj.tuning.quantise(BASE, "nf4", lora), objective),
    }
    counted = {name: flops(*side, batch) for name, side in sides.items() if name in ("lifted", "merged")}
    other = by_hand(_bert.VARIANTS["minilm_l6"].width)
    sides["by hand"] = step_of(other, tj.train("**/side_{a,b}"), tj.objectives.cross_entropy(other.apply))
    counted["by hand"] = flops(*sides["by hand"], batch)
    _, state, frozen = sides["lifted"]
    found = materialised(
        lambda params: model.apply(params, model.extra, batch["inputs"])[0], lora.lifted(state.trainable, frozen)
    )
    quantised = [path for path in tj.paths(model.params) if tj.glob(BASE)(path, None)]
    whole = size(sides["lifted"][2], quantised)
    rows = [
        ("GFLOP of the step (by hand)", counted["lifted"] / 1e9, counted["by hand"] / 1e9, FLOPS),
        ("int8 base, MB (float32)", size(sides["int8"][2], quantised) / 1e6, whole / 1e6, INT8),
        ("NF4 base, MB (float32)", size(sides["nf4"][2], quantised) / 1e6, whole / 1e6, NF4),
    ]
    facts = {
        "GFLOP of the merge form": counted["merged"] / 1e9,
        "leaves materialised": len(found),
        "batch": f"{BATCH} x {TOKENS} tokens, rank {RANK}",
    }
    if arguments.turns:
        milliseconds = timed(sides, batch, arguments.turns)
        rows.append(("step, ms (by hand)", milliseconds["lifted"], milliseconds["by hand"], TIME))
        rows.append(("step with an int8 base, ms (float32)", milliseconds["int8"], milliseconds["lifted"], INT8_TIME))
        facts |= {f"step, {name}, ms": value for name, value in milliseconds.items()}
    if arguments.turns and arguments.torch_python:
        theirs = peft(arguments)
        facts |= {
            "step of PEFT on torch, ms": theirs["step"],
            "forward pass of PEFT on torch, ms": theirs["forward"],
            f"step, lifted, against PEFT (goal {PEFT})": milliseconds["lifted"] / theirs["step"],
        }
    facts["load"] = " ".join(f"{n:.1f}" for n in os.getloadavg())
    rows = [(what, ours, other, ours / other, limit, ours / other <= limit) for what, ours, other, limit in rows]
    columns = ("quantity", "here", "other", "ratio", "limit", "met")
    return tj.Report("Lifted leaves on MiniLM-L6", columns, tuple(rows), facts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10, help="measured steps of each side; 0: no times")
    parser.add_argument("--torch-python", help="a Python with torch, transformers and peft")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    report = measure(arguments)
    print(report)
    return int(arguments.check and not all(report.column("met")))


if __name__ == "__main__":
    sys.exit(main())
