"""Runs in stages: gradual unfreezing, linear probing and then fine-tuning, or any list of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from transferjax._errors import DataError, SelectionError, TransferError, describe, is_whole
from transferjax._types import Batch, Model, Params, Tuning
from transferjax.finetune._fit import Pair, fit
from transferjax.finetune._match import check_batches, check_call
from transferjax.finetune._migrate import migrate
from transferjax.finetune._state import FinetuneState
from transferjax.finetune._step import Step
from transferjax.tree import Selector, as_selector
from transferjax.tuning import chain, train


def unfreeze(order: Sequence[Selector | str], per_stage: int = 1) -> list[Tuning]:
    """Gradual unfreezing: the top of the network learns first, and each stage adds what lies below.

    Stage ``k`` has the groups ``stage_1`` to ``stage_k``; each holds what began to learn in the stage of its name, so
    that ``transferjax.finetune.each_group`` gives it an optimizer state as old as itself.

    Args:
      order: one selector per module from input to output: ``transferjax.models.stages(name)``, or
        ``transferjax.stages(model, inputs)``. What no selector matches stays frozen.
      per_stage: how many modules each stage adds; the last one adds what is left.

    Returns:
      One ``Tuning`` per stage.

    Raises:
      SelectionError: ``order`` is no list of selectors, or ``per_stage`` is below 1.

    Source: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (ULMFiT), 2018.

    >>> import jax
    >>> stages = unfreeze(["stem", "block", "head"], per_stage=2)
    >>> stages[0].init(jax.random.key(0), {"block": 1.0, "head": 2.0, "stem": 3.0})
    ({'stage_1': {'block': 1.0, 'head': 2.0, 'stem': Hole}}, {'block': Hole, 'head': Hole, 'stem': 3.0})
    >>> sorted(stages[1].init(jax.random.key(0), {"block": 1.0, "head": 2.0, "stem": 3.0})[0])
    ['stage_1', 'stage_2']
    """
    if isinstance(order, (Model, Mapping, str)) or not isinstance(order, Sequence) or not order:
        raise SelectionError(
            f"unfreeze() expects order as a list of selectors, one per module from input to output; got "
            f"{describe(order)}{' without entries' if isinstance(order, Sequence) and not order else ''}. "
            "Write tj.models.stages(name), or tj.stages(model, inputs)."
        )
    if not is_whole(per_stage):
        raise SelectionError(f"unfreeze() expects a whole number of at least 1 as per_stage, got {per_stage!r}.")
    downwards = [as_selector(selector) for selector in reversed(order)]
    groups: dict[str, Tuning] = {}
    tunings = []
    for first in range(0, len(downwards), per_stage):
        selector = downwards[first]
        for other in downwards[first + 1 : first + per_stage]:
            selector = selector | other
        groups[f"stage_{len(groups) + 1}"] = train(selector)
        tunings.append(chain(**groups))
    return tunings


def lp_ft(head: Selector | str) -> list[Tuning]:
    """Linear probing, then fine-tuning (LP-FT): the head alone, then every leaf.

    A head that has learnt does not pull the features out of shape when they begin to learn.

    Args:
      head: the leaves of the first stage.

    Returns:
      Two tunings, with the group ``head``, and ``head`` and ``body``.

    Source: Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", 2022.

    >>> import jax
    >>> _, both = lp_ft("head")
    >>> both.init(jax.random.key(0), {"head": 1.0, "stem": 2.0})[0]
    {'head': {'head': 1.0, 'stem': Hole}, 'body': {'head': Hole, 'stem': 2.0}}
    """
    selector = as_selector(head)
    return [chain(head=train(selector)), chain(head=train(selector), body=train(~selector))]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of a run: a step, and when it ends.

    Attributes:
      step: from ``make_step``; it holds objective, tuning and optimizer.
      steps: how many steps at most; ``None``: as long as there are batches.
      wrap: ``(pairs, frozen) -> pairs``, put around the loop of this stage, which ends where they end: by plateau,
        ``lambda pairs, frozen: tj.early_stopping(pairs, "loss", patience=5, highest=False)``.
    """

    step: Step
    steps: int | None = None
    wrap: Callable[[Iterator[Pair], Params], Iterable[Pair]] | None = None


class Progress(NamedTuple):
    """What :func:`run_stages` yields after each step.

    Attributes:
      at: ``(stage, steps done in it)``; what resuming needs beside the state.
      state: the state, donated at the next turn.
      frozen: the frozen weights of this stage.
      metrics: as the step returned them.
    """

    at: tuple[int, int]
    state: FinetuneState
    frozen: Params
    metrics: dict[str, Any]


def run_stages(
    stages: Sequence[Stage],
    state: FinetuneState,
    frozen: Params,
    batches: Iterable[Batch],
    *,
    at: tuple[int, int] = (0, 0),
) -> Iterator[Progress]:
    """Runs several stages over one stream of batches; :func:`migrate` takes the state from each to the next.

    A state saved in the middle of a stage is an ordinary ``FinetuneState`` of that stage. To resume, make state and
    frozen tree of that stage with ``transferjax.init``, restore the state, and pass the ``at`` that was saved with it.
    The rest of the run then has the same bits; only what ``wrap`` remembers begins anew. Where an earlier stage ended
    leaves or adapters, the frozen tree holds what they learnt, and is saved too.

    Args:
      stages: what is run, one after the other.
      state: of the first stage (or of stage ``at[0]``); donated.
      frozen: the frozen weights that belong to it; read only.
      batches: any iterable of batches; no stage begins it anew.
      at: ``(stage, steps done in it)``, from where to go on.

    Yields:
      A :class:`Progress` after each step. What it holds is donated at the next turn: keep it with ``transferjax.copy``.

    Raises:
      TransferError: there is no stage, an entry is no ``Stage``, a stage but the last has no end, or ``at`` lies
        outside.
      DataError: the batches ended before the last stage did.
      NonFiniteError: as from ``fit``.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda p, extra, x, *, key=None, train=False: (x * p["stem"] * p["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(()), "stem": jnp.ones(())}, {})
    >>> tx, objective = tj.finetune.each_group(optax.adam(0.1)), tj.objectives.mean_squared_error(apply)
    >>> steps = [tj.make_step(objective, tuning, tx) for tuning in lp_ft("head")]
    >>> state, frozen = tj.init(jax.random.key(0), model, steps[0].tuning, tx)
    >>> batches = [{"inputs": jnp.ones(4), "labels": jnp.zeros(4)}] * 3
    >>> for at, state, frozen, metrics in run_stages([Stage(steps[0], 2), Stage(steps[1], 1)], state, frozen, batches):
    ...     print(at, sorted(state.trainable))
    (0, 1) ['head']
    (0, 2) ['head']
    (1, 1) ['body', 'head']
    """
    _check_stages(stages, at)
    check_batches(batches, "run_stages")
    stream, first = iter(batches), at[0]
    for number in range(first, len(stages)):
        stage = stages[number]
        if number > first:
            state, frozen = migrate(state, frozen, stages[number - 1].step.tuning, stage.step.tuning, stage.step.tx)
        done = at[1] if number == first else 0
        if stage.steps is not None and done >= stage.steps:
            continue
        feed = _Feed(stream, None if stage.steps is None else stage.steps - done)
        if not feed.ready():
            raise _ended(stages, number, done)
        pairs = fit(stage.step, state, frozen, feed)
        for state, metrics in pairs if stage.wrap is None else stage.wrap(pairs, frozen):
            done += 1
            yield Progress((number, done), state, frozen, metrics)
        feed.left = 0
        next(pairs, None)  # reads the flag of the last step, where wrap ended the stage
        if feed.dry and (stage.steps is not None or number + 1 < len(stages)):
            raise _ended(stages, number, done)


class _Feed:
    """The next batches of a stream, at most ``left`` of them."""

    def __init__(self, stream: Iterator[Batch], left: int | None):
        self.stream, self.left, self.dry = stream, left, False
        self.waiting: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.left == 0 or not self.ready():
            raise StopIteration
        self.left = None if self.left is None else self.left - 1
        return self.waiting.pop()

    def ready(self) -> bool:
        """Whether there is another batch."""
        if not self.waiting:
            try:
                self.waiting.append(next(self.stream))
            except StopIteration:
                self.dry = True
        return bool(self.waiting)


def _ended(stages: Sequence[Stage], number: int, done: int) -> DataError:
    steps = stages[number].steps
    wanted = "at least one" if steps is None and number + 1 == len(stages) else steps or "as many as its wrap asks for"
    return DataError(
        f"the batches ended in stage {number + 1} of {len(stages)}, after {done} of its steps; expected {wanted}. "
        "Give more epochs, or end the stages sooner."
    )


def _check_stages(stages: Any, at: Any) -> None:
    if not isinstance(stages, Sequence) or not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise TransferError(
            f"expected a list of stages, got {describe(stages)}. Write [Stage(tj.make_step(...), steps=100), ...]."
        )
    for number, stage in enumerate(stages):
        if not isinstance(stage.step, Step) or not (stage.steps is None or is_whole(stage.steps)):
            raise TransferError(
                f"stage {number + 1} has a step {describe(stage.step)} and steps {stage.steps!r}. Expected what "
                "tj.make_step returns, and a whole number of at least 1 or None."
            )
        if stage.steps is None and stage.wrap is None and number + 1 < len(stages):
            raise TransferError(
                f"stage {number + 1} of {len(stages)} never ends. Give it steps, or a wrap that ends its loop."
            )
    two = isinstance(at, tuple) and len(at) == 2 and all(is_whole(value, 0) for value in at)
    if not two or at[0] >= len(stages):
        raise TransferError(
            f"at is {at!r}; expected (stage, steps done in it), with a stage between 0 and {len(stages) - 1}."
        )


def compile_ahead(stages: Sequence[Stage], state: FinetuneState, frozen: Params, batch: Batch) -> list[Any]:
    """Compiles the step of every stage before the first one runs.

    Each stage's shapes come from tracing :func:`migrate`; no array is made and nothing is run. The steps keep what was
    compiled, so that :func:`run_stages` compiles none of them again.

    Args:
      stages: as for :func:`run_stages`.
      state: of the first stage; only its shapes and its device are used, it is not donated.
      frozen: its frozen weights; only their shapes and their device are used.
      batch: a batch, or its shapes.

    Returns:
      The compiled program of each stage, for ``transferjax.program.measure``.

    Raises:
      TransferError: as from :func:`run_stages`; or the state lies on several devices.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda p, extra, x, *, key=None, train=False: (x * p["stem"] * p["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(()), "stem": jnp.ones(())}, {})
    >>> tx, objective = tj.finetune.each_group(optax.adam(0.1)), tj.objectives.mean_squared_error(apply)
    >>> stages = [Stage(tj.make_step(objective, tuning, tx), 2) for tuning in lp_ft("head")]
    >>> state, frozen = tj.init(jax.random.key(0), model, stages[0].step.tuning, tx)
    >>> len(compile_ahead(stages, state, frozen, {"inputs": jnp.ones(4), "labels": jnp.zeros(4)}))
    2
    """
    _check_stages(stages, (0, 0))
    check_call(state, frozen, {})
    devices = {leaf.sharding for leaf in jax.tree.leaves((state, frozen)) if _bound(leaf)}
    if len(devices) > 1 or any(sharding.num_devices > 1 for sharding in devices):
        raise TransferError(
            "compile_ahead() expects state and frozen weights on one device; these lie on several. Leave it out: each "
            "stage is then compiled when it begins."
        )
    place = next(iter(devices), None)
    spec = lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jax.dtypes.result_type(leaf), sharding=place)
    programs = []
    for number, stage in enumerate(stages):
        step = stage.step
        if number:
            go = lambda state, frozen, old=stages[number - 1].step, new=step: migrate(
                state, frozen, old.tuning, new.tuning, new.tx
            )
            state, frozen = jax.eval_shape(go, state, frozen)
        state, frozen = jax.tree.map(spec, (state, frozen))
        proceed = jax.ShapeDtypeStruct((), bool, sharding=place)
        programs.append(step.jitted.lower(step.objective, state, frozen, batch, proceed).compile())
    return programs


def _bound(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed
