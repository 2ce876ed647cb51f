"""Evidence of a made-up world, in which what is best is known."""

import pytest

from transferjax.advise import Evidence, Run, Task

WAYS = {
    ("net", "features", "", "last", "closed form", 0): 1.0,
    ("net", "finetune", "full", "", "sgd", 32): 0.9,
    ("net", "finetune", "full", "", "adamw", 32): 0.8,
    ("net", "finetune", "full", "", "sgd", 128): 0.6,
    ("net", "finetune", "full", "", "adamw", 128): 0.5,
    ("raw", "features", "", "inputs", "closed form", 0): 1.0,
    ("none", "scratch", "full", "", "adamw", 32): 1.5,
    ("none", "scratch", "full", "", "adamw", 128): 1.2,
}
"""By how much each strategy multiplies the error of the probe it starts from."""


def make_world(errors=(0.4, 0.3, 0.2, 0.1), ways=WAYS):
    """Tasks whose probes are wrong as often as ``errors`` says; the inputs' own probe half as often again."""
    runs, tasks = [], []
    for place, error in enumerate(errors):
        for seed in (0, 1):
            wrong = {"net": error + 0.01 * seed, "raw": 1.5 * error}
            for source, parameters in (("raw", 0), ("net", 10**6)):
                facts = ("image", 100 * (place + 1), 4, parameters, 8, 1 - wrong[source])
                tasks.append(Task(f"task{place}", seed, source, *facts, None, None, None, 0.1, 0.2, 0.3))
            for (source, road, tuning, features, optimizer, steps), ratio in ways.items():
                accuracy = 1 - wrong["net" if source == "net" else "raw"] * ratio
                what = (source, road, tuning, features, optimizer, 0.1 if optimizer == "sgd" else 1e-3)
                runs.append(Run(f"task{place}", seed, *what, steps, 32, accuracy, 1.0, f"E{len(runs) + 1}"))
    return Evidence(tuple(runs), tuple(tasks))


@pytest.fixture
def ways():
    return WAYS


@pytest.fixture
def world():
    return make_world


@pytest.fixture
def evidence():
    return make_world()
