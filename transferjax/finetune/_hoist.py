"""Compute once per example what fine-tuning cannot change: the loss in two parts, and a step on the second."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transferjax._context import current_step, tracing_step
from transferjax._errors import DataError, TransferError, describe, listing
from transferjax._report import Report
from transferjax._types import Batch, Extra, Hole, Loss, Objective, Params
from transferjax.finetune._match import check_call, check_state
from transferjax.finetune._state import FinetuneState
from transferjax.finetune._step import Step, loss_of, take, training_mode, weights_of
from transferjax.program import cost, inline
from transferjax.program._cut import Part, Split, Stored
from transferjax.program._hoist import BATCH, CHANGING, EXTRA, FROZEN, KEY, OBJECTIVE, STEP, TRAINABLE, Input, split
from transferjax.tree import flatten

_DTYPES = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Hoisted:
    """A loss in two parts, of which the first runs once per example.

    Attributes:
      prefix: ``(frozen, extra, objective, batch) -> residual``, a dict of arrays ``[B, ...]``; compiled.
      suffix: ``(trainable, frozen, extra, objective, residual, key) -> Loss``, to be traced and differentiated. It
        reads no frozen leaf that only the prefix needs.
      cut: the residual's entries as shapes and types, for the batch that was given.
      reasons: why the cut is where it is, in plain sentences; the first says if nothing is hoisted.
      step: ``(state, frozen, residual) -> (state, metrics)``, for batches of residuals what ``make_step``'s is for
        batches; ``fit`` takes it.
    """

    prefix: Prefix
    suffix: Suffix
    cut: Mapping[str, jax.ShapeDtypeStruct]
    reasons: tuple[str, ...]
    step: HoistedStep

    def __repr__(self) -> str:
        return f"Hoisted({self.bytes_per_example:,} bytes per example: {', '.join(self.cut)})"

    @property
    def bytes_per_example(self) -> int:
        """Of the residual."""
        return sum(one.size * one.dtype.itemsize for one in self.cut.values()) // self.prefix.loss.count

    def keep(self, frozen: Params) -> Params:
        """The frozen tree with only the leaves that the suffix reads; the others become Holes."""
        found = self.suffix.loss.at(self.suffix.loss.count, True)
        needed = {found.inputs[n].path for n in found.split.suffix.reads if found.inputs[n].role == FROZEN}
        flat, treedef = flatten(frozen)
        return jax.tree.unflatten(treedef, [leaf if path in needed else Hole() for path, leaf in flat])

    def reads(self, state: FinetuneState, frozen: Params) -> Mapping[str, Any]:
        """Every array besides the batch that the prefix reads, by role and path; a Hole where it reads none."""
        at = self.prefix.loss.at(self.prefix.loss.count, True)
        trees = {FROZEN: frozen, EXTRA: state.extra, OBJECTIVE: self.step.objective}
        tables = {role: _leaves(role, tree) for role, tree in trees.items()}
        read = [at.inputs[number] for number in at.split.prefix.reads]
        return {f"{role}/{path}": tables[role][path] for role, path in read if role in tables} or {"nothing": Hole()}

    def report(self) -> Report:
        """What is kept, and the FLOPs of both parts beside those of the step as it was."""
        loss = self.prefix.loss
        step, state = self.step.step, loss.state
        flops = lambda program: cost(program, platform=loss.platform).flops
        traced = lambda one, batch: one.jitted.trace(step.objective, state, loss.frozen, batch, True)
        rows = [
            ("bytes per example", self.bytes_per_example),
            ("FLOPs of the prefix, once per batch", flops(self.prefix_jaxpr())),
            ("FLOPs of a hoisted step", flops(traced(self.step, dict(self.cut)))),
            ("FLOPs of the step as it was", flops(traced(step, loss.batch))),
        ]
        facts = {"cut": ", ".join(f"{name} {describe(one)}" for name, one in self.cut.items())}
        return Report("Hoisting", ("quantity", "value"), tuple(rows), {**facts, "reasons": " ".join(self.reasons)})

    def prefix_jaxpr(self) -> Any:
        """The program of the prefix, for the batch that was given; what a cache can be told apart by."""
        loss = self.prefix.loss
        return jax.make_jaxpr(self.prefix.run)(loss.frozen, loss.state.extra, loss.objective, loss.batch)


def hoist(
    step: Step, state: FinetuneState, frozen: Params, batch: Batch, *, residual_dtype: Any = "float32"
) -> Hoisted:
    """Splits the loss of a step at the minimum cut in bytes, into what training cannot change and the rest.

    Early is what depends on frozen weights, unchanged ``extra`` and each example alone: on nothing that learns, no
    random key, no other example. Matrix products, convolutions, reductions, loops and calls with derivatives of their
    own that may be early are early; cheap work on what is stored is done again where that makes the cut smaller. What
    depends on frozen weights alone (a cast, a merged kernel) is computed in each part that needs it.

    Loss and gradients are those of the step; for a batch of equal size with the same bits, as far as the compiler
    rounds alike in both programs. ``jax.lax.platform_dependent`` is taken as the branch of the default backend.

    Args:
      step: from ``make_step``.
      state: a ``FinetuneState``; only its shapes are used.
      frozen: the frozen tree; only its shapes are used.
      batch: a batch of at least 2 examples ``[B, ...]``; only its shapes are used. Other batch sizes may follow.
      residual_dtype: ``"float32"`` keeps residuals as they are; ``"bfloat16"``, or ``"int8"`` with one float32 scale
        per row (their last axis), rounds floating-point ones. Entries of the batch itself are never rounded.

    Returns:
      A :class:`Hoisted`. Where nothing can be hoisted, its cut is the inputs and ``reasons`` say why.

    Raises:
      TransferError: ``step`` is no ``Step``, or ``residual_dtype`` none of the three; (when a part is called) a leaf
        is missing or of another shape than here.
      DataError: the batch is no dict; (when a part is called) an entry is missing or of another shape, or the cut is
        another at that batch size.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda p, extra, x, *, key=None, train=False: (jnp.tanh(x @ p["stem"]) @ p["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones((3, 2)), "stem": jnp.ones((8, 3))}, {})
    >>> tuning, tx = tj.train("head"), optax.sgd(0.1)
    >>> step = tj.make_step(tj.objectives.cross_entropy(apply), tuning, tx)
    >>> state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    >>> batch = {"inputs": jnp.ones((4, 8)), "labels": jnp.zeros(4, int)}
    >>> hoisted = hoist(step, state, frozen, batch)
    >>> {name: one.shape for name, one in hoisted.cut.items()}, hoisted.bytes_per_example
    ({'labels': (4,), 'hoisted_0': (4, 3)}, 16)
    >>> residual = hoisted.prefix(frozen, state.extra, step.objective, batch)
    >>> state, metrics = hoisted.step(state, hoisted.keep(frozen), residual)
    """
    if not isinstance(step, Step):
        raise TransferError(f"hoist() expects a Step first, got {describe(step)}: write tj.make_step(...).")
    if residual_dtype not in _DTYPES:
        raise TransferError(f"hoist() expects residual_dtype to be one of {listing(_DTYPES)}, got {residual_dtype!r}.")
    check_call(state, frozen, batch)
    state, frozen, batch, objective = jax.tree.map(_abstract, (state, frozen, dict(batch), step.objective))
    train = training_mode(step.tuning, state.trainable, frozen) if step.train is None else step.train
    sizes = Counter(leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.shape)
    count = sizes.most_common(1)[0][0] if sizes else 1
    loss = _Split(step, state, frozen, batch, objective, count, train, jax.default_backend(), residual_dtype)
    found = loss.at(count, True)
    suffix = Suffix(loss)
    entries = {name: kind for one in found.split.stored for name, kind in loss.entries(one, count).items()}
    held = ", ".join(f"{name} {describe(kind)}" for name, kind in entries.items()) or "nothing"
    per_example = sum(kind.size * kind.dtype.itemsize for kind in entries.values()) // count
    reasons = (*found.split.reasons, f"the residual holds {per_example:,} bytes per example: {held}.")
    return Hoisted(Prefix(loss), suffix, entries, reasons, HoistedStep(step, suffix))


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    weak = isinstance(leaf, (bool, int, float, complex)) or bool(getattr(leaf, "weak_type", False))
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jax.dtypes.result_type(leaf), weak_type=weak)


class _At(NamedTuple):
    """The loss for one batch size."""

    split: Split
    inputs: tuple[Input, ...]
    outputs: Any  # the treedef of the Loss


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Split:
    """The loss of a step as a program, split for each batch size that comes."""

    step: Step
    state: Any
    frozen: Any
    batch: Any
    objective: Any
    count: int
    train: Any
    platform: str
    dtype: str
    known: dict[tuple[int, bool], _At] = dataclasses.field(default_factory=dict)

    def at(self, count: int, stepped: bool) -> _At:
        """The split for ``count`` examples, in a step whose number is known or outside of one."""
        if (count, stepped) not in self.known:
            self.known[count, stepped] = found = self._made(count, stepped)
            self._check(found, self.known[self.count, True] if self.known.keys() >= {(self.count, True)} else found)
        return self.known[count, stepped]

    def _made(self, count: int, stepped: bool) -> _At:
        grow = lambda x: x.update(shape=(count, *x.shape[1:])) if x.shape and x.shape[0] == self.count else x
        s, batch = self.state, jax.tree.map(grow, self.batch)
        number = jax.ShapeDtypeStruct(jnp.shape(s.step), s.step.dtype)
        trees = (s.trainable, self.frozen, s.extra, self.objective, batch, s.key, number)

        def run(trainable, frozen, extra, objective, batch, key, number):
            with tracing_step(number) if stepped else contextlib.nullcontext():
                result = loss_of(self.step.tuning, objective, trainable, frozen, extra, batch, key, self.train)
            if result.weight is None and "weight" not in batch:
                return result
            return result._replace(weight=weights_of(result, batch))

        jaxpr, outputs = jax.make_jaxpr(run, return_shape=True)(*trees)
        program = inline(jaxpr, platform=self.platform)
        inputs = [Input(role, path) for role, tree in zip(_ROLES, trees, strict=True) for path in _leaves(role, tree)]
        inputs = _unchanged_extra(program.jaxpr, inputs, outputs)
        alone = "a batch of one example does not show where the examples are: hoist with at least 2."
        found = split(
            program,
            inputs,
            count,
            size=lambda one: sum(kind.size * kind.dtype.itemsize for kind in self.entries(one, count).values()),
            platform=self.platform,
            forbid=alone if self.count == 1 else None,
        )
        return _At(found, tuple(inputs), jax.tree.structure(outputs))

    def _check(self, found: _At, first: _At) -> None:
        form = lambda at: [
            (name, kind.shape[1:], kind.dtype)
            for one in at.split.stored
            for name, kind in self.entries(one, at.split.count).items()
        ]
        if form(found) != form(first):
            raise DataError(
                f"for a batch of {found.split.count} examples the cut is another than for the {self.count} that "
                f"hoist() was given: {listing([name for name, *_ in form(found)])}. Call hoist() with such a batch."
            )

    def rounds(self, one: Stored) -> bool:
        """Whether a value is stored in another type than its own."""
        own = one.name.startswith("hoisted_") and jnp.issubdtype(one.dtype, jnp.floating)
        narrow = self.dtype == "float32" or one.dtype.itemsize <= 2
        return own and not narrow and (self.dtype == "bfloat16" or len(one.shape(1)) > 1)

    def entries(self, one: Stored, count: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The residual's entries for one value."""
        shape = one.shape(count)
        if not self.rounds(one):
            return {one.name: jax.ShapeDtypeStruct(shape, one.dtype)}
        if self.dtype == "bfloat16":
            return {one.name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
        scale = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
        return {one.name: jax.ShapeDtypeStruct(shape, jnp.int8), f"{one.name}_scale": scale}

    def encode(self, one: Stored, value: Any) -> dict[str, Any]:
        if not self.rounds(one):
            return {one.name: value}
        if self.dtype == "bfloat16":
            return {one.name: value.astype(jnp.bfloat16)}
        scale = jnp.max(jnp.abs(value), axis=-1).astype(jnp.float32) / 127.0
        whole = jnp.round(value / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8)
        return {one.name: whole, f"{one.name}_scale": scale}

    def decode(self, one: Stored, residual: Mapping[str, Any]) -> Any:
        value = residual[one.name]
        if self.rounds(one) and self.dtype == "int8":
            value = value.astype(jnp.float32) * residual[f"{one.name}_scale"][..., None]
        return value.astype(one.dtype)


_ROLES = (TRAINABLE, FROZEN, EXTRA, OBJECTIVE, BATCH, KEY, STEP)


def _leaves(role: str, tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name; an objective's, which nobody named, by number."""
    if role == OBJECTIVE:
        return {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(tree))}
    return dict(flatten(tree)[0])


def _unchanged_extra(jaxpr: Any, inputs: list[Input], outputs: Loss) -> list[Input]:
    """The inputs, with those leaves of ``extra`` that do not come back as they went in marked as changing."""
    numbered = jax.tree.unflatten(jax.tree.structure(outputs), jaxpr.outvars)
    back = dict(flatten(numbered.extra)[0])
    changes = lambda one, var: one.role == EXTRA and back.get(one.path) is not var
    return [
        one._replace(role=CHANGING) if changes(one, var) else one for one, var in zip(inputs, jaxpr.invars, strict=True)
    ]


def _arguments(at: _At, part: Part, name: str, trees: Mapping[str, Any]) -> dict[int, Any]:
    """The leaves that a part reads, by the number of the input, each of the expected shape and type."""
    tables = {role: _leaves(role, tree) for role, tree in trees.items()}
    found = {}
    for number in part.reads:
        role, path = at.inputs[number]
        role = EXTRA if role == CHANGING else role
        expected = at.split.program.jaxpr.invars[number].aval
        leaf = tables[role].get(path)
        error = DataError if role == BATCH else TransferError
        if leaf is None:
            raise error(
                f"the {name} reads '{path}' of {role}, which is not there. Expected {describe(expected)}, as "
                "hoist() was given it."
            )
        if jnp.shape(leaf) != expected.shape or jax.dtypes.result_type(leaf) != expected.dtype:
            raise error(
                f"the {name} expects '{path}' of {role} to be {describe(expected)}, got {describe(leaf)}. Call hoist() "
                "again for other shapes."
            )
        found[number] = leaf
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """``(frozen, extra, objective, batch) -> residual``: the first part of a hoisted loss."""

    loss: _Split = dataclasses.field(repr=False)
    jitted: Any = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "jitted", jax.jit(self.run))

    def __call__(self, frozen: Params, extra: Extra, objective: Objective, batch: Batch) -> dict[str, Any]:
        return self.jitted(frozen, extra, objective, dict(batch))

    def run(self, frozen: Params, extra: Extra, objective: Objective, batch: Batch) -> dict[str, Any]:
        """The same, to be traced."""
        sizes = {path: jnp.shape(leaf) for path, leaf in flatten(self.loss.batch)[0]}
        counts = [
            jnp.shape(leaf)[0]
            for path, leaf in flatten(batch)[0]
            if jnp.ndim(leaf) and sizes.get(path, ())[:1] == (self.loss.count,)
        ]
        at = self.loss.at(counts[0] if counts else self.loss.count, True)
        trees = {FROZEN: frozen, EXTRA: extra, OBJECTIVE: objective, BATCH: batch}
        values = at.split.early(_arguments(at, at.split.prefix, "prefix", trees))
        return {k: v for one in at.split.stored for k, v in self.loss.encode(one, values[one.name]).items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Suffix:
    """``(trainable, frozen, extra, objective, residual, key) -> Loss``: the second part of a hoisted loss."""

    loss: _Split = dataclasses.field(repr=False)

    def __call__(
        self, trainable: Any, frozen: Params, extra: Extra, objective: Objective, residual: Batch, key: Any
    ) -> Loss:
        number = current_step()
        stored = self.loss.at(self.loss.count, True).split.stored
        counted = [one.name for one in stored if one.layout is not None and one.name in residual]
        at = self.loss.at(jnp.shape(residual[counted[0]])[0] if counted else self.loss.count, number is not None)
        trees = {TRAINABLE: trainable, FROZEN: frozen, EXTRA: extra, OBJECTIVE: objective, KEY: key, STEP: number}
        arguments = _arguments(at, at.split.suffix, "suffix", trees)
        for one in at.split.stored:
            for name, kind in self.loss.entries(one, at.split.count).items():
                if name not in residual or describe(residual[name]) != describe(kind):
                    got = describe(residual[name]) if name in residual else "nothing"
                    raise DataError(
                        f"the suffix expects '{name}' of the residual to be {describe(kind)}, got {got}: pass what "
                        "the prefix of the same hoist() returned."
                    )
        stored = {one.name: self.loss.decode(one, residual) for one in at.split.stored}
        return jax.tree.unflatten(at.outputs, at.split.late(arguments, stored))


@dataclasses.dataclass(frozen=True)
class HoistedStep:
    """A step on residuals: ``step(state, frozen, residual) -> (state, metrics)``, as a ``Step`` is on batches.

    Attributes:
      step: the step that was hoisted.
      suffix: what is minimised.
      jitted: the program itself: ``jitted(objective, state, frozen, residual, proceed) -> (state, metrics)``.
    """

    step: Step
    suffix: Suffix
    jitted: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "jitted", jax.jit(self._run, donate_argnums=1))

    def __call__(self, state: FinetuneState, frozen: Params, residual: Batch) -> tuple[FinetuneState, dict[str, Any]]:
        check_call(state, frozen, residual)
        return self.jitted(self.step.objective, state, frozen, residual, True)

    @property
    def objective(self) -> Objective:
        return self.step.objective

    @property
    def tx(self) -> optax.GradientTransformation:
        return self.step.tx

    def _run(self, objective, state, frozen, residual, proceed):
        check_state(self.step.tuning, self.tx, state, self.suffix.loss.frozen)
        loss = lambda trainable, extra, part, key: self.suffix(trainable, frozen, extra, objective, part, key)
        return take(self.tx, self.step.accumulate, loss, state, residual, proceed)
