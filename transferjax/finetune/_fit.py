"""The loop over batches, and what can be wrapped around it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, NonFiniteError, TransferError, listing, nearest_hint
from transferjax._types import Batch, Cache, Params
from transferjax.finetune._match import check_batches, check_call
from transferjax.finetune._state import FinetuneState
from transferjax.finetune._step import Step
from transferjax.tree import copy

Pair = tuple[FinetuneState, dict[str, Any]]


def fit(
    step: Step, state: FinetuneState, frozen: Params, batches: Iterable[Batch], *, cache: Cache | None = None
) -> Iterator[Pair]:
    """Runs a step over batches and yields what each returns; the caller owns logging and saving.

    What is yielded is donated at the next turn: keep a state with ``transferjax.copy``. Metrics are arrays still being
    computed; reading one waits for it.

    A step whose loss or gradient is not finite changes nothing. Its flag is read one step later, so that the device
    never waits, and the step in between is held back too. So when it raises, the batches are up to two ahead of the
    state; and a loop that is left early has not read the flag of its last step (``metrics["finite"]``).

    With a cache, what training cannot change of the loss (``transferjax.hoist``) is computed once per example id; the
    loss and its gradients stay the same. So a batch must hold the same arrays for the same id in every epoch:
    augmentation belongs inside the model, where it draws from the key and is not hoisted, or, with the ``copies`` of
    ``transferjax.hoist``, is kept in several versions.

    Args:
      step: from ``make_step``.
      state: from ``init``, or restored; donated.
      frozen: the frozen weights; read only.
      batches: any iterable of batches; every pass over them is the caller's choice.
      cache: a ``transferjax.io.FeatureCache`` made by ``transferjax.io.residual_cache``; batches then need ``id``.

    Yields:
      ``(state, metrics)`` after each step.

    Raises:
      NonFiniteError: with the state from before the offending batch, the step number and the batch's ids.
      DataError: there was no batch, or a batch is no dict.
      TransferError: the state was donated before; or there is a cache, and nothing can be computed once.
      CheckpointError: the cache belongs to other weights or another program.

    >>> import jax, jax.numpy as jnp, optax, transferjax as tj
    >>> apply = lambda params, extra, inputs, *, key=None, train=False: (inputs * params["head"], extra)
    >>> model, tuning, tx = tj.Model(apply, None, {"head": jnp.ones(())}, {}), tj.full(), optax.sgd(0.25)
    >>> step = tj.make_step(tj.objectives.mean_squared_error(apply), tuning, tx)
    >>> state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    >>> batch = {"inputs": jnp.ones(4), "labels": jnp.zeros(4)}
    >>> [float(metrics["loss"]) for state, metrics in fit(step, state, frozen, [batch, batch])]
    [1.0, 0.25]
    """
    check_batches(batches, "fit")
    proceed, previous = None, None
    if cache is not None:
        from transferjax.finetune._residuals import cached

        step, frozen, batches = cached(step, state, frozen, batches, cache)
    for batch in batches:
        check_call(state, frozen, batch)
        if proceed is None:
            # True, on the device that later flags come from: a plain True would have the second step compiled anew.
            proceed = jnp.asarray(state.step) >= 0
        state, metrics = step.jitted(step.objective, state, frozen, batch, proceed)
        proceed = metrics["finite"]
        if previous is not None:
            _check(previous, state)
        previous = (proceed, metrics["loss"], batch)
        yield state, metrics
    if previous is None:
        raise DataError("fit() got no batch. Expected at least one: check the data set and the number of epochs.")
    _check(previous, state)


def _check(pending: tuple[Any, Any, Batch], state: FinetuneState) -> None:
    finite, loss, batch = pending
    if bool(finite):
        return
    number, ids = int(state.step), batch.get("id")
    ids = None if ids is None else np.asarray(ids)
    named = "the batch has no ids" if ids is None else f"ids {listing([str(i) for i in ids.reshape(-1)], 8)}"
    cause = "a gradient" if math.isfinite(float(loss)) else "the loss"
    raise NonFiniteError(
        f"step {number}: {cause} is not finite (loss {float(loss)}); {named}. The state from before this batch is in "
        "the error's .state. Expected finite values: look for labels outside the classes, inputs that are not finite, "
        "or a learning rate that is too high.",
        state=state,
        step=number,
        ids=ids,
    )


def validate(
    pairs: Iterable[Pair],
    evaluate: Callable[..., dict[str, float]],
    frozen: Params,
    batches: Callable[[], Iterable[Batch]] | Iterable[Batch],
    *,
    every: int,
) -> Iterator[Pair]:
    """Evaluates every so many steps: adds ``validation/<name>`` to the metrics of those steps.

    Args:
      pairs: from :func:`fit`, or another wrapper.
      evaluate: from ``make_eval``.
      frozen: the frozen weights.
      batches: the validation batches: a list, or a function that gives a new pass each time.
      every: in steps.

    Yields:
      The pairs.

    Raises:
      TransferError: ``every`` is below 1.

    >>> pairs = [("state", {}), ("state", {})]
    >>> evaluate = lambda state, frozen, batches: {"accuracy": 0.5}
    >>> [metrics for _, metrics in validate(pairs, evaluate, {}, [], every=2)]
    [{}, {'validation/accuracy': 0.5}]
    """
    if every < 1:
        raise TransferError(f"validate() expects every of at least 1 step, got {every}.")
    for number, (state, metrics) in enumerate(pairs, 1):
        if number % every == 0:
            found = evaluate(state, frozen, batches() if callable(batches) else batches)
            metrics = {**metrics, **{f"validation/{name}": value for name, value in found.items()}}
        yield state, metrics


@dataclasses.dataclass
class Best:
    """Remembers the state with the best value of a metric; wrap it around ``fit`` or ``validate``.

    Attributes:
      metric: a name among the metrics; steps without it are passed on.
      highest: whether larger is better; ``None``: for an accuracy yes, for a loss or an error no, by its name.
      value: the best value so far, or ``None``.
      state: a copy of the state that reached it, or ``None``.

    >>> best = Best("validation/accuracy")
    >>> pairs = [(1, {"validation/accuracy": 0.5}), (2, {"validation/accuracy": 0.4})]
    >>> _ = list(best(pairs))
    >>> best.state, best.value
    (1, 0.5)
    """

    metric: str
    highest: bool | None = None
    value: float | None = None
    state: Any = None

    def __post_init__(self) -> None:
        self.highest = is_highest(self.metric, self.highest, "Best")

    def __call__(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        seen: set[str] = set()
        for state, metrics in pairs:
            seen.update(metrics)
            if self.metric in metrics and self.improves(float(metrics[self.metric])):
                self.value, self.state = float(metrics[self.metric]), copy(state)
            yield state, metrics
        _require(self.metric, seen)

    def improves(self, value: float) -> bool:
        """Whether a value is better than the best so far; NaN never is."""
        if math.isnan(value):
            return False
        return self.value is None or (value > self.value if self.highest else value < self.value)


def is_highest(metric: str, highest: bool | None, name: str) -> bool:
    """Whether more of a metric is better, by its name where nobody says so.

    Raises:
      TransferError: the name does not tell.

    >>> is_highest("validation/accuracy", None, "sweep"), is_highest("loss", None, "sweep")
    (True, False)
    """
    if highest is not None:
        return highest
    last = metric.rsplit("/", 1)[-1]
    if "loss" in last or "error" in last:
        return False
    if "accuracy" in last:
        return True
    raise TransferError(
        f"{name}() cannot tell from its name whether more of '{metric}' is better. Write highest=True or highest=False."
    )


def early_stopping(pairs: Iterable[Pair], metric: str, *, patience: int, highest: bool | None = None) -> Iterator[Pair]:
    """Ends the run when a metric has not improved for ``patience`` of its readings.

    Args:
      pairs: from :func:`fit`, or another wrapper.
      metric: a name among the metrics; steps without it do not count.
      patience: how many readings without improvement are allowed.
      highest: as for :class:`Best`.

    Yields:
      The pairs, up to the one that exhausts the patience.

    Raises:
      TransferError: ``patience`` is below 1, no step had the metric, or its name does not say which way is better.

    >>> pairs = [(step, {"loss": value}) for step, value in enumerate([3.0, 2.0, 2.5, 2.6, 1.0])]
    >>> [state for state, _ in early_stopping(pairs, "loss", patience=2)]
    [0, 1, 2, 3]
    """
    if patience < 1:
        raise TransferError(f"early_stopping() expects a patience of at least 1 reading, got {patience}.")
    best, waited = Best(metric, highest), 0
    seen: set[str] = set()
    for state, metrics in pairs:
        yield state, metrics
        seen.update(metrics)
        if metric not in metrics:
            continue
        value = float(metrics[metric])
        waited = 0 if best.improves(value) else waited + 1
        best.value = value if waited == 0 else best.value
        if waited >= patience:
            return
    _require(metric, seen)


def _require(metric: str, seen: set[str]) -> None:
    if metric not in seen:
        raise TransferError(f"no step had the metric '{metric}'.{nearest_hint(metric, sorted(seen))}")
