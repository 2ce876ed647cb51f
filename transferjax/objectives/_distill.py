"""Knowledge transfer: objectives in which a network learns from what another one makes of the same inputs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from transferjax._errors import DataError, SelectionError, TransferError, describe, is_whole, listing
from transferjax._types import Array, Model
from transferjax.objectives._beside import OUTPUTS, Look, beside, check_model
from transferjax.objectives._metrics import as_partial, mean
from transferjax.tree import Selector, as_selector, auxiliary

TEACHER = "teacher"
KERNEL, BIAS = "kernel", "bias"


def distill(
    student: Model,
    teacher: Model | Sequence[Model] | None,
    loss: Callable[..., Array],
    at: Selector | str | Mapping[str, str] | None = None,
    *,
    supervised: Callable[[Any], Any] | None = None,
    weight: float | Array = 1.0,
    supervised_weight: float | Array = 1.0,
    project: str | Mapping[str, str] | None = None,
    teacher_weights: Sequence[float] | Array | None = None,
) -> Partial:
    """A network learns from a teacher: ``supervised_weight * supervised + weight * loss(student, teacher)``.

    The teacher runs in inference mode on the inputs that the student gets, and no gradient flows to it. Its weights
    are leaves of the objective. Where it has said everything before (``tj.io.TeacherCache``), ``teacher`` is ``None``.

    The usual form ``(1 - alpha) * cross-entropy + alpha * kd`` is ``weight=alpha, supervised_weight=1 - alpha``.

    Args:
      student: a Model; what learns is the tuning's matter.
      teacher: a Model with any architecture; several, whose losses are averaged; or ``None``: the batch has what the
        teacher makes, under ``teacher``.
      loss: ``(student, teacher) -> scalar`` of ``tj.objectives.losses``, or of your own; options by
        ``functools.partial(losses.kd, temperature=4.0)``. Where it has arguments ``labels`` and ``weight``, it gets the
        batch's (``weight``: ``None`` where the batch has none; where it has, the loss must take it); and auxiliary
        weights by their names (``raw_variance`` of ``losses.vid``).
      at: what is compared: ``None``: the outputs; a module path of both networks (of several the losses are added up);
        or ``{student's path: teacher's path}``, where ``outputs`` stands for the outputs.
      supervised: as in :func:`auxiliary_loss`; ``None``: no labels are needed, and the teacher is all there is.
      weight: of the loss; a leaf.
      supervised_weight: of the supervised objective; a leaf.
      project: the name of the student's auxiliary weights that bring its features to the teacher's width
        (:func:`projector`), or ``{student's path: name}``.
      teacher_weights: how much each of several teachers counts; they sum to 1; leaves.

    Returns:
      An ``Objective`` with the metrics of the supervised one, ``distillation``, and where outputs of one width are
      compared ``agreement``: the share of examples on which both say the same.

    Raises:
      TransferError: an argument is no Model or no such function, or the weights do not fit.
      SelectionError: the student lacks the auxiliary weights, or both networks have other module paths.
      DataError: (when traced) student and teacher do not fit each other.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531; Romero et al., FitNets,
    2014, arXiv:1412.6550.

    >>> import transferjax as tj
    >>> network = lambda params, x: x @ params
    >>> student, teacher = tj.interop.pure(network, jnp.zeros((2, 2))), tj.interop.pure(network, jnp.eye(2))
    >>> kd = functools.partial(tj.objectives.losses.kd, temperature=1.0)
    >>> objective = distill(student, teacher, kd)
    >>> round(float(objective(student.params, student.extra, {"inputs": jnp.eye(2)}, None, True).value), 4)
    0.1109
    """
    pairs, at_student, at_teacher = compared(at)
    check_model("distill", student, at_student)
    if not callable(loss) or isinstance(loss, Model):
        raise TransferError(
            f"distill() expects a loss (student, teacher) third, got {describe(loss)}: pass tj.objectives.losses.kd."
        )
    teachers, shares = _teachers(teacher, at_teacher, teacher_weights)
    projects = _projects(project, pairs)
    for name in projects.values():
        auxiliary(student.params, name)
    term = Partial(Term(pairs, tuple(projects.items()), *_arguments(loss)), as_partial(loss), teachers, shares)
    return beside("distill", supervised, student, term, at_student, weight, supervised_weight)


def projector(width: int, teacher_width: int, *, variance: bool = False) -> Callable[[Array], dict[str, Array]]:
    """The weights of a linear map on the last axis (a 1 x 1 convolution), from a student's width to a teacher's.

    Args:
      width: of the student's features.
      teacher_width: of the teacher's.
      variance: with ``raw_variance`` ``[teacher_width]`` for ``losses.vid``, whose softplus is 5 at the start.

    Returns:
      ``key -> {"kernel": [width, teacher_width], "bias": [teacher_width]}``, for ``tj.extend``: the kernel is
      He-normal, the bias zero.

    Raises:
      TransferError: a width is no whole number of at least 1.

    >>> import transferjax as tj
    >>> model = tj.interop.pure(lambda params, x: x @ params["body"], {"body": jnp.eye(2)})
    >>> model = tj.extend(model, "projector", projector(2, 5), key=jax.random.key(0))
    >>> sorted(tj.paths(model.params))
    ['aux/projector/bias', 'aux/projector/kernel', 'model/body']
    """
    if not is_whole(width) or not is_whole(teacher_width):
        raise TransferError(f"projector() expects widths of at least 1, got {width!r} and {teacher_width!r}.")

    def init(key: Array) -> dict[str, Array]:
        kernel = jax.random.normal(key, (width, teacher_width)) * (2 / width) ** 0.5
        found = {KERNEL: kernel, BIAS: jnp.zeros(teacher_width)}
        return {**found, "raw_variance": jnp.full(teacher_width, 4.9932394)} if variance else found

    return init


@dataclasses.dataclass(frozen=True)
class Term:
    """What is compared, and how: ``(loss, teachers, shares, params, batch, layers) -> (value, metrics)``."""

    pairs: tuple[tuple[str, str], ...] | None
    projects: tuple[tuple[str, str], ...]
    wanted: tuple[str, ...]
    required: tuple[str, ...]
    weighted: bool

    def __call__(self, loss, teachers, shares, params, batch, layers) -> tuple[Array, dict[str, Array]]:
        said = [_said(batch)] if teachers is None else [teach(batch["inputs"]) for teach in teachers]
        if "weight" in batch and not self.weighted:
            raise DataError(
                "the batch has a 'weight' for each example, which the loss does not take. Expected a loss with an "
                "argument weight=None that its mean heeds, or batches without."
            )
        values = [self._against(loss, theirs, params, batch, layers) for theirs in said]
        parts = [share * one for share, one in zip(shares, values, strict=True)]
        value, own, theirs = sum(parts[1:], parts[0]), layers[OUTPUTS], said[0].get(OUTPUTS)
        metrics = {"distillation": value}
        if theirs is not None and _alike(own, theirs):
            same = jnp.argmax(own, axis=-1) == jnp.argmax(theirs, axis=-1)
            metrics["agreement"] = mean(jnp.mean(same.astype(jnp.float32).reshape(len(same), -1), axis=1), batch)
        return value, metrics

    def _against(self, loss, theirs, params, batch, layers) -> Array:
        pairs, projects = self.pairs, dict(self.projects)
        if pairs is None:
            own, other = set(layers) - {OUTPUTS}, set(theirs) - {OUTPUTS}
            if own != other:
                of = lambda paths: listing(sorted(paths)) if paths else "nothing"
                kept = " Of a teacher whose answers are kept: tj.io.TeacherCache(teacher, at=...)." if not other else ""
                raise SelectionError(
                    f"at selects {of(own)} of the student and {of(other)} of the teacher. Expected the same paths, or "
                    f"at={{student's path: teacher's path}}.{kept}"
                )
            pairs = tuple((path, path) for path in sorted(own))
        values = []
        for mine, yours in pairs:
            one, other = _layer(layers, mine, "student"), jax.tree.map(jax.lax.stop_gradient, _layer(theirs, yours))
            weights: Any = {}
            if mine in projects or "*" in projects:
                weights = auxiliary(params, projects.get(mine, projects.get("*", "")))
                one = _projected(one, weights, projects.get(mine, projects.get("*")), other)
            values.append(_scalar(loss(one, other, **self._by_name(batch, weights))))
        return sum(values[1:], values[0])

    def _by_name(self, batch, weights) -> dict[str, Any]:
        known = {**(weights if isinstance(weights, Mapping) else {}), "weight": batch.get("weight")}
        if "labels" in self.wanted:
            if "labels" not in batch:
                raise DataError(f"the batch has no 'labels', which the loss takes: it has {sorted(batch)}.")
            known["labels"] = batch["labels"]
        missing = [name for name in self.required if name not in known]
        if missing:
            raise DataError(
                f"the loss takes {listing(missing)}, which nothing gives. Expected labels, weight and the names of the "
                "auxiliary weights (of vid: projector(width, teacher_width, variance=True)); bind the rest with "
                "functools.partial."
            )
        return {name: known[name] for name in self.wanted if name in known}


@dataclasses.dataclass(frozen=True)
class Teach:
    """A teacher in inference mode: ``(params, extra, inputs) -> {name: array}``."""

    look: Look

    def __call__(self, params, extra, inputs) -> dict[str, Any]:
        return jax.tree.map(jax.lax.stop_gradient, self.look(params, extra, inputs)[1])


def teaching(model: Model, at: Selector | None) -> Partial:
    """A teacher as a pytree: ``inputs -> {name: array}``."""
    return Partial(Teach(Look(model.apply, model.capture, at)), model.params, model.extra)


def compared(at: Any) -> tuple[tuple[tuple[str, str], ...] | None, Selector | None, Selector | None]:
    """What is compared by name (``None``: what the selectors find), and what to capture of both networks."""
    if at is None:
        return ((OUTPUTS, OUTPUTS),), None, None
    if not isinstance(at, Mapping):
        return None, as_selector(at), as_selector(at)
    if not at or not all(isinstance(path, str) for pair in at.items() for path in pair):
        raise SelectionError(f"distill() got at={at!r:.80}; expected {{student's path: teacher's path}}.")
    union = lambda paths: functools.reduce(lambda a, b: a | b, map(as_selector, paths)) if paths else None
    own, other = ([path for path in paths if path != OUTPUTS] for paths in (at.keys(), dict.fromkeys(at.values())))
    return tuple(at.items()), union(own), union(other)


def _teachers(teacher: Any, at: Selector | None, weights: Any) -> tuple[Any, Any]:
    """Each teacher as a pytree, and how much it counts."""
    if teacher is None or isinstance(teacher, Model):
        if weights is not None:
            raise TransferError("distill() got teacher_weights for one teacher. Expected several, or weight=.")
        if teacher is not None:
            check_model("distill", teacher, at)
        return (None if teacher is None else [teaching(teacher, at)]), [1.0]
    if not isinstance(teacher, Sequence) or isinstance(teacher, str) or not teacher:
        got = describe(teacher) if teacher or not isinstance(teacher, list | tuple) else "an empty list"
        raise TransferError(f"distill() expects a teacher second, got {got}: a Model, several, or None.")
    for one in teacher:
        check_model("distill", one, at)
    shares = [1 / len(teacher)] * len(teacher) if weights is None else list(weights)
    if len(shares) != len(teacher):
        raise TransferError(f"distill() got {len(shares)} teacher_weights for {len(teacher)} teachers.")
    if all(isinstance(share, int | float) for share in shares) and abs(sum(shares) - 1) > 1e-6:
        raise TransferError(f"distill() got teacher_weights that sum to {sum(shares):g}; expected 1.")
    return [teaching(one, at) for one in teacher], shares


def _projects(project: Any, pairs: Any) -> dict[str, str]:
    """The name of the projector by the student's path; ``*``: of every path."""
    if project is None:
        return {}
    if isinstance(project, str):
        return {"*": project}
    if not isinstance(project, Mapping) or not project:
        raise TransferError(f"distill() got project={project!r:.80}; expected a name, or {{student's path: name}}.")
    known = [] if pairs is None else [own for own, _ in pairs]
    strange = sorted(set(project) - set(known))
    if pairs is not None and strange:
        raise SelectionError(f"project names {listing(strange)}, which at does not: {listing(known)}.")
    return dict(project)


def _arguments(loss: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """A loss's arguments behind the first two, by name: all that are not bound, those that must be given; and whether
    it heeds weights."""
    try:
        names = list(inspect.signature(loss).parameters.values())
    except (TypeError, ValueError):
        return (), (), False
    bound = set(getattr(loss, "keywords", {}))
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    free = [p for p in names[2:] if p.kind in kinds and p.name not in bound]
    required = tuple(p.name for p in free if p.default is inspect.Parameter.empty)
    return tuple(p.name for p in free), required, "weight" in {p.name for p in free} | bound


def _scalar(value: Any) -> Any:
    if isinstance(value, tuple | list | dict) or jnp.shape(value) != ():
        raise DataError(f"the loss returned {describe(value)}; expected a scalar, the mean over examples.")
    return value


def _said(batch: Any) -> dict[str, Any]:
    if TEACHER not in batch:
        raise DataError(
            f"the batch has no '{TEACHER}': it has {sorted(batch)}. Expected those of tj.io.TeacherCache, or a "
            "teacher: distill(student, teacher, loss)."
        )
    return batch[TEACHER]


def _layer(layers: Mapping[str, Any], path: str, whose: str = "teacher") -> Any:
    if path not in layers:
        raise SelectionError(f"the {whose} has no '{path}' to compare: it has {listing(sorted(layers))}.")
    return layers[path]


def _projected(features: Any, weights: Any, name: Any, theirs: Any) -> Array:
    kernel = weights.get(KERNEL) if isinstance(weights, Mapping) else None
    if kernel is None or jnp.ndim(kernel) != 2 or BIAS not in weights:
        raise DataError(
            f"the auxiliary weights '{name}' are no projector: expected tj.extend(model, {name!r}, "
            "tj.objectives.projector(width, teacher_width), key=key)."
        )
    if kernel.shape[0] != features.shape[-1] or kernel.shape[1] != theirs.shape[-1]:
        raise DataError(
            f"the projector '{name}' maps width {kernel.shape[0]} to {kernel.shape[1]}; the features are "
            f"{describe(features)} and the teacher's {describe(theirs)}. Expected "
            f"tj.objectives.projector({features.shape[-1]}, {theirs.shape[-1]})."
        )
    return features @ kernel.astype(features.dtype) + weights[BIAS].astype(features.dtype)


def _alike(own: Any, theirs: Any) -> bool:
    arrays = all(hasattr(one, "shape") and one.ndim > 1 for one in (own, theirs))
    return arrays and own.shape == theirs.shape
