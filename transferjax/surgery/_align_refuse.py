"""What align says when it does not decide: the candidates, and what to write."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transferjax._errors import PlanError, listing
from transferjax.surgery._align_blocks import Module, families
from transferjax.surgery._align_layout import Leaf
from transferjax.surgery._align_match import Choice, Pair, links
from transferjax.surgery._align_patterns import cover
from transferjax.surgery._align_rules import layout_of, naming
from transferjax.surgery._align_solve import MOST, Solution
from transferjax.surgery._align_task import Task
from transferjax.surgery._ops import Spec
from transferjax.surgery._problems import LIMIT, Finder
from transferjax.surgery._rules import fresh, rename, waive

_NUMBER = re.compile(r"\d+")


def lacking(solution: Solution, notes: Sequence[str], task: Task) -> PlanError:
    """The error that lists the modules of either side that fit nowhere."""
    lines = [f"- {note}." for note in notes]
    left, missing = (
        {leaf.name: leaf.spec for m in side for leaf in m.all()} for side in (solution.left, solution.missing)
    )
    open_ = tuple(template for template in families(task.source) if any(f"blocks '{template}' and" in n for n in notes))
    rest = [m for m in solution.left if not _NUMBER.sub("#", m.all()[0].name).startswith(open_ or ("\n",))]
    for noun, modules, other in (("target", solution.missing, left), ("source", rest, missing)):
        near = Finder(other)
        lines += [f"- {noun} {_lone(module, near, task, noun)}" for module in modules[:LIMIT]]
        if len(modules) > LIMIT:
            lines.append(f"- {len(modules) - LIMIT} more modules of the {noun}.")
    return PlanError(
        f"align() found no partner for {len(solution.missing)} modules of the target and {len(solution.left)} of the "
        "source: none has the same kinds of leaves in shapes that fit.\n"
        + "\n".join(lines)
        + "\nPass what you know as align(..., rules=(...)), or write the rules by hand."
    )


def _lone(module: Module, near: Finder, task: Task, noun: str) -> str:
    leaves = module.all()
    told = listing([f"'{leaf.name}' {leaf.spec}" for leaf in leaves], 4)
    make, side = (fresh, task.targets) if noun == "target" else (waive, task.sources)
    write = [", ".join(repr(make(one)) for one in cover([leaf.name for leaf in leaves], side))]
    first = leaves[0]
    found = near.nearest(first.name, first.spec, 1) if near.pool else []
    if found:
        came, to = (found[0], first.name) if noun == "target" else (first.name, found[0])
        if _resized(first.spec, near.pool[found[0]]):
            write.insert(0, f"{f'{_exact(came, to)} with ' if came != to else ''}adapt('{to}', ...)")
        elif sorted(first.spec.shape) == sorted(near.pool[found[0]].shape):
            write.insert(0, _exact(came, to))
    nearest = f" Nearest: '{found[0]}' {near.pool[found[0]]}." if found else ""
    return f"{told}.{nearest} Write {' or '.join(write)}."


def _resized(a: Spec, b: Spec) -> bool:
    """Whether two leaves differ in the size of one axis."""
    return len(a.shape) == len(b.shape) and sum(n != m for n, m in zip(a.shape, b.shape, strict=True)) == 1


def ambiguous(solutions: Sequence[Solution], notes: Sequence[str], task: Task) -> PlanError:
    """The error that lists what is left to choose from."""
    best = solutions[0]
    lines = [f"- {note}." for note in notes]
    lines += [line for choice in best.choices for line in _told(choice, best.layout, task)]
    if len(solutions) > 1:
        lines += _layouts(solutions)
    total = sum(one.count() for one in solutions)
    count = f"more than {MOST}" if total > MOST else f"{total}"
    return PlanError(
        f"align() cannot tell {count} candidate plans apart by names, shapes and order:\n"
        + "\n".join(lines)
        + "\nPass what you know as align(..., rules=(...)), or pass source, probe and read, so that the outputs decide."
    )


def _told(choice: Choice, layout: str, task: Task) -> list[str]:
    either = [f"'{leaf.name}' {leaf.spec}" for leaf in map(_first, choice.sources)]
    more = f" or {len(either) - LIMIT} more" if len(either) > LIMIT else ""
    pairs = choice.ways[0] if choice.ways else [Pair(s, (t,), "", 0.0) for s, t in zip(choice.sources, choice.targets)]
    out = []
    for pair in pairs[:LIMIT]:
        to = _first(pair.targets[0])
        rules = ", ".join(repr(one.rule) for one in naming(links(pair, layout), task.sources, task.scan))
        out.append(
            f"- target '{to.name}' {to.spec}: {' or '.join(either[:LIMIT])}{more}. "
            f"If it is '{_first(pair.source).name}', write {rules}."
        )
    return out


def _layouts(solutions: Sequence[Solution]) -> list[str]:
    best = solutions[0]
    found = [link for pair in next(best.candidates(), best.pairs) for link in links(pair, best.layout)]
    layout = layout_of(found, best.layout)
    if layout.forced or not layout.square:
        return [
            f"- layouts {' and '.join(repr(one.layout) for one in solutions)} lead to other pairs. Write layout=..."
        ]
    square = [link for link in found if len(link.source.spec.shape) > 1 and not link.cut]
    named = listing([f"'{link.source.name}' {link.source.spec} -> '{link.targets[0].name}'" for link in square], 3)
    return [
        f"- layout: all {layout.square} kernels are square ({named}), so that no shape says whether they are to be "
        "transposed. Write layout='torch' (transposed) or layout='same' (kept)."
    ]


def _first(module: Module) -> Leaf:
    return max(module.all(), key=lambda leaf: len(leaf.spec.shape))


def _exact(name: str, path: str) -> str:
    """The rename rule of one pair, as it is written."""
    return repr(rename(re.escape(name), path.replace("\\", "\\\\")))
