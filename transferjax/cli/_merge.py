"""``transferjax merge``: several weight files become one, without training."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from transferjax.cli._arguments import natural, number, numbers, verb
from transferjax.cli._console import show
from transferjax.cli._transplant import FORMATS

OPTIONS = ("weights", "density", "gamma", "scale", "alpha", "seed")


class Method(NamedTuple):
    """What a merge takes: its options with their defaults, a base or none, and how many checkpoints."""

    function: str
    options: Mapping[str, Any]
    base: bool = True
    least: int = 1
    most: int | None = None


METHODS = {
    "soup": Method("soup", {"weights": None}, base=False, least=2),
    "wise-ft": Method("wise_ft", {"alpha": 0.5}, most=1),
    "task-arithmetic": Method("task_arithmetic", {"weights": None, "scale": 1.0}),
    "ties": Method("ties", {"weights": None, "density": 0.2, "scale": 1.0}),
    "dare": Method("dare", {"weights": None, "density": 0.2, "scale": 1.0, "seed": 0}),
    "breadcrumbs": Method("breadcrumbs", {"weights": None, "density": 0.9, "gamma": 0.01, "scale": 1.0}),
    "slerp": Method("slerp", {"alpha": 0.5}, base=False, least=2, most=2),
    "karcher": Method("karcher", {"weights": None}, base=False, least=2),
    "model-stock": Method("model_stock", {}, least=2),
}


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "merge",
        run,
        "several weight files become one, without training",
        "Merges weight files of any format that are equal in names, shapes and dtypes, one array of each in memory at\n"
        "a time:\n"
        "  soup, karcher, slerp                    means of models, straight or on a sphere\n"
        "  wise-ft                                 a point between the base and one model\n"
        "  task-arithmetic, ties, dare,\n"
        "  breadcrumbs, model-stock                what models learnt beyond their base, added to it\n"
        "Errors count the models from 0. Of a run, `transferjax export` writes the weights to merge.",
        "  transferjax merge ties a.safetensors b.safetensors --base base.pth --density 0.2 --output c.safetensors\n"
        "  transferjax merge soup a.npz b.npz --weights 0.75,0.25 --output soup.npz",
    )
    parser.add_argument("method", metavar="METHOD", choices=METHODS, help=f"one of {', '.join(METHODS)}")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="a weight file or checkpoint directory")
    parser.add_argument("--base", metavar="BASE", help=f"what the models were tuned from; for {_takers('base')}")
    parser.add_argument("--output", required=True, metavar="OUT", help="the file, or for Orbax the directory, to write")
    weights = f"one per model: 0.5,0.5 or --weights=-1,1 (shares of a mean, else ones); for {_takers('weights')}"
    parser.add_argument("--weights", type=numbers, metavar="NUMBERS", help=weights)
    density = f"share of entries that is kept (0.2; breadcrumbs: 0.9); for {_takers('density')}"
    parser.add_argument("--density", type=number, metavar="SHARE", help=density)
    gamma = "share of the largest entries that is dropped (0.01); for breadcrumbs"
    parser.add_argument("--gamma", type=number, metavar="SHARE", help=gamma)
    scale = f"of what is added to the base (1); for {_takers('scale')}"
    parser.add_argument("--scale", type=number, metavar="NUMBER", help=scale)
    alpha = "0: the base or first model; 1: the model or second; between: between (0.5); for wise-ft, slerp"
    parser.add_argument("--alpha", type=number, metavar="NUMBER", help=alpha)
    parser.add_argument("--seed", type=natural, metavar="N", help="of what is dropped at random (0); for dare")
    parser.add_argument("--leave-out", metavar="GLOB", help="arrays to leave out, such as counters that differ")
    parser.add_argument("--format", choices=FORMATS, help="default: what the ending of OUT says, else orbax")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli._outputs import spare

    method = METHODS[arguments.method]
    options = _options(arguments, method)
    paths = {f"model {number}": os.path.expanduser(path) for number, path in enumerate(arguments.checkpoints)}
    paths = ({"base": os.path.expanduser(arguments.base)} if method.base else {}) | paths
    output = os.path.expanduser(arguments.output)
    spare(output, "--output", paths)
    sources = {name: tj.io.open(path) for name, path in paths.items()}
    merge = _merged(arguments.method, sources, options)
    given = {name: source.fingerprint() for name, source in sources.items()}
    facts = {"method": arguments.method, "options": options, "sources": given}
    plan = _plan(merge, arguments.leave_out)
    written = tj.io.transplant(
        merge, plan, output, format=arguments.format, metadata={"merge": facts}, overwrite=arguments.overwrite
    )
    show(_report(facts, paths, written), arguments.json)
    return 0


def _options(arguments: argparse.Namespace, method: Method) -> dict[str, Any]:
    """The options of a method, those that are given and the defaults of the others; what it does not take raises."""
    import transferjax as tj

    name, given = arguments.method, {name: getattr(arguments, name) for name in OPTIONS}
    strange = [option for option, value in given.items() if value is not None and option not in method.options]
    strange += ["base"] if arguments.base is not None and not method.base else []
    if strange:
        takes = ", ".join(f"--{option}" for option in [*["base"] * method.base, *method.options])
        raise tj.DataError(f"{name} takes no --{strange[0]}: it takes {takes}. Leave --{strange[0]} out.")
    if method.base and arguments.base is None:
        raise tj.DataError(f"{name} needs the weights that the models were tuned from. Add --base.")
    count = len(arguments.checkpoints)
    if count < method.least or count > (method.most or count):
        expected = f"{method.most}" if method.most else f"{method.least} or more"
        raise tj.DataError(f"{name} merges {expected} of CHECKPOINT{', and --base' * method.base}; there are {count}.")
    return {option: default if given[option] is None else given[option] for option, default in method.options.items()}


def _merged(name: str, sources: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The merge, of which nothing is computed yet."""
    import jax

    import transferjax as tj

    base, models = sources.get("base"), [source for name, source in sources.items() if name != "base"]
    function = getattr(tj.merging, METHODS[name].function)
    if name == "wise-ft":
        return tj.merging.leafwise(function, base, models[0], options["alpha"])
    if name == "slerp":
        return tj.merging.leafwise(function, *models, options["alpha"])
    if name == "dare":
        key = jax.random.key(options["seed"])
        factors = options["weights"], options["density"], key
        return tj.merging.leafwise(function, base, models, *factors, scale=options["scale"])
    return tj.merging.leafwise(function, *([] if base is None else [base]), models, **options)


def _plan(merge: Any, leave_out: str | None) -> Any:
    """Every leaf of a merge to its own name, but for what is left out."""
    import transferjax as tj

    if leave_out is None:
        return tj.surgery.plan(merge.shapes, dict(merge.shapes))
    selected = tj.mask(dict(merge.shapes), leave_out)
    kept = {path: spec for path, spec in merge.shapes.items() if not selected[path]}
    return tj.surgery.plan(merge.shapes, kept, tj.surgery.waive(leave_out))


def _report(facts: Mapping[str, Any], paths: Mapping[str, str], written: Any) -> Any:
    """One row per fact: how it was merged, what it was made of, and what was written."""
    import transferjax as tj

    listed = lambda value: ", ".join(f"{one:g}" for one in value) if isinstance(value, list) else value
    rows = [("method", facts["method"])]
    rows += [(name, listed(value)) for name, value in facts["options"].items() if value is not None]
    for name, path in paths.items():
        rows += [(name, path), (f"fingerprint of {name}", facts["sources"][name])]
    rows += [(name, written.metadata[name]) for name in ("leaves", "parameters", "bytes", "fingerprint")]
    found = {"path": written.metadata["path"], "format": written.metadata["format"]}
    title = f"Merged {len(paths) - ('base' in paths)} checkpoints by {facts['method']}"
    return tj.Report(title, ("fact", "value"), tuple(rows), {**found, "sources": written.metadata["source"]})


def _takers(option: str) -> str:
    """The methods that take an option."""
    takes = {name: [*["base"] * method.base, *method.options] for name, method in METHODS.items()}
    return ", ".join(name for name, options in takes.items() if option in options)
