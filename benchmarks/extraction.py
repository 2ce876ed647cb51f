"""Feature extraction: all layers in one pass of a network, at the speed of the pass.

EfficientNet-Lite0 on images of 96x96 in batches of 32: ``features.extract`` of the outputs against a bare compiled
forward pass over the same batches, and all sixteen blocks against one of them. Sides take turns in one process,
compiled before; the medians are compared. With ``--check`` it exits with 1 when a figure is missed. Run it on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import jax
import numpy as np

import transferjax as tj

BATCH, SIZE, BATCHES = 32, 96, 20
LIMITS = {"throughput": 0.95, "layers": 1.1}


def batches():
    """Random pixels: what they show does not change the time."""
    generator = np.random.default_rng(0)
    pixels = generator.normal(size=(BATCH * BATCHES, SIZE, SIZE, 3)).astype(np.float32)
    return [
        {"inputs": pixels[first : first + BATCH], "id": np.arange(first, first + BATCH)}
        for first in range(0, len(pixels), BATCH)
    ]


def measure(turns):
    """Median seconds of a pass of each side; the first turn compiles."""
    model, _ = tj.models.load("efficientnet_lite0", key=jax.random.key(0))
    given = batches()
    apply = jax.jit(lambda params, extra, inputs: model.apply(params, extra, inputs)[0])
    bare = lambda: [np.asarray(apply(model.params, model.extra, batch["inputs"])) for batch in given]
    extract, all_layers = tj.features.extract, "blocks/*"
    sides = {
        "bare": bare,
        "outputs": lambda: extract(model, given),
        "one layer": lambda: extract(model, given, at="blocks/15"),
        "all layers": lambda: extract(model, given, at=all_layers),
    }
    times = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="of each side")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    found = measure(arguments.turns)
    throughput, layers = found["bare"] / found["outputs"], found["all layers"] / found["one layer"]
    least, most = LIMITS["throughput"], LIMITS["layers"]
    rows = (
        ("throughput of extraction, x the bare pass", throughput, least, throughput >= least),
        ("all layers, x one layer", layers, most, layers <= most),
    )
    facts = {f"{name}, s": value for name, value in found.items()}
    facts |= {"images": BATCH * BATCHES, "load": " ".join(f"{n:.1f}" for n in os.getloadavg())}
    report = tj.Report("Feature extraction on EfficientNet-Lite0", ("quantity", "here", "limit", "met"), rows, facts)
    print(report)
    return int(arguments.check and not all(report.column("met")))


if __name__ == "__main__":
    sys.exit(main())
