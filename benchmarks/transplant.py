"""``transplant`` from safetensors to Orbax, half of it transposed, beside ``ocp.save`` of the same tree held in memory.

Run ``python benchmarks/transplant.py``; with ``--check`` it exits with 1 when a figure is missed. Every measurement is
a process of its own; the two that are compared run in pairs. Ours starts from the closed file and ends with every
byte on the disk and a digest of every block; the reference starts from arrays that are ready in memory. Peak memory
is what the process grows by from the planned state. It needs disk for three times the size, and memory for the
reference.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import save_file

import transferjax as tj

RATE, LEAVES, EXTRA = 0.9, 2, 400
_COMMON = """
import os, sys, time, jax, numpy as np
def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024
def measure(work):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the peak so far
    before, begin = memory("VmRSS"), time.perf_counter()
    work()
    print(time.perf_counter() - begin, memory("VmHWM") - before)
"""
_OURS = (
    _COMMON
    + """
from transferjax import io, surgery
import tensorstore
from transferjax.io import _orbax_stream
def work():
    source = io.open(sys.argv[1])
    turned = lambda name: int(name[1:]) % 2
    shape = lambda name, leaf: leaf.shape[::-1] if turned(name) else leaf.shape
    target = {name: jax.ShapeDtypeStruct(shape(name, leaf), leaf.dtype) for name, leaf in source.shapes.items()}
    rule = surgery.permute(tj.where(lambda path, leaf: turned(path)), (1, 0))
    io.transplant(source, surgery.plan(source.shapes, target, rule), sys.argv[2], format="orbax")
import transferjax as tj
measure(work)
"""
)
_THEIRS = (
    _COMMON
    + """
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file
tree = {n: np.array(a.T if int(n[1:]) % 2 else a, order="C") for n, a in load_file(sys.argv[1]).items()}
context = ocp.Context()
context.array.saving.use_compression = False
def work():
    with context:
        ocp.save(sys.argv[2], tree)
measure(work)
"""
)


def process(code: str, source: pathlib.Path, out: pathlib.Path) -> tuple[float, float]:
    """Seconds and MB of peak memory that a new process measured while it wrote ``out``, which is removed again."""
    os.sync()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(source), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    shutil.rmtree(out)
    seconds, megabytes = done.stdout.split()[-2:]
    return float(seconds), float(megabytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    parser.add_argument("--size", type=float, default=4.0, help="GB of the checkpoint")
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of each float32 leaf")
    parser.add_argument("--pairs", type=int, default=3, help="interleaved pairs of processes")
    arguments = parser.parse_args()
    leaf = np.random.default_rng(0).standard_normal((arguments.side, arguments.side), np.float32)
    count = max(2, round(arguments.size * 1e9 / leaf.nbytes))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_file({f"l{n}": leaf for n in range(count)}, folder / "source.safetensors")
        pairs = []
        for number in range(arguments.pairs):
            codes = (_OURS, _THEIRS) if number % 2 else (_THEIRS, _OURS)
            found = [process(code, folder / "source.safetensors", folder / "out") for code in codes]
            pairs.append(found if number % 2 else found[::-1])
    total, allowed = count * leaf.nbytes / 1e6, LEAVES * leaf.nbytes / 1e6 + EXTRA
    median = lambda values: statistics.median(list(values))
    ratio, peak = median(b[0] / a[0] for a, b in pairs), max(a[1] for a, _ in pairs)
    ours, theirs = median(total / a[0] for a, _ in pairs), median(total / b[0] for _, b in pairs)
    their_peak = median(b[1] for _, b in pairs)
    rows = (
        ("rate (MB/s), at least", ours, theirs, ratio, RATE, ratio >= RATE),
        ("peak memory (MB), at most", peak, their_peak, peak, allowed, peak <= allowed),
    )
    columns = ("quantity", "transplant", "ocp.save", "value", "bound", "met")
    facts = {"leaves": count, "MB": total, "MB per leaf": leaf.nbytes / 1e6, "pairs": arguments.pairs}
    print(tj.Report("Transplant", columns, rows, {**facts, "reference": "ocp.save(use_compression=False)"}))
    return int(arguments.check and not all(row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
