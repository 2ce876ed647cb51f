"""LogME on the eigenbasis: the time and the memory of scoring 50,000 examples.

50,000 x 1,280 float32 features (a head's width) of 100 classes, and thuml's own numpy code beside ours: run
``python benchmarks/scores.py --peer CHECKOUT`` with a checkout whose ``tllib/ranking/logme.py`` is imported; with
``--check`` it exits with 1 when a figure is missed. Each side runs in a process of its own, on the same two cores, and
reads the features from one file. Times are medians over ``--turns`` calls; memory is the most that the process held
during the calls, less what it held with the features loaded, and the whole as a fact. Both are LogME: the scores are
compared too, and ours must not be lower (it is the maximum that the fixed point approaches).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

SPEED, MEMORY, LOWER = 2.0, 0.5, 1e-6
MEGABYTE = 1e6


def write(folder, arguments):
    """Features around one mean per class, and their labels, as two files."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, arguments.classes, arguments.examples)
    means = rng.standard_normal((arguments.classes, arguments.width), np.float32)
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (len(labels), arguments.width))
    for start in range(0, len(labels), 5000):
        rows = slice(start, start + 5000)
        noise = rng.standard_normal((len(labels[rows]), arguments.width), np.float32)
        features[rows] = np.maximum(0.3 * means[labels[rows]] + noise, 0)
    features.flush()
    np.save(folder / "labels.npy", labels)


def held():
    """Bytes that the process holds now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def side(folder, peer, turns):
    """One side, in this process: its score, times and memory, as one line of JSON."""
    if peer:
        sys.path.insert(0, str(pathlib.Path(peer) / "tllib" / "ranking"))
        from logme import log_maximum_evidence as score
    else:
        from transferjax.scores import logme as score
    features, labels = np.load(folder / "features.npy"), np.load(folder / "labels.npy")
    before, times, busy, found = held(), [], [], 0.0
    for _ in range(turns):
        begin, used = time.perf_counter(), time.process_time()
        found = float(score(features, labels))
        times.append(time.perf_counter() - begin)
        busy.append(time.process_time() - used)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds, processor = statistics.median(times), statistics.median(busy)
    figures = {"score": found, "seconds": seconds, "processor": processor, "most": most, "above": most - before}
    print(json.dumps(figures))


def measure(arguments):
    import transferjax as tj

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder, arguments)
        command = [sys.executable, os.path.abspath(__file__), "--side", name]
        sides, environment = [], {**os.environ, "OPENBLAS_NUM_THREADS": str(arguments.threads)}
        for turns, extra in ((arguments.turns, []), (arguments.peer_turns, ["--peer", arguments.peer])):
            call = [*command, "--turns", str(turns), *extra]
            done = subprocess.run(call, check=True, stdout=subprocess.PIPE, env=environment)
            sides.append(json.loads(done.stdout.splitlines()[-1]))
    ours, theirs = sides
    rows = [
        ("seconds", ours["seconds"], theirs["seconds"], 1 / SPEED),
        ("memory above the features, MB", ours["above"] / MEGABYTE, theirs["above"] / MEGABYTE, MEMORY),
    ]
    rows = [(what, mine, other, mine / other, limit, mine / other <= limit) for what, mine, other, limit in rows]
    lower = theirs["score"] - ours["score"]
    rows.append(("score (not lower)", ours["score"], theirs["score"], lower, LOWER, lower <= LOWER))
    facts = {
        "examples, columns, classes": f"{arguments.examples:,}, {arguments.width:,}, {arguments.classes:,}",
        "processor seconds": f"{ours['processor']:.2f} and {theirs['processor']:.2f}",
        "threads of the matrix products": arguments.threads,
        "the whole process, MB": f"{ours['most'] / MEGABYTE:.0f} and {theirs['most'] / MEGABYTE:.0f}",
        "load": " ".join(f"{n:.1f}" for n in os.getloadavg()),
    }
    columns = ("quantity", "here", "other", "ratio", "limit", "met")
    return tj.Report("LogME against thuml's numpy code", columns, tuple(rows), facts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a checkout with tllib/ranking/logme.py")
    parser.add_argument("--examples", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--turns", type=int, default=3, help="measured calls of our side")
    parser.add_argument("--peer-turns", type=int, default=1, help="measured calls of the other side")
    parser.add_argument("--threads", type=int, default=2, help="of the matrix products; 1 on a machine that is busy")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return side(pathlib.Path(arguments.side), arguments.peer, arguments.turns)
    if not arguments.peer:
        parser.error("--peer CHECKOUT is needed: the code to compare with")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    report = measure(arguments)
    print(report)
    return int(arguments.check and not all(report.column("met")))


if __name__ == "__main__":
    sys.exit(main())
