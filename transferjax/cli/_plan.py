"""``transferjax plan``: where every weight of a model would come from."""

from __future__ import annotations

import argparse
import os
from typing import Any

from transferjax.cli._arguments import count, verb
from transferjax.cli._console import note, show


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "plan",
        run,
        "where every weight of a model would come from",
        "Matches a weight file with a model and prints one line per weight: copied, transposed, fresh, or left out.\n"
        "Only names and shapes are read. If anything is unaccounted for, it says so and fails.\n\n"
        "A model of the zoo brings its rules. For others write them into a file, or let --align propose them and\n"
        "--save-rules write them down, to be read, edited and kept.",
        "  transferjax plan efficientnet-lite0.pth efficientnet_lite0 --num-classes 10\n"
        "  transferjax plan theirs.safetensors mine:make --align --save-rules rules.py\n"
        "  transferjax plan theirs.safetensors mine:make --rules rules.py --output plan.json",
    )
    parser.add_argument("source", metavar="SRC", help="a weight file, or 'auto': the installed package of the model")
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="a model of the zoo, module:function that returns a Model, or a checkpoint with the wanted names",
    )
    parser.add_argument("--num-classes", type=count, metavar="N", help="outputs of the model; default: the file's")
    parser.add_argument("--convention", metavar="NAME", help="whose names the file has, of those that the model knows")
    parser.add_argument("--rules", metavar="FILE", help="rules to use, JSON or Python that defines RULES")
    parser.add_argument("--align", action="store_true", help="propose the rules that --rules does not give")
    parser.add_argument("--layout", choices=("torch", "same"), help="of the file's kernels, where --align asks for it")
    parser.add_argument("--save-rules", metavar="FILE", help="write all rules that were used, as .json or .py")
    parser.add_argument("--output", metavar="FILE", help="write the plan as JSON, for `transferjax transplant`")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of --output and --save-rules")
    parser.add_argument("--bind", action="store_true", help="bind the plan to this very source, by its fingerprint")


def run(arguments: argparse.Namespace) -> int:
    import transferjax as tj
    from transferjax.cli._outputs import write_rules, write_text
    from transferjax.cli._sources import shapes_of, target_of

    _check(arguments)
    target, name = target_of(arguments.target, arguments.num_classes)
    source = tj.io.open(_path(arguments.source, name))
    rules = _rules(arguments, name)
    if arguments.align:
        rules, report = tj.surgery.align(source.shapes, shapes_of(target), rules=rules, layout=arguments.layout)
        note(str(report))
    plan = tj.surgery.plan(source.shapes, shapes_of(target), *rules)
    if arguments.bind:
        plan = plan.with_source(source.fingerprint())
    if arguments.save_rules:
        write_rules(arguments.save_rules, rules)
    if arguments.output:
        write_text(arguments.output, plan.to_json())
    if arguments.json:
        print(plan.to_json())
    else:
        show(plan.report(), False)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises before the work, which may be long, if what it makes cannot be written or an option goes unused."""
    import transferjax as tj
    from transferjax.cli._outputs import check_file, check_rules

    if arguments.layout and not arguments.align:
        raise tj.PlanError("--layout is for --align. Add that, or write torch_layout(...) into --rules.")
    module = arguments.target.partition(":")[0].replace(".", "/") + ".py"  # of module:function
    given = {"SRC": arguments.source, "TARGET": arguments.target, "--rules": arguments.rules}
    given |= {"TARGET's module": module} if ":" in arguments.target else {}
    if arguments.save_rules:
        check_rules(arguments.save_rules)
        check_file(arguments.save_rules, "--save-rules", given, arguments.overwrite)
    if arguments.output:
        check_file(arguments.output, "--output", given, arguments.overwrite)
    if arguments.output and os.path.realpath(arguments.output) == os.path.realpath(arguments.save_rules or ""):
        raise tj.PlanError("--output and --save-rules name the same file. Choose another path for one of them.")


def _path(source: str, name: str | None) -> Any:
    import transferjax as tj

    if source != "auto":
        return source
    if name is None:
        raise tj.PlanError("'auto' is the installed package of a model of the zoo. Write the path of a weight file.")
    return tj.models.installed_weights(name)


def _rules(arguments: argparse.Namespace, name: str | None) -> tuple[Any, ...]:
    """Those of the file, else those of the model; none where they are to be proposed."""
    import transferjax as tj
    from transferjax.cli._sources import rules_of

    if arguments.convention and (name is None or arguments.rules or arguments.align):
        raise tj.PlanError("--convention chooses among the rules of a model of the zoo. Leave it out here.")
    if arguments.rules:
        return rules_of(arguments.rules)
    if name is None or arguments.align:
        return ()
    return tj.models.rules(name, arguments.convention, num_classes=arguments.num_classes)
