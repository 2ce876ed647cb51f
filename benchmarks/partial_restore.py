"""``restore`` of an eighth of a checkpoint beside all of it, and onto 8 devices of which none sees a leaf whole.

Run ``python benchmarks/partial_restore.py``; with ``--check`` it exits with 1 when a figure is missed. Both restores
run in pairs in one process, from the operating system's cache of the file. It needs disk for twice the size, and
memory for it once.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

import transferjax as tj
from transferjax import io, surgery

COST, SHARE, PARTS = 0.2, 1 / 8, 8
_SHARDED = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from transferjax import io, surgery
put, largest = jax.make_array_from_callback, [0.0]
def watched(shape, sharding, callback, dtype=None):
    def part(index):
        found = callback(index)
        largest[0] = max(largest[0], found.size / np.prod(shape))
        return found
    return put(shape, sharding, part, dtype=dtype)
jax.make_array_from_callback = watched
jax.device_put = None  # the way to place a leaf whole
source = io.open(sys.argv[1])
target = {name: jax.ShapeDtypeStruct(s.shape, s.dtype) for name, s in source.shapes.items()}
where = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), P("d"))
found = io.restore(source, surgery.plan(source.shapes, target), target, where)
held = [shard.data.size / leaf.size for leaf in found.values() for shard in leaf.addressable_shards]
print(max(largest[0], *held), len({shard.device for leaf in found.values() for shard in leaf.addressable_shards}))
"""


def seconds(source: io.Checkpoint, names: list[str]) -> float:
    """How long it takes to restore these leaves and no others."""
    target = {name: jax.ShapeDtypeStruct(source.shapes[name].shape, source.shapes[name].dtype) for name in names}
    rest = set(source.shapes) - set(names)
    waived = [surgery.waive(tj.where(lambda path, leaf: path in rest))] if rest else []
    made = surgery.plan(source.shapes, target, *waived)
    begin = time.perf_counter()
    jax.block_until_ready(io.restore(source, made, target))
    return time.perf_counter() - begin


def compare(path: pathlib.Path, pairs: int) -> tuple[float, float, float]:
    """Median ratio of an eighth over all, and the median seconds of each."""
    source = io.open(path)
    names = list(source.shapes)
    eighth = names[::PARTS]
    times = []
    for number in range(pairs + 1):
        first, second = (eighth, names) if number % 2 else (names, eighth)
        spent = seconds(source, first), seconds(source, second)
        times.append(spent if number % 2 else spent[::-1])
    median = lambda values: statistics.median(list(values)[1:])  # the first pair warms up
    return median(a / b for a, b in times), median(a for a, _ in times), median(b for _, b in times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    parser.add_argument("--size", type=float, default=1.1, help="GB of the checkpoint")
    parser.add_argument("--leaves", type=int, default=64, help="leaves of the checkpoint")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs of restores")
    arguments = parser.parse_args()
    side = int((arguments.size * 1e9 / arguments.leaves / 4) ** 0.5) // 8 * 8
    leaf = np.random.default_rng(0).standard_normal((side, side), np.float32)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        io.save(folder / "safetensors", {f"l{n}": leaf for n in range(arguments.leaves)}, format="safetensors")
        source = io.open(folder / "safetensors")
        io.transplant(source, surgery.plan(source.shapes, source.shapes), folder / "orbax")
        for format in ("safetensors", "orbax"):
            ratio, eighth, whole = compare(folder / format, arguments.pairs)
            rows.append((f"{format}: an eighth / all (seconds)", eighth, whole, ratio, COST, ratio <= COST))
        for format in ("safetensors", "orbax"):
            command = [sys.executable, "-c", _SHARDED, str(folder / format)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            share, devices = done.stdout.split()[-2:]
            what = f"{format}: largest share of a leaf on one of {devices} devices"
            rows.append((what, float(share), None, float(share), SHARE, float(share) <= SHARE and devices == "8"))
    columns = ("quantity", "ours", "reference", "value", "at most", "met")
    facts = {"leaves": arguments.leaves, "bytes": arguments.leaves * leaf.nbytes, "pairs": arguments.pairs}
    print(tj.Report("Partial restore", columns, tuple(rows), {**facts, "backend": jax.default_backend()}))
    return int(arguments.check and not all(row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
