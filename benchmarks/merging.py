"""Merging: TIES and DARE of files against a plain copy, and twenty WiSE-FT coefficients against twenty evaluations.

Run ``python benchmarks/merging.py``; with ``--check`` it exits with 1 when a figure is missed. Run it on a machine
that does nothing else.

Files: a base and three models of 1 GB each, as safetensors. Ours opens them, merges and writes the result as
``transferjax merge`` does, with a digest of every block. The copy writes the three models again (``shutil.copyfile``,
then ``fsync``, as ours does). Rates are bytes read and written by second; files are dropped from the page cache before.
Each measurement is a process of its own; they take turns, and ratios are medians over the rounds. Peak memory is what
the process grows by from when all is imported. It needs disk for eight times the size.

Coefficients: EfficientNet-Lite0 on the bundled images; ``search`` over 20 values of alpha, against 20 calls of a
compiled evaluation on weights that are there. Both take each batch in turn, as it comes; the first batch, which
compiles, does not count. Memory is what the process grows by on a later batch, and ``search`` may take one set of
weights more than an evaluation: beside the two that are given there is the merged one.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import transferjax as tj

RATE, LEAVES, EXTRA = 0.5, 6, 400
COEFFICIENTS, TIME, SLACK = 20, 1.05, 1.05
SIZE, BATCH = 96, 200
COMMON = """
import os, shutil, sys, time
def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024
def measure(work):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the peak so far
    before, begin = memory("VmRSS"), time.perf_counter()
    work()
    print(time.perf_counter() - begin, memory("VmHWM") - before)
folder = sys.argv[1]
"""
COPY = (
    COMMON
    + """
def work():
    for name in "abc":
        shutil.copyfile(f"{folder}/{name}.safetensors", f"{folder}/out-{name}.safetensors")
        with open(f"{folder}/out-{name}.safetensors", "rb+") as file:
            os.fsync(file.fileno())
measure(work)
"""
)
MERGE = (
    COMMON
    + """
import jax, transferjax as tj
from transferjax import io, merging, surgery
methods = {
    "ties": lambda base, models: merging.leafwise(merging.ties, base, models, density=0.2),
    "dare": lambda base, models: merging.leafwise(merging.dare, base, models, None, 0.2, jax.random.key(0)),
}
jax.random.key(0)
def work():
    base, *models = (io.open(f"{folder}/{name}.safetensors") for name in ("base", "a", "b", "c"))
    merge = methods[sys.argv[2]](base, models)
    io.transplant(merge, surgery.plan(merge.shapes, dict(merge.shapes)), f"{folder}/out-merged.safetensors")
measure(work)
"""
)


def memory(field: str) -> float:
    """MB, of this process."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def process(code: str, folder: pathlib.Path, *arguments: str) -> tuple[float, float]:
    """Seconds and MB of peak memory that a new process measured; what it wrote is removed again."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:  # what is read next comes from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-c", code, str(folder), *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    for path in folder.glob("out-*"):
        path.unlink()
    seconds, megabytes = done.stdout.split()[-2:]
    return float(seconds), float(megabytes)


def from_files(size: float, side: int, rounds: int) -> tuple[list[tuple], dict[str, str]]:
    """Rows of TIES and DARE, and every rate; ``size`` in GB, leaves of ``side`` by ``side`` float32."""
    rng = np.random.default_rng(0)
    count = max(2, round(size * 1e9 / (4 * side * side)))
    draw = lambda scale: scale * rng.standard_normal((side, side), np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        base = {f"l{n}": draw(1) for n in range(count)}
        save_file(base, folder / "base.safetensors")
        for model in "abc":
            save_file({key: value + draw(0.01) for key, value in base.items()}, folder / f"{model}.safetensors")
        held = count * 4 * side * side / 1e6
        del base
        found = []
        for number in range(rounds):
            runs = {"copy": (COPY,), "ties": (MERGE, "ties"), "dare": (MERGE, "dare")}
            order = list(runs) if number % 2 else list(runs)[::-1]
            found.append({key: process(runs[key][0], folder, *runs[key][1:]) for key in order})
    rows, leaf = [], 4 * side * side / 1e6
    files = {"copy": 6, "ties": 5, "dare": 5}  # the copy reads three and writes three; a merge reads four, writes one
    rates = {key: [count * held / run[key][0] for run in found] for key, count in files.items()}
    for key in ("ties", "dare"):
        ratio = statistics.median(ours / copied for ours, copied in zip(rates[key], rates["copy"]))
        ours, theirs = statistics.median(rates[key]), statistics.median(rates["copy"])
        rows.append((f"{key}, MB/s, at least", ours, theirs, ratio, RATE, ratio >= RATE))
        peak, most = max(run[key][1] for run in found), LEAVES * leaf + EXTRA
        rows.append((f"{key}, peak MB, at most", peak, None, peak, most, peak <= most))
    return rows, {f"{key}, MB/s, round by round": " ".join(f"{n:.0f}" for n in each) for key, each in rates.items()}


def coefficients() -> list[tuple]:
    """Rows of twenty coefficients: time, compilations, passes over the data and memory."""
    base, _ = tj.models.load("efficientnet_lite0", num_classes=10, key=jax.random.key(0))
    base = tj.data.on_images(base, SIZE)
    tuned = jax.tree.map(lambda leaf: leaf * 1.01, base.params)
    evaluate = lambda params, batch: jnp.mean(
        base.apply(params, base.extra, batch["inputs"])[0].argmax(-1) == batch["labels"]
    )
    alphas = np.linspace(0, 1, COEFFICIENTS)
    given = list(tj.data.batches(tj.data.open("sample", "train"), BATCH, shuffle=False)) * 2
    reference = jax.jit(evaluate)
    ours, theirs, grown, compiled, read = [], [], [], [], 0
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )

    def measured(work) -> tuple[float, float]:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")
        before, begin = memory("VmRSS"), time.perf_counter()
        work()
        return time.perf_counter() - begin, memory("VmHWM") - before

    def twenty(batch) -> None:
        for _ in range(COEFFICIENTS):
            reference(base.params, batch).block_until_ready()

    def batches():
        """The batches; between two of them the reference takes its turn, and what ``search`` took is looked at."""
        nonlocal read
        for number, batch in enumerate(given):
            other = measured(lambda batch=batch: twenty(batch))
            with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
                file.write("5")
            before, begin, programs = memory("VmRSS"), time.perf_counter(), len(compiled)
            read += 1
            yield batch
            if number:
                ours.append(time.perf_counter() - begin)
                theirs.append(other[0])
                grown.append((memory("VmHWM") - before, other[1]))
            late.append(len(compiled) - programs if number else 0)

    late: list[int] = []
    tj.merging.search(lambda alpha: tj.merging.wise_ft(base.params, tuned, alpha), alphas, evaluate, batches())
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(base.params)) / 1e6
    ratio = statistics.median(a / b for a, b in zip(ours, theirs))
    peak, once = max(a for a, _ in grown), max(b for _, b in grown)
    rows = [
        ("20 coefficients, s by batch", statistics.median(ours), statistics.median(theirs), ratio, TIME, ratio <= TIME),
        ("20 coefficients, MB, at most", peak, once, peak, SLACK * (weights + once), peak <= SLACK * (weights + once)),
        ("compilations after the first batch", sum(late), None, sum(late), 0, not sum(late)),
        ("times that a batch is read", read / len(given), None, read / len(given), 1, read == len(given)),
    ]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    parser.add_argument("--size", type=float, default=1.0, help="GB of each checkpoint")
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of each float32 leaf")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of processes")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    rows, rates = from_files(arguments.size, arguments.side, arguments.rounds)
    rows += coefficients()
    columns = ("quantity", "merging", "other", "value", "bound", "met")
    facts = {"the other": "a plain copy; twenty evaluations", "load": " ".join(f"{n:.1f}" for n in os.getloadavg())}
    facts |= rates
    print(tj.Report("Merging", columns, tuple(rows), facts))
    return int(arguments.check and not all(row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
