"""``open`` + ``plan`` of a checkpoint of many leaves: headers only, and no slower than Orbax's own metadata.

Run ``python benchmarks/open_plan.py``; with ``--check`` it exits with 1 when a figure is missed. Every measurement is
a process of its own, in which the libraries are imported and warmed up before the clock starts; the two processes
that are compared run in pairs. It needs disk for twice the size.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import jax
import numpy as np

import transferjax as tj
from transferjax import io, surgery

SECONDS, BYTES, RATIO = 1.0, 0.01, 1.2
_OURS = """
import sys, time, jax, numpy as np, transferjax as tj
from transferjax import io, surgery
def went_through():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("rchar"))
io.open(sys.argv[2])
before, begin = went_through(), time.perf_counter()
source = io.open(sys.argv[1])
opened = time.perf_counter()
surgery.plan(source.shapes, source.shapes, surgery.permute("layers/0/*", (1, 0)))
print(time.perf_counter() - begin, went_through() - before)
"""
_THEIRS = """
import sys, time
from orbax.checkpoint import v1 as ocp
ocp.metadata(sys.argv[2])
begin = time.perf_counter()
ocp.metadata(sys.argv[1])
print(time.perf_counter() - begin, 0)
"""


def make(folder: pathlib.Path, leaves: int, size: float) -> None:
    """A safetensors file of ``size`` GB in square matrices, the same as an Orbax directory, and a small one of each."""
    side = int((size * 1e9 / leaves / 4) ** 0.5)
    leaf = np.random.default_rng(0).standard_normal((side, side), np.float32)
    for name, count in (("large", leaves), ("small", 10)):
        tree = {f"layers/{n // 10}/{n % 10}": leaf for n in range(count)}
        io.save(folder / f"{name}.safetensors", tree)
        source = io.open(folder / f"{name}.safetensors")
        io.transplant(source, surgery.plan(source.shapes, source.shapes), folder / name)


def process(code: str, folder: pathlib.Path, ending: str) -> tuple[float, int]:
    """Seconds and bytes that a new process measured on the large checkpoint, warmed up on the small one."""
    command = [sys.executable, "-c", code, str(folder / f"large{ending}"), str(folder / f"small{ending}")]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    seconds, count = done.stdout.split()[-2:]
    return float(seconds), int(count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    parser.add_argument("--leaves", type=int, default=10_000, help="leaves of the checkpoint")
    parser.add_argument("--size", type=float, default=4.0, help="GB of the checkpoint")
    parser.add_argument("--pairs", type=int, default=3, help="interleaved pairs of processes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make(folder, arguments.leaves, arguments.size)
        plain = [process(_OURS, folder, ".safetensors") for _ in range(arguments.pairs)]
        pairs = [(process(_OURS, folder, ""), process(_THEIRS, folder, "")) for _ in range(arguments.pairs)]
        total = os.path.getsize(folder / "large.safetensors")
    median = lambda values: statistics.median(list(values))
    seconds, share = median(s for s, _ in plain), median(count / total for _, count in plain)
    ours, theirs = median(a[0] for a, _ in pairs), median(b[0] for _, b in pairs)
    ratio = median(a[0] / b[0] for a, b in pairs)
    rows = (
        ("safetensors: seconds", seconds, None, seconds, SECONDS, seconds <= SECONDS),
        ("safetensors: share of the bytes read", share, None, share, BYTES, share <= BYTES),
        ("Orbax: open + plan / ocp.metadata (seconds)", ours, theirs, ratio, RATIO, ratio <= RATIO),
    )
    columns = ("quantity", "open + plan", "reference", "value", "at most", "met")
    facts = {"leaves": arguments.leaves, "bytes": total, "pairs": arguments.pairs, "backend": jax.default_backend()}
    print(tj.Report("Open and plan", columns, rows, facts))
    return int(arguments.check and not all(row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
