"""A network that is its own teacher: the moving average of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from transferjax._context import current_step
from transferjax._errors import DataError, TransferError, describe
from transferjax._types import Array, Loss, Model
from transferjax.objectives._beside import Look
from transferjax.objectives._distill import TEACHER, Teach, compared, distill
from transferjax.tree import Selector

STUDENT = "student"


def with_teacher(model: Model) -> Model:
    """The Model whose ``extra`` holds a second set of its weights, which follows it: for :func:`mean_teacher`.

    ``extra`` becomes ``{"student": ..., "teacher": {"params": ..., "extra": ...}}``; everything else stays. Extend a
    model before, not after. The average is of all weights, also of those that a tuning freezes.

    Args:
      model: any Model.

    Raises:
      TransferError: it is no Model.

    >>> import transferjax as tj
    >>> model = with_teacher(tj.interop.pure(lambda params, x: x * params["scale"], {"scale": jnp.ones(())}))
    >>> sorted(tj.paths(model.extra))
    ['teacher/params/scale']
    """
    if not isinstance(model, Model):
        raise TransferError(f"with_teacher() expects a Model, got {describe(model)}.")
    capture = None if model.capture is None else _Capture(model.capture)
    average = jax.tree.map(jnp.asarray, {"params": model.params, "extra": model.extra})
    return model._replace(apply=_Apply(model.apply), capture=capture, extra={STUDENT: model.extra, TEACHER: average})


def mean_teacher(
    student: Model,
    loss: Callable[..., Array],
    at: Selector | str | Mapping[str, str] | None = None,
    *,
    decay: float | Array = 0.999,
    supervised: Callable[[Any], Any] | None = None,
    weight: float | Array = 1.0,
    supervised_weight: float | Array = 1.0,
) -> Partial:
    """:func:`distill` from the moving average of the student's own weights.

    In training mode the average moves before each step: ``average = d * average + (1 - d) * params`` with
    ``d = min(decay, (1 + step) / (10 + step))``, so that it leaves the start soon.

    Args:
      student: a Model of :func:`with_teacher`.
      loss: as in :func:`distill`.
      at: as in :func:`distill`.
      decay: the weight of the past in [0, 1); a leaf.
      supervised: as in :func:`distill`.
      weight: of the loss; a leaf.
      supervised_weight: as in :func:`distill`.

    Returns:
      An ``Objective`` as that of :func:`distill`. The teacher of a trained state is ``state.extra["teacher"]``.

    Raises:
      TransferError: ``student`` has no teacher, ``decay`` is outside [0, 1), or as :func:`distill`.

    Source: Tarvainen & Valpola, Mean teachers are better role models, 2017, arXiv:1703.01780.

    >>> import transferjax as tj
    >>> student = with_teacher(tj.interop.pure(lambda params, x: x @ params["kernel"], {"kernel": jnp.eye(2)}))
    >>> objective = mean_teacher(student, tj.objectives.losses.kd)
    >>> float(objective(student.params, student.extra, {"inputs": jnp.eye(2)}, None, True).value)
    0.0
    """
    if not isinstance(student, Model) or not isinstance(student.apply, _Apply):
        raise TransferError(
            f"mean_teacher() expects a Model with its teacher, got {describe(student)}: pass "
            "tj.objectives.with_teacher(model)."
        )
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        raise TransferError(f"mean_teacher() expects a decay in [0, 1), got {decay}.")
    bare = student._replace(
        apply=student.apply.apply,
        capture=None if student.capture is None else student.capture.capture,
        extra=student.extra[STUDENT],
    )
    options: Any = {"supervised": supervised, "weight": weight, "supervised_weight": supervised_weight}
    teach = Teach(Look(bare.apply, bare.capture, compared(at)[2]))
    return Partial(_mean_teacher, distill(bare, None, loss, at, **options), Partial(teach), decay)


def _mean_teacher(objective, teach, decay, params, extra, batch, key, train) -> Loss:
    if not isinstance(extra, Mapping) or TEACHER not in extra:
        raise DataError("extra has no 'teacher'. Expected that of tj.objectives.with_teacher(model).")
    average = extra[TEACHER]
    if train is not False:
        step = current_step()
        decay = decay if step is None else jnp.minimum(decay, (1.0 + step) / (10.0 + step))
        mix = lambda old, new: (decay * old + (1.0 - decay) * jax.lax.stop_gradient(new)).astype(old.dtype)
        average = jax.tree.map(mix, average, {"params": params, "extra": extra[STUDENT]})
    said = teach(average["params"], average["extra"], batch["inputs"])
    loss = objective(params, extra[STUDENT], {**batch, TEACHER: said}, key, train)
    return loss._replace(extra={STUDENT: loss.extra, TEACHER: average})


@dataclasses.dataclass(frozen=True)
class _Apply:
    apply: Any

    def __call__(self, params, extra, inputs, *, key=None, train=False):
        outputs, new = self.apply(params, extra[STUDENT], inputs, key=key, train=train)
        return outputs, {**extra, STUDENT: new}


@dataclasses.dataclass(frozen=True)
class _Capture:
    capture: Any

    def __call__(self, params, extra, inputs, at, *, key=None, train=False):
        outputs, new, layers = self.capture(params, extra[STUDENT], inputs, at, key=key, train=train)
        return outputs, {**extra, STUDENT: new}, layers
