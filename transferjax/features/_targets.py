"""What every read-out does first: labels as a float matrix, weights, standardisation, folds; and last: its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, describe, is_whole, listing
from transferjax._report import Report
from transferjax.numerics._tables import as_classes, as_features, as_weights, check_equal

CLASSES, LABELS, TARGETS = "classes", "several yes-or-no labels", "targets"


class Targets(NamedTuple):
    """Labels as a float matrix, and how the outputs for them are read.

    Attributes:
      kind: classes, several yes-or-no labels, or targets.
      matrix: float64 ``[N, K]``: one-hot rows of the classes that occur, ones and zeros, or the targets.
      codes: int64 ``[N]``, the place of each class among those that occur; ``None`` unless they are classes.
      columns: int64 ``[K]``, the column of the outputs that each column of ``matrix`` becomes.
      width: how many columns the outputs have.
      flat: the targets were ``[N]``, and so are the outputs.
    """

    kind: str
    matrix: np.ndarray
    codes: np.ndarray | None
    columns: np.ndarray
    width: int
    flat: bool

    @property
    def signs(self) -> np.ndarray:
        """Yes is 1 and no is -1, for classes and labels; targets as they are."""
        return self.matrix if self.kind == TARGETS else 2 * self.matrix - 1


class Training(NamedTuple):
    """The examples that count: those of weight zero are left out.

    Attributes:
      features: ``[N, ...]``, in their own width.
      targets: see :class:`Targets`.
      weights: float64 ``[N]``, all above zero.
    """

    features: np.ndarray
    targets: Targets
    weights: np.ndarray


def as_training(
    features: Any,
    labels: Any,
    weights: Any,
    num_classes: int | None,
    *,
    name: str,
    takes: Sequence[str] = (CLASSES, LABELS, TARGETS),
    instead: str = "",
) -> Training:
    """Features, labels and weights, checked.

    Args:
      features: numbers ``[N, d]``.
      labels: integers ``[N]`` (classes), booleans, zeros and ones ``[N, K]`` (labels), or floats ``[N]``, ``[N, K]``.
      weights: ``[N]`` or ``None``.
      num_classes: how many columns the outputs for classes have; ``None``: the largest label plus one.
      name: the read-out, for errors.
      takes: what it can read out.
      instead: what to write for the rest.

    Raises:
      DataError: one of them is no such thing, or does not fit the others.

    >>> as_training(np.eye(3), [0, 1, 1], None, None, name="ridge").targets.matrix.tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    table = as_features(features)
    return training_of(table, labels, as_weights(weights, len(table)), num_classes, name, takes, instead)


def training_of(
    table: np.ndarray,
    labels: Any,
    weights: np.ndarray,
    num_classes: int | None,
    name: str,
    takes: Sequence[str],
    instead: str,
) -> Training:
    """As :func:`as_training`, for features and weights that were checked."""
    given = np.asarray(labels)
    check_equal("labels", len(given) if given.ndim else 0, "features", len(table))
    kept = weights > 0
    if not kept.all():
        table, given, weights = table[kept], given[kept], weights[kept]
    targets = as_targets(given, num_classes)
    if targets.kind not in takes:
        raise DataError(
            f"{name}() reads out {' or '.join(takes)}; these labels are {targets.kind}. {instead} Classes are integers."
        )
    if (table == table[0]).all():
        raise DataError(
            f"features are constant: all {len(table)} examples have the same. Expected features that differ: look at "
            "the layer they come from."
        )
    return Training(table, targets, weights)


def as_targets(labels: Any, num_classes: int | None) -> Targets:
    """Labels as a float matrix; what they are follows from their type and shape.

    Raises:
      DataError: they are not finite, skip a class, or are no numbers ``[N]`` or ``[N, K]``.

    >>> as_targets(np.array([0.5, 2.0]), None).kind
    'targets'
    >>> as_targets(np.array([[True, False]]), None).kind
    'several yes-or-no labels'
    """
    given = np.asarray(labels)
    if given.ndim == 1 and given.dtype.kind in "iub":
        return _classes(given, num_classes)
    if num_classes is not None:
        raise DataError(
            f"num_classes is {num_classes} and labels are {describe(given)}; expected integers [N] with num_classes. "
            "For other labels leave it out."
        )
    if given.dtype.name == "bfloat16":
        given = given.astype(np.float32)
    if given.ndim not in (1, 2) or given.dtype.kind not in "fiub" or not given.size:
        raise DataError(
            f"labels are {describe(given)}; expected integers [N] for classes, booleans [N, K] for several labels, or "
            "floats [N] or [N, K] for targets."
        )
    matrix = given.astype(np.float64)
    if not np.isfinite(matrix).all():
        raise DataError("labels are not finite. Expected finite numbers: leave such examples out, or weigh them zero.")
    flat = matrix.ndim == 1
    kind = LABELS if not flat and bool(((matrix == 0) | (matrix == 1)).all()) else TARGETS
    matrix = matrix.reshape(len(matrix), -1)
    return Targets(kind, matrix, None, np.arange(matrix.shape[1]), matrix.shape[1], flat)


def _classes(labels: np.ndarray, num_classes: int | None) -> Targets:
    codes, values, _ = as_classes(labels, len(labels))
    if values[0] < 0:
        raise DataError(f"labels start at {values[0]}; expected classes from 0. Leave unlabelled examples out.")
    if num_classes is not None and not is_whole(num_classes, int(values[-1]) + 1):
        raise DataError(
            f"num_classes is {num_classes!r}; expected at least {values[-1] + 1}, the largest label plus one."
        )
    if num_classes is None and len(values) <= values[-1]:
        absent = _first_absent(values)
        raise DataError(
            f"labels skip class {absent}: {len(labels)} examples hold {len(values)} of the {values[-1] + 1} classes up "
            f"to the largest label. Expected an example of each, or num_classes={values[-1] + 1} to let them be absent."
        )
    matrix = np.zeros((len(codes), len(values)))
    matrix[np.arange(len(codes)), codes] = 1
    return Targets(CLASSES, matrix, codes, values, int(values[-1]) + 1 if num_classes is None else num_classes, False)


def _first_absent(values: np.ndarray) -> int:
    gaps = np.flatnonzero(values != np.arange(len(values)))
    return int(gaps[0])


def as_strengths(values: Any, name: str = "strengths") -> np.ndarray:
    """Strengths of a penalty, float64 ``[S]``, in the order given; one number is a sequence of one.

    Raises:
      DataError: there is none, or one is not finite or not positive.

    >>> as_strengths(2).tolist()
    [2.0]
    """
    found = np.atleast_1d(np.asarray(values, np.float64))
    if found.ndim != 1 or not found.size or not np.isfinite(found).all() or (found <= 0).any():
        raise DataError(
            f"{name} are {listing([str(v) for v in found.ravel()])}; expected numbers above 0, at least one."
        )
    return found


def standardisation(
    features: np.ndarray, weights: np.ndarray, standardise: bool, centre: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """``shift`` and ``scale`` ``[d]``: the features become ``(features - shift) * scale``.

    Both are rounded to float32, as prediction uses them, so that what is fitted is what is predicted. The scale of a
    column that varies by less than float32 can tell is 0: it says nothing.

    >>> standardisation(np.array([[0.0, 3], [4, 3]]), np.ones(2), True)
    (array([2., 3.]), array([0.5, 0. ]))
    """
    width = features.shape[1]
    mean = np.average(features, axis=0, weights=weights) if centre or standardise else np.zeros(width)
    scale = np.ones(width)
    if standardise:
        low, high = features.min(axis=0).astype(np.float64), features.max(axis=0).astype(np.float64)
        constant = high - low <= 2 * np.finfo(np.float32).eps * np.maximum(abs(low), abs(high))
        variance = np.average((features - mean) ** 2, axis=0, weights=weights)
        scale = np.where(constant, 0.0, 1 / np.sqrt(np.where(constant, 1.0, variance)))
    return mean.astype(np.float32).astype(np.float64), scale.astype(np.float32).astype(np.float64)


def standardised(params: Any, features: Any) -> Any:
    """Features as a read-out was fitted on them, float32, in ``jax``.

    Raises:
      DataError: they are not ``[N, d]`` (or ``[N, T, d]``) as at the fit.
    """
    features, shift = jnp.asarray(features), params["shift"]
    if features.ndim != shift.ndim + 1 or features.shape[-1] != shift.shape[-1]:
        form = f"[N, {'T, ' * (shift.ndim > 1)}{shift.shape[-1]}]"
        raise DataError(f"features are {describe(features)}; expected {form}, as wide as those of the fit.")
    return (features.astype(jnp.float32) - shift) * params["scale"]


@jax.jit
def linear(params: Any, features: Any) -> Any:
    """The outputs of every linear read-out: ``standardised @ kernel + bias``."""
    x = standardised(params, features)
    return jnp.matmul(x, params["kernel"], precision="highest") + params["bias"]


def linear_params(
    targets: Targets, shift: np.ndarray, scale: np.ndarray, kernel: np.ndarray, bias: np.ndarray
) -> dict[str, Any]:
    """The params of :func:`linear`; a class without an example has a bias of minus infinity."""
    wide, offsets = widen(targets, kernel, 0.0), widen(targets, bias, -np.inf)
    return to_float32({"shift": shift, "scale": scale, "kernel": wide, "bias": offsets})


def widen(targets: Targets, values: np.ndarray, absent: float) -> np.ndarray:
    """Columns of the classes that occur at their places in the outputs; the only column of targets ``[N]`` goes.

    >>> widen(as_targets(np.array([0, 2]), 4), np.array([5.0, 6.0]), 0.0).tolist()
    [5.0, 0.0, 6.0, 0.0]
    """
    if targets.flat:
        return values[..., 0]
    wide = np.full((*values.shape[:-1], targets.width), absent)
    wide[..., targets.columns] = values
    return wide


def by_classes(
    targets: Targets, fit: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel ``[d, K]`` and bias ``[K]`` of a method for classes; for labels, of yes against no for each.

    Args:
      targets: classes or labels.
      fit: ``(codes [N], number of classes) -> (kernel, bias)``.

    Raises:
      DataError: a label has only yes, or only no.
    """
    if targets.codes is not None:
        return fit(targets.codes, len(targets.columns))
    share = targets.matrix.mean(axis=0)
    if ((share == 0) | (share == 1)).any():
        column = int(np.flatnonzero((share == 0) | (share == 1))[0])
        raise DataError(f"label {column} is the same for all examples; expected some with yes and some with no.")
    pairs = [fit(codes.astype(np.int64), 2) for codes in targets.matrix.T]
    differences = [(kernel[:, 1] - kernel[:, 0], bias[1] - bias[0]) for kernel, bias in pairs]
    return np.stack([kernel for kernel, _ in differences], axis=1), np.array([bias for _, bias in differences])


def to_float32(params: dict[str, Any]) -> dict[str, Any]:
    """Arrays for prediction."""
    return {name: jnp.asarray(np.asarray(array, np.float32)) for name, array in params.items()}


def fold_numbers(targets: Targets, folds: int, seed: int) -> np.ndarray:
    """The fold of every example, int64 ``[N]``: each class, and the yes of each label, spread evenly over the folds.

    Raises:
      DataError: there are fewer examples than folds, or a class or label has one example.

    >>> fold_numbers(as_targets(np.array([0, 0, 1, 1]), None), 2, seed=0).reshape(2, 2).sum(1).tolist()
    [1, 1]
    """
    count = len(targets.matrix)
    if not is_whole(folds, 2) or folds > count:
        raise DataError(f"folds is {folds!r}; expected a whole number from 2 to {count}, the number of examples.")
    generator = np.random.default_rng(seed)
    yes = targets.matrix.sum(axis=0) if targets.kind != TARGETS else np.full(1, count)
    if (yes < 2).any():
        column = targets.columns[int(yes.argmin())]
        raise DataError(
            f"{'class' if targets.kind == CLASSES else 'label'} {column} has {int(yes.min())} example(s), and choosing "
            "among several strengths by folds needs 2. Give one strength, or more examples."
        )
    order = generator.permutation(count)
    chosen = np.full(count, -1)
    filled = np.zeros(folds)
    for column in np.argsort(yes, kind="stable") if targets.kind != TARGETS else ():
        mine = targets.matrix[:, column] > 0
        held = np.bincount(chosen[mine & (chosen >= 0)], minlength=folds).astype(float)
        for row in order[mine[order] & (chosen[order] < 0)]:
            fold = int(np.lexsort((filled, held))[0])
            chosen[row], held[fold], filled[fold] = fold, held[fold] + 1, filled[fold] + 1
    for row in order[chosen[order] < 0]:
        fold = int(filled.argmin())
        chosen[row], filled[fold] = fold, filled[fold] + 1
    return chosen


def quality_name(targets: Targets) -> str:
    """What :func:`quality` measures."""
    return "R2" if targets.kind == TARGETS else "accuracy"


def quality(targets: Targets, outputs: np.ndarray, weights: np.ndarray, threshold: float = 0.0) -> float:
    """How well outputs ``[N, K]`` fit: the share of right answers, or for targets the explained variance, weighted.

    >>> quality(as_targets(np.array([0, 1]), None), np.array([[2.0, 1], [2, 1]]), np.ones(2))
    0.5
    """
    if targets.codes is not None:
        return float(np.average(outputs.argmax(axis=1) == targets.codes, weights=weights))
    if targets.kind == LABELS:
        right = (outputs > threshold) == (targets.matrix > 0)
        return float(np.average(right.mean(axis=1), weights=weights))
    spread = targets.matrix - np.average(targets.matrix, axis=0, weights=weights)
    error, total = weights @ (targets.matrix - outputs) ** 2, weights @ spread**2
    return float(np.mean(1 - error / np.where(total > 0, total, 1.0)))


def path_report(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], chosen: int, how: str, **facts: Any
) -> Report:
    """One row per candidate, the chosen one marked."""
    marked = [(*row, number == chosen) for number, row in enumerate(rows)]
    return Report(
        title, (*columns, "chosen"), tuple(marked), {columns[0]: marked[chosen][0], "chosen by": how, **facts}
    )
