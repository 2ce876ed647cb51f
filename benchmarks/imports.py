"""How long ``import transferjax`` takes beside ``import jax, optax``, and ``open`` + ``plan`` on a real file.

Run ``python benchmarks/imports.py``; with ``--check`` it exits with 1 when a figure is missed. Imports are whole
processes, interleaved; the figure is the median of the ratios of pairs. Both run from bytecode, as an installed
package does, whatever the environment says about writing it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import transferjax as tj

IMPORT, OPEN_AND_PLAN = 1.15, 0.5
_PLAN = """
import time, jax, transferjax as tj
from transferjax import io, models, surgery
model = models.create("efficientnet_lite0", num_classes=10, key=jax.random.key(0))
rules = models.rules("efficientnet_lite0", "torch", num_classes=10)
path = models.default_weights("efficientnet_lite0")
begin = time.perf_counter()
source = io.open(path)
surgery.plan(source.shapes, model, *rules)
print(time.perf_counter() - begin)
"""


def process(code: str, bytecode: str) -> tuple[float, str]:
    """Seconds of a whole Python process, and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = bytecode
    command = [sys.executable, "-c", code]
    begin = time.perf_counter()
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - begin, found.stdout


def imports(pairs: int, bytecode: str) -> tuple[float, float, float]:
    """Median ratio, median seconds of ``import transferjax``, median seconds of ``import jax, optax``."""
    ours, theirs = "import transferjax", "import jax, optax"
    for warm_up in (ours, theirs):
        process(warm_up, bytecode)
    times = []
    for number in range(pairs):
        first, second = (ours, theirs) if number % 2 else (theirs, ours)
        spent = process(first, bytecode)[0], process(second, bytecode)[0]
        times.append(spent if number % 2 else spent[::-1])
    median = lambda values: statistics.median(list(values))
    return median(a / b for a, b in times), median(a for a, _ in times), median(b for _, b in times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs of processes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as bytecode:
        ratio, ours, theirs = imports(arguments.pairs, bytecode)
        planned = statistics.median([float(process(_PLAN, bytecode)[1]) for _ in range(3)])
    rows = (
        ("import transferjax / import jax, optax", ours, theirs, ratio, IMPORT, ratio <= IMPORT),
        ("open + plan, EfficientNet-Lite0 (seconds)", planned, None, planned, OPEN_AND_PLAN, planned <= OPEN_AND_PLAN),
    )
    columns = ("quantity", "seconds", "reference seconds", "value", "at most", "met")
    print(tj.Report("Imports", columns, rows, {"pairs": arguments.pairs, "python": sys.version.split()[0]}))
    return int(arguments.check and not all(row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
