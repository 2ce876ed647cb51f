"""``transferjax probe``: how well a network's features tell your classes, without training the network."""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from transferjax.cli._arguments import some_of, verb
from transferjax.cli._console import note, show

READOUTS = ("ridge", "logistic", "svm", "knn", "nearest_mean", "lda")
USUAL = ["ridge", "knn"]
COLUMNS = ("read-out", "accuracy", "seconds")
KNOWN = {
    "ridge on pixels": ("inputs", "closed form"),
    "ridge on the network's features": ("last", "closed form"),
    "logistic on the network's features": ("last", "l-bfgs"),
    "Head2Toe on all layers": ("all layers", "closed form"),
}
"""The read-outs that advice knows: their features and optimizer."""


def add(verbs: Any) -> None:
    from transferjax.cli._features import add_source

    parser = verb(
        verbs,
        "probe",
        run,
        "how well a network's features tell your classes",
        "Takes the features of a pretrained network from one pass over the images of --split, fits small read-outs\n"
        "on them, and says how often each is right on the images of --test. The pixels themselves are read out too:\n"
        "features that do no better are not worth transferring. With --layers, all these layers are read out\n"
        "together (Head2Toe) and each alone.",
        "  transferjax probe --data sample --test test --size 64 --layers '{stem,blocks/*}'\n"
        "  transferjax probe --data folder:photos --split 'train[:80%]' --test 'train[80%:]' --readouts ridge,knn",
    )
    add_source(parser)
    parser.add_argument("--test", metavar="SPLIT", required=True, help="part of the data to be right on")
    named = "of the zoo, or module:function (efficientnet_lite0)"
    parser.add_argument("--model", default="efficientnet_lite0", help=named)
    parser.add_argument("--weights", metavar="PATH", default="auto", help="weight file, 'auto' or 'none' (auto)")
    parser.add_argument("--layers", metavar="GLOB", help="module paths whose outputs are features too (none)")
    names, listed = some_of("read-out", READOUTS, USUAL)
    parser.add_argument("--readouts", type=names, default=USUAL, metavar="LIST", help=listed)
    parser.add_argument("--output", metavar="DIR", help="new directory for a report and pictures (none)")
    parser.add_argument("--evidence", metavar="DIR", help="your own runs, which advise rests on; more are added (none)")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli._features import features_of, raw_features

    output = None if arguments.output is None else pathlib.Path(arguments.output)
    if output is not None and output.exists():
        raise tj.DataError(f"--output '{output}' exists already. Expected a new directory.")
    source, test = (tj.data.open(arguments.data, s, arguments.data_dir) for s in (arguments.split, arguments.test))
    tj.data.check_classes(source)
    own = (arguments.model, arguments.weights, arguments.size)
    train, held = (features_of(*own, part, arguments.layers) for part in (source, test))
    pixels = [raw_features(part) for part in (source, test)]
    rows, layers = [], None
    for name, fitted, seconds, accuracy in _fitted(train, held, pixels, arguments.readouts):
        rows.append((name, accuracy, seconds))
        layers = fitted.report if name.startswith("Head2Toe") else layers
        note(f"probe: {name}: {100 * accuracy:.1f} %")
    facts = {"model": arguments.model, "data": arguments.data, "images": f"{len(train):,} and {len(held):,}"}
    report = tj.Report(f"Read-outs of {arguments.model}", COLUMNS, tuple(rows), {**facts, **_kept(layers)})
    if output is not None:
        _write(output, report, layers)
    if arguments.evidence is not None:
        _record(arguments, train, pixels[0], rows)
    show(report, arguments.json)
    return 0


def _fitted(train: Any, held: Any, pixels: Any, names: list[str]) -> Iterator[tuple[str, Any, float, float]]:
    """Every read-out with its seconds and its share of right answers."""
    import transferjax as tj

    last, raw = lambda table: table["outputs"], [table["inputs"] for table in pixels]
    yield "ridge on pixels", *_one(lambda: tj.features.ridge(raw[0], train.labels), raw[1], held)
    for name in names:
        fit = getattr(tj.features, name)
        yield (
            f"{name} on the network's features",
            *_one(lambda fit=fit: fit(last(train), train.labels), last(held), held),
        )
    if len(train.arrays) > 1:
        side_by_side = held.concatenated(_order(held))
        yield "ridge on the best layer", *_one(lambda: tj.features.best_layer(train), side_by_side, held)
        yield "Head2Toe on all layers", *_one(lambda: tj.features.head2toe(train), side_by_side, held)


def _order(table: Any) -> list[str]:
    return [*(name for name in table.arrays if name != "outputs"), "outputs"]


def _one(fit: Callable[[], Any], features: Any, held: Any) -> tuple[Any, float, float]:
    import numpy as np

    begin = time.perf_counter()
    found = fit()
    outputs = np.asarray(found.predict(found.params, features))
    return found, time.perf_counter() - begin, float((outputs.argmax(-1) == held.labels).mean())


def _kept(layers: Any) -> dict[str, Any]:
    return {} if layers is None else {"Head2Toe keeps": layers.metadata["kept"]}


def _record(arguments: argparse.Namespace, train: Any, pixels: Any, rows: list[tuple[str, float, float]]) -> None:
    """Appends what was found to the user's own evidence: the task as advise sees it, and each read-out it knows."""
    import numpy as np

    import transferjax as tj
    from transferjax.cli._candidates import parameters_of, source_of, target_of

    advise = tj.advise
    network = source_of(arguments.model, arguments.weights)
    size = parameters_of(arguments.model, arguments.weights, arguments.size)
    candidates = {"raw": advise.Candidate(pixels, 0), network: advise.Candidate(train, size)}
    target = target_of(arguments.data, arguments.split, arguments.size)
    kept: list[Any] = list(advise.describe_task(candidates, np.asarray(train.labels), target=target))
    for name, accuracy, seconds in rows:
        if name in KNOWN:
            what, optimizer = KNOWN[name]
            source = "raw" if what == "inputs" else network
            spent = (0.0, 0, 0, accuracy, seconds)
            kept.append(advise.Run(target, 0, source, "features", "", what, optimizer, *spent))
    advise.record(arguments.evidence, kept)


def _write(output: pathlib.Path, report: Any, layers: Any) -> None:
    """A directory with the report and its pictures, whole or not at all."""
    import tempfile

    import transferjax as tj

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as place:
        made = pathlib.Path(place) / "made"
        made.mkdir()
        text = report.to_markdown() + ("" if layers is None else f"\n\n{layers.to_markdown()}")
        (made / "report.md").write_text(text + "\n", encoding="utf-8")
        tj.report.comparison(report).savefig(made / "readouts.png")
        if layers is not None:
            tj.report.layers(layers, "relevance").savefig(made / "layers.png")
        made.rename(output)
