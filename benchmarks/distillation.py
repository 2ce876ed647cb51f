"""Distillation: with what the teacher said kept, a step costs what the student costs; without, one teacher pass more.

A small ConvNet at 28x28 learns from EfficientNet-Lite0 at 64x64, on the bundled images, batch 64. With the cache: a
step of ``distill(student, None, ...)`` on the batches of ``TeacherCache.taught``, the rows read each time, against a
step of the student's cross-entropy on the same batches. Without: a step of ``distill(student, teacher, ...)`` against
the sum of that cross-entropy step and the teacher's compiled forward pass, measured apart. Sides take turns batch
by batch in one process, each waited for; the first epoch, which compiles and fills the cache, does not count; ratios
are medians over batches. With ``--check`` it exits with 1 when a figure is missed. Run it on a machine that does
nothing else.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time

import jax
import optax

import transferjax as tj

BATCH, CLASSES, STUDENT_SIZE, TEACHER_SIZE = 64, 10, 28, 64
WITH_CACHE, WITH_TEACHER = 1.1, 1.05


def training(student, objective):
    """``batch -> None``: one finished step of all weights, each on the state that the one before has left."""
    tuning, tx = tj.full(), optax.adam(1e-3)
    step, held = tj.make_step(objective, tuning, tx), list(tj.init(jax.random.key(1), student, tuning, tx))

    def run(batch):
        held[0], metrics = step(*held, batch)
        jax.block_until_ready((held[0], metrics))

    return run


def sides(batches):
    """What is compared, by name: functions of a batch's number."""
    student = tj.models.create("convnet_small", num_classes=CLASSES, key=jax.random.key(0))
    teacher, _ = tj.models.load("efficientnet_lite0", num_classes=CLASSES, key=jax.random.key(0))
    student, teacher = tj.data.on_images(student, STUDENT_SIZE), tj.data.on_images(teacher, TEACHER_SIZE)
    kd = functools.partial(tj.objectives.losses.kd, temperature=4.0)
    distill = functools.partial(tj.objectives.distill, loss=kd, supervised=tj.objectives.cross_entropy)
    plain = training(student, tj.objectives.cross_entropy(student.apply))
    cached = training(student, distill(student, None))
    beside = training(student, distill(student, teacher))
    apply = jax.jit(lambda params, extra, inputs: teacher.apply(params, extra, inputs)[0])
    taught = tj.io.TeacherCache(teacher).taught(batch for _ in iter(int, 1) for batch in batches)
    forward = lambda inputs: apply(teacher.params, teacher.extra, inputs).block_until_ready()
    return {
        "student": lambda number: plain(batches[number]),
        "teacher pass": lambda number: forward(batches[number]["inputs"]),
        "cached": lambda number: cached(next(taught)),
        "uncached": lambda number: beside(batches[number]),
    }


def measure(epochs):
    """Seconds of each side by batch, over all epochs but the first."""
    batches = list(tj.data.batches(tj.data.open("sample", "train"), BATCH, seed=0, epochs=1))
    run, times = sides(batches), []
    for epoch in range(epochs + 1):
        for number in range(len(batches)):
            spent = {}
            for name in list(run) if number % 2 else list(run)[::-1]:
                begin = time.perf_counter()
                run[name](number)
                spent[name] = time.perf_counter() - begin
            if epoch:
                times.append(spent)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="measured epochs of 15 batches")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    times = measure(arguments.epochs)
    median = lambda of: statistics.median(map(of, times))
    apart = lambda t: t["student"] + t["teacher pass"]
    cases = (
        ("step with the cache, ms", lambda t: t["cached"], lambda t: t["student"], WITH_CACHE),
        ("step without the cache, ms", lambda t: t["uncached"], apart, WITH_TEACHER),
    )
    rows = []
    for name, ours, other, most in cases:
        ratio = median(lambda t, ours=ours, other=other: ours(t) / other(t))
        rows.append((name, 1e3 * median(ours), 1e3 * median(other), ratio, most, ratio <= most))
    facts = {
        "the other": "the student's step; that and the teacher's forward pass, measured apart",
        "teacher pass, ms": 1e3 * median(lambda t: t["teacher pass"]),
        "batches measured": len(times),
        "load": " ".join(f"{n:.1f}" for n in os.getloadavg()),
    }
    columns = ("quantity", "distillation", "other", "ratio", "at most", "met")
    print(tj.Report("Distillation from EfficientNet-Lite0", columns, tuple(rows), facts))
    return int(arguments.check and not all(row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
