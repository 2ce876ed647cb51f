"""``transferjax score``: how close several sources are to your images, before anything is trained."""

from __future__ import annotations

import argparse
from typing import Any

from transferjax.cli._arguments import some_of, verb
from transferjax.cli._console import note, show

SCORES = ("logme", "h_score_regularized", "nleep", "transrate", "gbc", "knn_accuracy")
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
        "beside them.",
        "  transferjax score --data sample --size 64 --model efficientnet_lite0 --model efficientnet_lite1",
    )
    add_source(parser)
    parser.add_argument(
        "--model", action="append", required=True, help="of the zoo, or module:function; may be repeated"
    )
    names, listed = some_of("score", SCORES, USUAL)
    parser.add_argument("--scores", type=names, default=USUAL, metavar="LIST", help=listed)


def run(arguments: argparse.Namespace) -> int:
    import numpy as np

    import transferjax as tj
    from transferjax.cli._features import features_of, raw_features

    source = tj.data.open(arguments.data, arguments.split, arguments.data_dir)
    tj.data.check_classes(source)
    names = ["pixels", *dict.fromkeys(arguments.model)]
    table = []
    for name in names:
        pixels = name == "pixels"
        features = raw_features(source) if pixels else features_of(name, "auto", arguments.size, source)
        x = features["inputs" if pixels else "outputs"]
        table.append([getattr(tj.scores, score)(x, features.labels) for score in arguments.scores])
        note(f"score: {name} done")
    ranks = np.array([_ranks(column) for column in np.array(table).T]).T
    order = np.argsort(ranks.mean(axis=1), kind="stable")
    rows = [(names[n], *table[n], float(ranks[n].mean()), f"{ranks[n].min():g} to {ranks[n].max():g}") for n in order]
    columns = ("source", *arguments.scores, "mean rank", "ranks")
    facts = {"data": arguments.data, "images": len(source), "order": "by the mean rank; higher scores are better"}
    show(tj.Report("Sources", columns, tuple(rows), facts), arguments.json)
    return 0


def _ranks(values: Any) -> Any:
    """1 for the highest; what is equal shares its ranks.

    >>> _ranks([0.5, 0.9, 0.5]).tolist()
    [2.5, 1.0, 2.5]
    """
    import numpy as np

    values = np.asarray(values, float)
    higher = (values[None] > values[:, None]).sum(axis=1)
    return higher + (1 + (values[None] == values[:, None]).sum(axis=1)) / 2
