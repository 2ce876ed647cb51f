"""``transferjax score``: how close several sources are to your images, before anything is trained."""

from __future__ import annotations

import argparse
from typing import Any

from transferjax.cli._arguments import some_of, verb
from transferjax.cli._console import note, show

SCORES = ("logme", "h_score_regularized", "nleep", "transrate", "gbc", "knn_accuracy", "leep", "nce")
OF_CLASSES = ("leep", "nce")
"""Those that read the classes a source was trained on, and no features."""
USUAL = ["logme", "h_score_regularized", "knn_accuracy"]


def add(verbs: Any) -> None:
    from transferjax.cli._features import add_source

    parser = verb(
        verbs,
        "score",
        run,
        "how close pretrained networks are to your images",
        "Scores each --model by its features of the images of --split: nothing is trained. The sources are ranked by\n"
        "the mean of their ranks; where the scores disagree, trust the order less. The pixels themselves are scored\n"
        "beside them.\n"
        "leep and nce read the classes that a network was trained on, in one more pass. A source without any, as the\n"
        "pixels, has an empty cell there: it is not ranked by that score, and the others are ranked among themselves.",
        "  transferjax score --data sample --size 64 --model efficientnet_lite0 --model efficientnet_lite1",
    )
    add_source(parser)
    parser.add_argument(
        "--model", action="append", required=True, help="of the zoo, or module:function; may be repeated"
    )
    names, listed = some_of("score", SCORES, USUAL)
    parser.add_argument("--scores", type=names, default=USUAL, metavar="LIST", help=listed)


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli._features import features_of, raw_features

    source = tj.data.open(arguments.data, arguments.split, arguments.data_dir)
    tj.data.check_classes(source)
    models = [*dict.fromkeys(arguments.model)]
    found = {"pixels": {}, **_of_classes(models, arguments, source)}
    of_features = [score for score in arguments.scores if score not in OF_CLASSES]
    for name in found if of_features else ():
        pixels = name == "pixels"
        features = raw_features(source) if pixels else features_of(name, "auto", arguments.size, source)
        x = features["inputs" if pixels else "outputs"]
        found[name] |= {score: getattr(tj.scores, score)(x, features.labels) for score in of_features}
        note(f"score: {name} done")
    table = [[found[name].get(score) for score in arguments.scores] for name in found]
    columns = ("source", *arguments.scores, "mean rank", "ranks")
    facts = {"data": arguments.data, "images": len(source), "order": "by the mean rank; higher scores are better"}
    if any(None in row for row in table):
        facts["empty cells"] = "sources without classes of their own"
    show(tj.Report("Sources", columns, tuple(_ranked([*found], table)), facts), arguments.json)
    return 0


def _of_classes(models: list[str], arguments: argparse.Namespace, source: Any) -> dict[str, dict[str, float]]:
    """By source, the scores of ``OF_CLASSES`` that are asked for; none where it has no classes of its own."""
    import transferjax as tj
    from transferjax.cli._features import class_probabilities

    found: dict[str, dict[str, float]] = {name: {} for name in models}
    asked = [score for score in arguments.scores if score in OF_CLASSES]
    for name in models if asked else ():
        table = class_probabilities(name, arguments.size, source)
        if table is not None:
            given = {"leep": table["outputs"], "nce": table["outputs"].argmax(axis=1)}
            found[name] = {score: getattr(tj.scores, score)(given[score], table.labels) for score in asked}
            note(f"score: {', '.join(asked)} of {name} done")
    if asked and not any(found.values()):
        raise tj.TransferError(
            f"--scores {','.join(asked)} needs a source's own class probabilities, and no --model has classes: "
            f"{', '.join(models)}. Expected a model of the zoo, or a function whose num_classes has a default and of "
            "which num_classes=0 leaves the classifier out. Scores of features need none: write --scores nleep."
        )
    return found


def _ranked(names: list[str], table: list[list[float | None]]) -> list[tuple[Any, ...]]:
    """The rows by their mean rank, over the scores that they have; those without a score come last."""
    import numpy as np

    ranks = np.array([_ranks(column) for column in zip(*table, strict=True)]).T
    rows = []
    for name, values, found in zip(names, table, ranks, strict=True):
        own = found[~np.isnan(found)]
        told = (float(own.mean()), f"{own.min():g} to {own.max():g}") if own.size else (None, None)
        rows.append((name, *values, *told))
    return sorted(rows, key=lambda row: np.inf if row[-2] is None else row[-2])


def _ranks(values: Any) -> Any:
    """1 for the highest; what is equal shares its ranks, and ``None`` has none (NaN).

    >>> _ranks([0.5, 0.9, None, 0.5]).tolist()
    [2.5, 1.0, nan, 2.5]
    """
    import numpy as np

    values = np.asarray(values, float)
    higher = (values[None] > values[:, None]).sum(axis=1)
    return np.where(np.isnan(values), np.nan, higher + (1 + (values[None] == values[:, None]).sum(axis=1)) / 2)
