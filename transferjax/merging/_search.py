"""search: how a merge scores over a range of its coefficient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, describe
from transferjax._report import Report


def search(
    merge: Callable[[Any], Any],
    coefficients: Any,
    evaluate: Callable[..., Any],
    batches: Iterable[Mapping[str, Any]] | None = None,
) -> Report:
    """Scores a merge at every coefficient, in one compiled program and one pass over the data.

    The program takes the coefficients one after another, so that beside the trees that are merged there is room for
    one merged tree and one forward pass. Batches of one shape are compiled once.

    Args:
      merge: ``coefficient -> params``, traced with the coefficient: ``lambda alpha: wise_ft(base, tuned, alpha)``.
        Weights of a mean that do not sum to one score NaN, which is never the best.
      coefficients: ``[K]`` numbers, or ``[K, m]`` where each is a vector, such as one weight per model.
      evaluate: ``params -> number``, or with batches ``(params, batch) -> number``, the mean over a batch; traced;
        higher is better. For a loss return its negative.
      batches: dicts of arrays ``[B, ...]``, each read once; their scores are averaged, weighted by the sum of
        ``batch["weight"]``, or by ``B``.

    Returns:
      A ``Report`` of coefficient and score; its metadata hold the best of them, the first of equal ones.

    Raises:
      DataError: there is no coefficient or no batch, a score is no scalar, or none of them is finite.

    >>> import jax.numpy as jnp
    >>> from transferjax.merging import wise_ft
    >>> base, tuned = {"bias": jnp.zeros(2)}, {"bias": jnp.full(2, 4.0)}
    >>> merge = lambda alpha: wise_ft(base, tuned, alpha)
    >>> report = search(merge, [0.0, 0.25, 0.5], lambda params: 1 - jnp.sum((params["bias"] - 1) ** 2))
    >>> report.rows, report.metadata["best"]
    (((0.0, -1.0), (0.25, 1.0), (0.5, -1.0)), 0.25)
    """
    values = np.asarray(coefficients, np.float64)
    if values.ndim not in (1, 2) or not len(values) or not np.isfinite(values).all():
        raise DataError(
            f"search() got coefficients {describe(values)}. Expected finite numbers [K] or [K, m], at least one."
        )

    def one(coefficient: Any, batch: tuple[Any, ...]) -> Any:
        score = jnp.asarray(evaluate(merge(coefficient), *batch))
        if score.shape:
            raise DataError(f"search() got a score of shape {score.shape} from evaluate. Expected a scalar.")
        return score

    run = _lifted(lambda points, batch: jax.lax.map(lambda point: one(point, batch), points))
    points = jnp.asarray(values, jnp.float32)
    scores = np.asarray(run(points, ()), np.float64) if batches is None else _mean(run, points, batches)
    if not np.isfinite(scores).any():
        raise DataError("search() found no finite score at any coefficient. Look at evaluate, and at the models.")
    best = int(np.nanargmax(np.where(np.isfinite(scores), scores, np.nan)))
    cells = [tuple(value.tolist()) if values.ndim == 2 else float(value) for value in values]
    facts = {"best": cells[best], "best score": float(scores[best])}
    rows = tuple((cell, float(score)) for cell, score in zip(cells, scores))
    return Report("Scores of a merge", ("coefficient", "score"), rows, facts)


def _lifted(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled once for each form of its arguments, and the arrays that it closes over as arguments too.

    As constants of the program they would be in memory a second time.
    """
    programs: dict[Any, Callable[..., Any]] = {}

    def run(*arguments: Any) -> Any:
        flat, structure = jax.tree.flatten(arguments)
        form = (structure, *((np.shape(leaf), jnp.result_type(leaf)) for leaf in flat))
        if form not in programs:
            jaxpr, consts = (closed := jax.make_jaxpr(function)(*arguments)).jaxpr, jax.device_put(closed.consts)
            program = jax.jit(lambda consts, flat: jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, consts))(*flat)[0])
            programs[form] = lambda flat: program(consts, flat)
        return programs[form](flat)

    return run


def _mean(run: Callable[..., Any], points: Any, batches: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """The weighted mean of the scores ``[K]`` over batches."""
    total, count = np.zeros(len(points)), 0.0
    for batch in batches:
        weight = float(np.sum(batch["weight"])) if "weight" in batch else float(len(jax.tree.leaves(batch)[0]))
        total += weight * np.asarray(run(points, (batch,)), np.float64)
        count += weight
    if not count:
        raise DataError("search() got no batch, or none with weight. Expected dicts of arrays [B, ...].")
    return total / count
