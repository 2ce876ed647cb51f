"""align: the surgery rules of a foreign checkpoint, proposed from its names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from transferjax._errors import PlanError
from transferjax._report import Report
from transferjax.surgery import _align_refuse as refuse
from transferjax.surgery._align_blocks import Pool, pools
from transferjax.surgery._align_layout import LAYOUTS
from transferjax.surgery._align_match import STAGES, Pair, head_links, links
from transferjax.surgery._align_probe import AGREES, Probe, disagreeing
from transferjax.surgery._align_rules import Layout, Told, layout_of, rules_of
from transferjax.surgery._align_solve import MOST, Solution, solve
from transferjax.surgery._align_task import Task
from transferjax.surgery._align_task import task as task_of
from transferjax.surgery._build import plan
from transferjax.surgery._rules import Rule

Rules = tuple[Rule, ...]


def align(
    source_shapes: Any,
    target: Any,
    *,
    rules: Sequence[Rule] = (),
    layout: str | None = None,
    source: Callable[[Any], Any] | None = None,
    probe: Any = None,
    read: Callable[[str], Any] | Mapping[str, Any] | None = None,
) -> tuple[Rules, Report]:
    r"""Proposes the rules that carry a foreign checkpoint into a target; with them :func:`plan` is total.

    Numbered blocks are paired first, in their order, by their numbers of elements. Then modules (what holds a
    weight, a bias, statistics) are paired: shapes must fit in every block; among those that fit, the words of names
    decide, then their numbers, then order (of numbers, of the file unless it is sorted, and the usual one: expand,
    depthwise, project), then neighbours in the file. What none of these decides is refused, not guessed. A weight
    called qkv is cut into query, key and value; numbered blocks are stacked for a target whose layers are scanned,
    and unstacked the other way round.

    One layout of kernels holds for the whole file: ``"torch"`` (out, in, ...) or ``"same"``, axes as in the target.
    The kernels that fit in one of them only decide; square ones follow. A transposed convolution whose input and
    output have as many channels cannot be told from a convolution by shapes and is turned like one: torch keeps it as
    (in, out, h, w), so give its ``rename`` and ``permute`` yourself. Of last layers that the two sides do not
    share (another number of classes), the target's is ``fresh``, and the file's is renamed to it, so that
    ``Plan.inverse`` writes a new head under the name of the old one; one without a partner is waived.
    The result is a proposal: read it, edit it and commit it as the rules of your model.

    Args:
      source_shapes: ``{name: leaf}`` as ``Checkpoint.shapes``, or any tree or Model; leaves need shape and dtype.
      target: the tree or ``Model`` to fill, concrete or abstract; of a Model, params and extra.
      rules: what is known already: rules over names, ``waive``, ``fresh``, ``tie``, and for leaves that those name
        also ``adapt``, ``permute``, ``reshape`` and ``cast``. They come back in front of the others.
      layout: ``"torch"`` or ``"same"``, if it is known.
      source: the original network, ``probe -> outputs``, in inference mode. With it, the proposal is tried: the
        target must give the same outputs. Choices that are left, and if need be those that only names or order
        made, are settled by them. Needs ``probe``, ``read`` and a Model.
      probe: a batch of inputs for both networks.
      read: ``name -> array`` of the checkpoint, as ``Checkpoint.read``, or a mapping.

    Returns:
      ``(rules, report)``: ordinary rules for :func:`plan`, and one row per rule: how many leaves it is for, what
      speaks for it, and a confidence: 1 where nothing else fits and names share a word, .5 where only the shape
      speaks, else how far the next best pairing lies behind (0: a tie).

    Raises:
      PlanError: several pairings or layouts fit alike (they are listed); leaves fit nowhere; no candidate, or more
        than one, gives the outputs of ``source``; or a given rule is none, or changes leaves that align is to pair.

    >>> import numpy as np
    >>> file = {"body.0.lin.weight": np.zeros((3, 2)), "body.1.lin.weight": np.zeros((2, 3))}
    >>> mine = {"layers": [{"dense": {"kernel": np.zeros((2, 3))}}, {"dense": {"kernel": np.zeros((3, 2))}}]}
    >>> rules, report = align(file, mine)
    >>> rules[0]
    rename(r'body\.(\d+)\.lin\.weight', r'layers/\1/dense/kernel')
    >>> report.metadata["layout"]
    '(out, in) as in torch: 2 kernels fit in no other layout'
    >>> plan(file, mine, *rules)
    Plan(2 sources -> 2 targets: 0 copied, 2 transformed, 0 fresh, 0 waived)
    """
    if layout is not None and layout not in LAYOUTS:
        raise PlanError(f"layout {layout!r} is unknown. Expected one of {', '.join(map(repr, LAYOUTS))}, or None.")
    probing = None if source is None else Probe(source, probe, read, target)
    task, found, notes, solutions = _solved(task_of(source_shapes, target, rules), layout)
    made = _proposals(task, solutions)
    facts: dict[str, Any] = {}
    if probing is not None:
        error = lambda one: probing.error(plan(source_shapes, target, *one.rules))
        best, facts["outputs"] = _agreeing(task, found, layout, error)
        if best is None:
            raise refuse.ambiguous(solutions, notes, task)
    elif len(made) == 1:
        best = made[0]
    else:
        raise refuse.ambiguous(solutions, notes, task)
    plan(source_shapes, target, *best.rules)
    titles = [f"{pool.title} ({len(pool.target)})" for pool in found if pool.title]
    return best.rules, _report(task, best, titles, facts)


def _solved(task: Task, layout: str | None) -> tuple[Task, list[Pool], list[str], list[Solution]]:
    """The task, unrolled if only so all leaves have partners, its pools, what is open in them, and the solutions."""
    tried: list[tuple[Solution, list[str]]] = []
    for one in (task, *task.unrolled()):
        found, notes = pools(one.source, one.target)
        solutions = solve(found, {name: one.order[name] for name in one.source}, layout, len(STAGES))
        if not solutions[0].lacking:
            return one, found, notes, solutions
        tried.append((solutions[0], notes))
    solution, notes = tried[0]
    raise refuse.lacking(solution, notes, task)


def _agreeing(
    task: Task, found: Sequence[Pool], layout: str | None, error: Callable[[_Proposal], float]
) -> tuple[_Proposal | None, str]:
    """The candidate that gives the outputs of the source, names trusted less from try to try; ``None``: too many."""
    order = {name: task.order[name] for name in task.source}
    errors: dict[Rules, float] = {}
    first = solutions = solve(found, order, layout, len(STAGES))
    for trust in (len(STAGES), 1, 0):
        solutions = solve(found, order, layout, trust)
        made = [] if solutions[0].lacking else _proposals(task, solutions)
        if not made and not first[0].choices:
            made = _distinct(_proposal(task, one, pairs) for one in solutions for pairs in one.varied(first[0]))
        new = {one.rules: error(one) for one in made if one.rules not in errors}
        errors |= new
        agreeing = [one for one in made if new.get(one.rules, np.inf) <= AGREES]
        if len(agreeing) > 1:
            break
        if agreeing:
            relative = f"relative error {new[agreeing[0].rules]:.1e}"
            return agreeing[0], f"1 of {len(errors)} candidates gives those of source, {relative}"
    if not errors:
        return None, ""
    raise disagreeing([*errors.values()])


class _Proposal(NamedTuple):
    """Rules to be, as they are told, and the layout that they assume."""

    rules: Rules
    told: tuple[Told, ...]
    layout: Layout


def _proposals(task: Task, solutions: Sequence[Solution]) -> list[_Proposal]:
    """The distinct candidates; none when there are more than can be tried."""
    if sum(one.count() for one in solutions) > MOST:
        return []
    return _distinct(_proposal(task, one, pairs) for one in solutions for pairs in one.candidates())


def _distinct(made: Iterable[_Proposal]) -> list[_Proposal]:
    out: dict[Rules, _Proposal] = {}
    for one in made:
        out.setdefault(one.rules, one)
    return list(out.values())


def _proposal(task: Task, solution: Solution, pairs: Iterable[Pair]) -> _Proposal:
    name = solution.layout
    found = [link for pair in pairs for link in links(pair, name)]
    given = task.links(name)
    layout = layout_of([*found, *given], name)
    heads = [link for pair in solution.heads for link in head_links(pair, name) if task.scan.part(link) is None]
    named = {link.source.name for link in heads}  # a leaf that leads to a fresh one is left behind with it
    waived = {**task.buffers, **{one: why for one, why in solution.waived.items() if one not in named}}
    told = rules_of(
        found, given, task.sources, task.targets, waived, solution.kept, layout, task.scan, task.kept, heads
    )
    return _Proposal((*task.rules, *(one.rule for one in told)), tuple(told), layout)


def _report(task: Task, best: _Proposal, blocks: Sequence[str], found: Mapping[str, Any]) -> Report:
    rows = [(repr(rule), None, "given", 1.0) for rule in task.rules]
    rows += [(repr(one.rule), one.leaves, one.evidence, one.confidence) for one in best.told]
    facts: dict[str, Any] = {"layout": str(best.layout)}
    if blocks:
        facts["blocks"] = ", ".join(blocks)
    facts |= found
    title = f"Align: {len(task.sources):,} source leaves, {len(task.targets):,} target leaves"
    return Report(title, ("rule", "leaves", "evidence", "confidence"), tuple(rows), facts)
