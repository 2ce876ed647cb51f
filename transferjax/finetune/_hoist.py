"""Compute once per example what fine-tuning cannot change: the loss in two parts, and a step on the second."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transferjax._context import current_step
from transferjax._errors import DataError, TransferError, describe, is_whole, listing
from transferjax._report import Report
from transferjax._types import Batch, Extra, Hole, Loss, Objective, Params
from transferjax.finetune._match import check_call, check_state
from transferjax.finetune._split_loss import At, SplitLoss, arguments_of, leaves_of
from transferjax.finetune._state import FinetuneState
from transferjax.finetune._step import Step, take, training_mode
from transferjax.program import cost
from transferjax.program._hoist import BATCH, EXTRA, FROZEN, KEY, OBJECTIVE, STEP, TRAINABLE
from transferjax.tree import flatten

_DTYPES = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Hoisted:
    """A loss in two parts, of which the first runs once per example.

    Attributes:
      prefix: ``(frozen, extra, objective, batch) -> residual``, a dict of arrays ``[B, ...]``; compiled. With copies
        ``(frozen, extra, objective, batch, state.key, epoch) -> residual``.
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

    @property
    def copies(self) -> int:
        """How many residuals each example has: one, unless its first part draws randomness."""
        loss = self.prefix.loss
        return loss.copies if self.prefix.draws(loss.at(loss.count, True)) else 1

    @property
    def saves(self) -> bool:
        """Whether anything is computed in the first part: whether the cut is more than the inputs."""
        return any(name.startswith("hoisted_") for name in self.cut)

    @property
    def options(self) -> dict[str, Any]:
        """What ``hoist`` was given beside the step and its arguments."""
        return {"residual_dtype": self.prefix.loss.dtype, "copies": self.prefix.loss.copies or None}

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
        tables = {role: leaves_of(role, tree) for role, tree in trees.items()}
        read = [at.inputs[number] for number in at.split.prefix.reads]
        found = {f"{role}/{path}": tables[role][path] for role, path in read if role in tables}
        if self.prefix.draws(at):
            found[KEY] = jax.random.key_data(state.key)
        return found or {"nothing": Hole()}

    def report(self) -> Report:
        """What is kept, and the FLOPs of both parts beside those of the step as it was."""
        loss = self.prefix.loss
        step, state = self.step.step, loss.state
        flops = lambda program: cost(program, platform=loss.platform).flops
        traced = lambda one, batch: one.jitted.trace(step.objective, state, loss.frozen, batch, True)
        rows = [
            ("bytes per example", self.bytes_per_example),
            ("FLOPs of the prefix, once for these examples", flops(self.prefix_jaxpr())),
            ("FLOPs of a hoisted step", flops(traced(self.step, dict(self.cut)))),
            ("FLOPs of the step as it was", flops(traced(step, loss.batch))),
        ]
        facts = {"cut": ", ".join(f"{name} {describe(one)}" for name, one in self.cut.items())}
        return Report("Hoisting", ("quantity", "value"), tuple(rows), {**facts, "reasons": " ".join(self.reasons)})

    def prefix_jaxpr(self) -> Any:
        """The program of the prefix, for the batch that was given; what a cache can be told apart by."""
        loss = self.prefix.loss
        drawing = (loss.state.key, 0) if self.prefix.draws(loss.at(loss.count, True)) else ()
        return jax.make_jaxpr(self.prefix.run)(loss.frozen, loss.state.extra, loss.objective, loss.batch, *drawing)


def hoist(
    step: Step,
    state: FinetuneState,
    frozen: Params,
    batch: Batch,
    *,
    residual_dtype: Any = "float32",
    copies: int | None = None,
) -> Hoisted:
    """Splits the loss of a step at the minimum cut in bytes, into what training cannot change and the rest.

    Early is what depends on frozen weights, unchanged ``extra`` and each example alone: on nothing that learns, no
    random key, no other example. Matrix products, convolutions, reductions, loops and calls with derivatives of their
    own that may be early are early; cheap work on what is stored is done again where that makes the cut smaller. What
    depends on frozen weights alone (a cast, a merged kernel) is computed in each part that needs it.

    Loss and gradients are those of the step; for a batch of equal size with the same bits, as far as the compiler
    rounds alike in both programs. ``jax.lax.platform_dependent`` is taken as the branch of the default backend.

    With ``copies``, augmentation and dropout before the cut are early too, and each example keeps that many residuals.
    Each example draws for itself, from the state's key, its ``id`` and the number of the copy, whatever batch it is in;
    epoch ``e`` uses copy ``e % copies``. So training sees each example in that many versions, and the random numbers
    are not those of the step; what is drawn after the cut is, as before. Where one key would serve both sides of the
    cut (an image and its mask flipped alike), nothing random is early.

    Args:
      step: from ``make_step``.
      state: a ``FinetuneState``; only its shapes are used.
      frozen: the frozen tree; only its shapes are used.
      batch: a batch of at least 2 examples ``[B, ...]``; only its shapes are used. Other batch sizes may follow.
      residual_dtype: ``"float32"`` keeps residuals as they are; ``"bfloat16"``, or ``"int8"`` with one float32 scale
        per row (their last axis), rounds floating-point ones. Entries of the batch itself are never rounded.
      copies: how many residuals of an example to keep where randomness comes before the cut; ``None``: such
        randomness moves the cut before it.

    Returns:
      A :class:`Hoisted`. Where nothing can be hoisted, its cut is the inputs and ``reasons`` say why.

    Raises:
      TransferError: ``step`` is no ``Step``, ``residual_dtype`` none of the three, or ``copies`` no whole number; (when
        a part is called) a leaf is missing or of another shape than here, or the prefix draws and has no key.
      DataError: the batch is no dict, or there are copies and no ``id``; (when a part is called) an entry is missing or
        of another shape, or the cut is another at that batch size.

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
    if copies is not None and not is_whole(copies):
        raise TransferError(f"hoist() expects copies to be a whole number of at least 1, got {copies!r}.")
    check_call(state, frozen, batch)
    if copies is not None and "id" not in batch:
        raise DataError("hoist() with copies expects batches with 'id', by which each example draws: integers [B].")
    state, frozen, batch, objective = jax.tree.map(_abstract, (state, frozen, dict(batch), step.objective))
    train = training_mode(step.tuning, state.trainable, frozen) if step.train is None else step.train
    sizes = Counter(leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.shape)
    count = sizes.most_common(1)[0][0] if sizes else 1
    loss = SplitLoss(
        step, state, frozen, batch, objective, count, train, jax.default_backend(), residual_dtype, copies or 0
    )
    found = loss.at(count, True)
    suffix = Suffix(loss)
    entries = {name: kind for one in found.split.stored for name, kind in loss.entries(one, count).items()}
    held = ", ".join(f"{name} {describe(kind)}" for name, kind in entries.items()) or "nothing"
    per_example = sum(kind.size * kind.dtype.itemsize for kind in entries.values()) // count
    reasons = (*found.split.reasons, f"the residual holds {per_example:,} bytes per example: {held}.")
    prefix = Prefix(loss)
    if copies is not None:
        kept = f"{copies} copies of each example are kept" if prefix.draws(found) else "one copy serves every epoch"
        reasons = (*reasons, f"what is early {'draws' if prefix.draws(found) else 'draws nothing'}: {kept}.")
    return Hoisted(prefix, suffix, entries, reasons, HoistedStep(step, suffix))


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    weak = isinstance(leaf, (bool, int, float, complex)) or bool(getattr(leaf, "weak_type", False))
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jax.dtypes.result_type(leaf), weak_type=weak)


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """``(frozen, extra, objective, batch, key, epoch) -> residual``: the first part of a hoisted loss.

    ``key`` and ``epoch`` (a whole number, or one per example) are for what draws; others leave them out.
    """

    loss: SplitLoss = dataclasses.field(repr=False)
    jitted: Any = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "jitted", jax.jit(self.run))

    def __call__(
        self, frozen: Params, extra: Extra, objective: Objective, batch: Batch, key: Any = None, epoch: Any = 0
    ) -> dict[str, Any]:
        return self.jitted(frozen, extra, objective, dict(batch), key, epoch)

    def draws(self, at: At) -> bool:
        """Whether this part reads the key."""
        return any(at.inputs[number].role == KEY for number in at.split.prefix.reads)

    def run(
        self, frozen: Params, extra: Extra, objective: Objective, batch: Batch, key: Any = None, epoch: Any = 0
    ) -> dict[str, Any]:
        """The same, to be traced."""
        sizes = {path: jnp.shape(leaf) for path, leaf in flatten(self.loss.batch)[0]}
        flat, treedef = flatten(batch)
        whole = [jnp.ndim(leaf) > 0 and sizes.get(path, ())[:1] == (self.loss.count,) for path, leaf in flat]
        counts = [jnp.shape(leaf)[0] for (_, leaf), examples in zip(flat, whole, strict=True) if examples]
        at = self.loss.at(counts[0] if counts else self.loss.count, True)
        trees = {FROZEN: frozen, EXTRA: extra, OBJECTIVE: objective, BATCH: batch}
        if not self.draws(at):
            return self._stored(at, trees)
        if key is None or "id" not in batch:
            lacks = DataError if key is not None else TransferError
            raise lacks(
                "what is early draws randomness. Expected a key and batches with 'id': "
                "write hoisted.prefix(frozen, extra, objective, batch, state.key, epoch)."
            )
        alone = self.loss.at(1, True)
        ids = jnp.asarray(batch["id"]).astype(jnp.uint32)

        def one(number, copy, leaves):
            own = [leaf[None] if examples else leaf for leaf, examples in zip(leaves, whole, strict=True)]
            drawn = jax.random.fold_in(jax.random.fold_in(key, number), copy)
            return self._stored(alone, {**trees, BATCH: jax.tree.unflatten(treedef, own), KEY: drawn})

        axes = [0 if examples else None for examples in whole]
        copy = jnp.broadcast_to(jnp.asarray(epoch) % self.loss.copies, ids.shape)
        found = jax.vmap(one, (0, 0, axes))(ids, copy, [leaf for _, leaf in flat])
        shared = {name for stored in at.split.stored if stored.layout is None for name in self.loss.entries(stored, 1)}
        return {name: value[0] if name in shared else value[:, 0] for name, value in found.items()}

    def _stored(self, at: At, trees: Mapping[str, Any]) -> dict[str, Any]:
        values = at.split.early(arguments_of(at, at.split.prefix, "prefix", trees))
        return {k: v for one in at.split.stored for k, v in self.loss.encode(one, values[one.name]).items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Suffix:
    """``(trainable, frozen, extra, objective, residual, key) -> Loss``: the second part of a hoisted loss."""

    loss: SplitLoss = dataclasses.field(repr=False)

    def __call__(
        self, trainable: Any, frozen: Params, extra: Extra, objective: Objective, residual: Batch, key: Any
    ) -> Loss:
        number = current_step()
        stored = self.loss.at(self.loss.count, True).split.stored
        counted = [one.name for one in stored if one.layout is not None and one.name in residual]
        at = self.loss.at(jnp.shape(residual[counted[0]])[0] if counted else self.loss.count, number is not None)
        trees = {TRAINABLE: trainable, FROZEN: frozen, EXTRA: extra, OBJECTIVE: objective, KEY: key, STEP: number}
        arguments = arguments_of(at, at.split.suffix, "suffix", trees)
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
