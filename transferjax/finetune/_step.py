"""The fine-tuning step: one jitted program that costs only what learns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transferjax._context import tracing_step
from transferjax._errors import DataError, TransferError, describe
from transferjax._types import Batch, Loss, Objective, Params, Tuning
from transferjax.finetune._finite import all_finite
from transferjax.finetune._match import check_call, check_loss, check_objective, check_state
from transferjax.finetune._state import FinetuneState, check_transform
from transferjax.tree import Selector, as_selector, flatten, training_selector


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled fine-tuning step; call it as ``step(state, frozen, batch) -> (state, metrics)``.

    ``state`` is donated: its buffers are reused for the state that comes back. ``frozen`` and ``batch`` are only read.

    Attributes:
      objective: what is minimised.
      tuning: what learns.
      tx: the optax transform.
      accumulate: into how many equal parts a batch is split.
      train: which modules run in training mode; ``None``: those of which the tuning trains a leaf.
      jitted: the program itself: ``jitted(objective, state, frozen, batch, proceed) -> (state, metrics)``.
    """

    objective: Objective
    tuning: Tuning
    tx: optax.GradientTransformation
    accumulate: int = 1
    train: bool | Selector | None = None
    jitted: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "jitted", jax.jit(self._run, donate_argnums=1))

    def __call__(self, state: FinetuneState, frozen: Params, batch: Batch) -> tuple[FinetuneState, dict[str, Any]]:
        check_call(state, frozen, batch)
        return self.jitted(self.objective, state, frozen, batch, True)

    def _run(self, objective, state, frozen, batch, proceed):
        check_state(self.tuning, self.tx, state, frozen)
        train = training_mode(self.tuning, state.trainable, frozen) if self.train is None else self.train
        loss = lambda trainable, extra, part, key: loss_of(
            self.tuning, objective, trainable, frozen, extra, part, key, train
        )
        return take(self.tx, self.accumulate, loss, state, batch, proceed)


def make_step(
    objective: Objective,
    tuning: Tuning,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    train: bool | Selector | str | None = None,
) -> Step:
    """One jitted fine-tuning step.

    Gradients, optimizer state and accumulators exist for the trainable leaves only; the state is donated, the frozen
    weights are an argument that is only read. Where the loss or a gradient is not finite, the old state is kept and
    ``metrics["finite"]`` is ``False``.

    Args:
      objective: ``(params, extra, batch, key, train) -> Loss``; its arrays enter as arguments.
      tuning: what learns.
      tx: an optax transform; clipping and other global transforms see the trainable leaves only.
      accumulate: the batch is split into that many equal parts (every ``accumulate``-th example), whose gradients are
        averaged inside the one program.
      train: which modules run in training mode: ``True``, ``False`` or a selector over module paths; ``None``: the
        modules of which the tuning trains at least one leaf.

    Returns:
      A :class:`Step`.

    Raises:
      TransferError: ``accumulate`` is below 1, or the objective, tuning or optimizer is no such thing; (when called)
        the state was donated before, or loss or metrics are no scalars, or the step would change the shapes or dtypes
        of the state.
      SelectionError: (when traced) the state was made by another tuning or optimizer.
      DataError: (when called) the batch is no dict.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params["head"], extra)
    >>> model = tj.Model(apply, None, {"head": jnp.ones(()), "stem": jnp.ones(())}, {})
    >>> tuning, tx = tj.train("head"), optax.sgd(0.25)
    >>> step = make_step(tj.objectives.mean_squared_error(apply), tuning, tx)
    >>> state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    >>> state, metrics = step(state, frozen, {"inputs": jnp.ones(4), "labels": jnp.zeros(4)})
    >>> float(state.trainable["head"]), float(metrics["loss"])
    (0.5, 1.0)
    """
    check_objective(objective)
    if not isinstance(tuning, Tuning):
        raise TransferError(f"make_step() expects a Tuning second, got {describe(tuning)}: write tj.train('head/**').")
    check_transform(tx, "make_step")
    if accumulate < 1:
        raise TransferError(f"make_step() expects accumulate of at least 1, got {accumulate}.")
    mode = train if train is None or isinstance(train, bool) else as_selector(train)
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(objective)):
        objective = jax.tree_util.Partial(objective)
    return Step(objective, tuning, tx, accumulate, mode)


def training_mode(tuning: Tuning, trainable: Any, frozen: Any) -> Selector:
    """The modules of which a tuning trains at least one of the module's own leaves.

    A leaf trains itself when ``merge`` passes it on as it is; an adapter beside a frozen kernel does not count.

    >>> import jax, transferjax as tj
    >>> tuning = tj.train("head/bn/**")
    >>> params = {"head": {"bn": {"scale": 1.0}, "fc": {"kernel": 1.0}}}
    >>> selector = training_mode(tuning, *tuning.init(jax.random.key(0), params))
    >>> selector("head/bn"), selector("head/fc")
    (True, False)
    """
    every: list[str] = []
    found: list[str] = []

    def probe(trainable, frozen):
        own = {id(leaf) for leaf in jax.tree.leaves(trainable)}
        for path, leaf in flatten(tuning.merge(trainable, frozen))[0]:
            every.append(path)
            if id(leaf) in own:
                found.append(path)
        return ()

    jax.eval_shape(probe, trainable, frozen)
    return training_selector(every, found)


def _advance(tx, state, extra, gradients, value, finite) -> FinetuneState:
    """The next state, or the old one where the step is not finite."""

    def update(state, extra, gradients, value):
        updates, opt_state = optax.with_extra_args_support(tx).update(
            gradients, state.opt_state, state.trainable, value=value
        )
        trainable = optax.apply_updates(state.trainable, updates)
        return _same_types(state, FinetuneState(state.step + 1, state.key, trainable, extra, opt_state))

    def branch(finite, state, *operands):
        return jax.lax.cond(finite, update, lambda state, *_: state, state, *operands)

    def select(finite, state, *operands):
        return jax.tree.map(lambda fresh, old: jnp.where(finite, fresh, old), update(state, *operands), state)

    # On CPU a select per leaf holds copies of the gradients (11 % more temporary memory in a small last stage) where
    # a branch holds none. On an accelerator a branch would make the host wait for the flag, a select never does.
    operands = (finite, state, extra, gradients, value)
    return jax.lax.platform_dependent(*operands, cpu=branch, default=select)


def _same_types(old: FinetuneState, new: FinetuneState) -> FinetuneState:
    """The new state, whose leaves have the shapes and dtypes of the old one's, so that it can take its place."""
    before, after = dict(flatten(old)[0]), dict(flatten(new)[0])
    for path in [*before, *after]:
        was, came = (describe(tree[path]) if path in tree else "no leaf" for tree in (before, after))
        if was != came:
            raise TransferError(
                f"a step changes '{path}' of the state from {was} to {came}. Expected equal shapes and dtypes: the "
                "model's extra and the optimizer's state must come back as they went in."
            )
    return new


def loss_of(tuning: Tuning, objective, trainable, frozen, extra, batch, key, train) -> Loss:
    """What a step minimises, as a function of all that enters it; in lifted form where the tuning has one."""

    def call(params):
        result = objective(params, extra, batch, key, train)
        check_loss(result)
        return result

    if tuning.lifted is None:
        return call(tuning.merge(trainable, frozen))
    from transferjax.program import lift

    return lift(call)(tuning.lifted(trainable, frozen))


def take(tx, accumulate: int, loss, state: FinetuneState, batch: Batch, proceed) -> tuple[FinetuneState, dict]:
    """One step on ``loss(trainable, extra, part of the batch, key) -> Loss``: the next state and the metrics."""
    key = jax.random.fold_in(state.key, state.step)
    with tracing_step(state.step):
        value, metrics, extra, gradients = _gradients(loss, accumulate, state, batch, key)
    finite = jnp.isfinite(value) & all_finite(gradients) & proceed
    kept = _advance(tx, state, extra, gradients, value, finite)
    taken = sorted({"loss", "finite"} & set(metrics))
    if taken:
        raise TransferError(f"the objective has a metric '{taken[0]}', which is the step's own. Rename it.")
    return kept, {**metrics, "loss": value, "finite": finite}


def _gradients(loss, accumulate: int, state, batch, key):
    """Loss, metrics, new extra and the gradients of the trainable leaves, averaged over the parts of the batch."""

    def weighed(trainable, extra, part, key):
        result = loss(trainable, extra, part, key)
        return result.value, (result.metrics, result.extra, weights_of(result, part))

    differentiate = jax.value_and_grad(weighed, has_aux=True)
    if accumulate == 1:
        (value, (metrics, extra, _)), gradients = differentiate(state.trainable, state.extra, batch, key)
        return value, metrics, extra, gradients

    def one(carry, inputs):
        extra, total = carry
        number, part = inputs
        (value, (metrics, extra, weights)), gradients = differentiate(
            state.trainable, extra, part, jax.random.fold_in(key, number)
        )
        total = jax.tree.map(lambda a, g: a + weights["loss"] * g.astype(a.dtype), total, gradients)
        return (extra, total), ({**metrics, "loss": value}, weights)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), state.trainable)
    inputs = (jnp.arange(accumulate), _parts(batch, accumulate))
    (extra, total), (values, weights) = jax.lax.scan(one, (state.extra, zeros), inputs)
    sums = {name: jnp.maximum(jnp.sum(each), 1e-9) for name, each in weights.items()}
    gradients = jax.tree.map(lambda g, x: (g / sums["loss"]).astype(x.dtype), total, state.trainable)
    metrics = {name: jnp.dot(weights[name], each) / sums[name] for name, each in values.items()}
    return metrics.pop("loss"), metrics, extra, gradients


def weights_of(result: Loss, part: Batch) -> dict[str, jax.Array]:
    """What the loss and each metric of one part count in the means over all parts."""
    default = jnp.sum(part["weight"]) if "weight" in part else 1.0
    given = result.weight if isinstance(result.weight, dict) else {}
    if result.weight is not None and not isinstance(result.weight, dict):
        default = result.weight
    return {name: jnp.asarray(given.get(name, default), jnp.float32) for name in ("loss", *result.metrics)}


def _parts(batch: Batch, count: int) -> Any:
    """The batch as ``count`` parts on a new leading axis: every ``count``-th example, so that shards stay in place."""

    def one(path, leaf):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] % count:
            raise DataError(
                f"batch entry '{path}' is {describe(leaf)}; expected a leading axis that {count} equal parts divide. "
                "Choose a batch size that is a multiple of accumulate."
            )
        return jnp.moveaxis(jnp.reshape(leaf, (-1, count, *jnp.shape(leaf)[1:])), 1, 0)

    flat, treedef = flatten(batch)
    return jax.tree.unflatten(treedef, [one(path, leaf) for path, leaf in flat])
