"""Scores that need no gradient and no features: how well the source's own classes tell the target's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from transferjax._errors import DataError, describe
from transferjax.numerics._covariance import check_varies, group_sums, row_chunks
from transferjax.numerics._mixture import gaussian_mixture, principal_scores, responsibilities
from transferjax.numerics._tables import as_classes, as_features, check_equal


def leep(source_probs: Any, labels: Any) -> float:
    """LEEP: the mean log-probability of the labels when read off the source's class probabilities.

    ``mean log sum_z P(y_i | z) p(z | x_i)`` with ``P(y, z) = mean of [y_i = y] p(z | x_i)``. At most 0.

    Args:
      source_probs: numbers ``[N, S]``: the probabilities of the source's classes, rows that sum to 1.
      labels: integers ``[N]``.

    Raises:
      DataError: the rows are no probabilities, labels are of another number, or one class only.

    Source: Nguyen, Hassner, Seeger & Archambeau, LEEP: a new measure to evaluate transferability, ICML 2020.

    >>> leep([[1.0, 0.0], [0.0, 1.0]], [5, 3])
    0.0
    """
    width = np.asarray(source_probs).dtype
    table = as_features(source_probs, "source_probs")
    rows = table.sum(axis=1, dtype=np.float64)
    off = np.abs(rows - 1).max()
    least = table.min()
    if least < 0 or off > (1e-3 if width.itemsize >= 4 or width.kind in "iub" else 2e-2):
        raise DataError(
            f"source_probs are no probabilities: the least is {least:.3g} and the sum of row "
            f"{np.abs(rows - 1).argmax()} is {rows[np.abs(rows - 1).argmax()]:.6g}. leep needs the class probabilities "
            "of the source, rows that sum to 1: write jax.nn.softmax(logits)."
        )
    check_equal("labels", len(np.asarray(labels)), "source_probs", len(table))
    classes = as_classes(labels, len(table))
    return _expected(lambda: row_chunks(table), classes.codes, len(classes.values), table.shape[1])


def _expected(
    chunks: Callable[[], Iterable[tuple[slice, np.ndarray]]], codes: np.ndarray, count: int, width: int
) -> float:
    """LEEP of probabilities that are made some rows at a time, twice."""
    joint = np.zeros((count, width))
    for rows, part in chunks():
        joint += group_sums(part, codes[rows], count)
    total = joint.sum(axis=0)
    conditional = joint / np.where(total > 0, total, 1.0)
    found = sum(np.log((part * conditional[codes[rows]]).sum(axis=1)).sum() for rows, part in chunks())
    return float(found / len(codes))


def nce(source_labels: Any, labels: Any) -> float:
    """NCE: the negative conditional entropy ``-H(labels | source labels)`` of the counts, in nats. At most 0.

    Args:
      source_labels: integers ``[N]``: the classes that the source predicts.
      labels: integers ``[N]``.

    Raises:
      DataError: the source's labels are no classes, labels are of another number, or one class only.

    Source: Tran, Nguyen & Hassner, Transferability and hardness of supervised classification tasks, ICCV 2019.

    >>> round(nce([0, 0, 1, 1], [1, 0, 3, 3]), 4)
    -0.3466
    """
    given = np.asarray(source_labels)
    if given.ndim != 1 or given.dtype.kind not in "iub":
        raise DataError(
            f"source_labels are {describe(given)}; nce needs the predicted classes of the source, integers [N]: write "
            "probs.argmax(-1)."
        )
    check_equal("labels", len(np.asarray(labels)), "source_labels", len(given))
    source = as_classes(given, len(given), "source_labels", least=1)
    classes = as_classes(labels, len(given))
    width = len(classes.values)
    pairs, counts = np.unique(source.codes * width + classes.codes, return_counts=True)
    return float((counts * np.log(counts / source.counts[pairs // width])).sum() / len(given))


def nleep(
    features: Any, labels: Any, *, components: int | None = None, energy: float = 0.8, iterations: int = 100
) -> float:
    """N-LEEP: LEEP of the components of a Gaussian mixture in place of the source's classes. At most 0.

    The features are reduced to the principal components that hold ``energy`` of their variance, and a mixture of
    Gaussians with full covariances is fitted by EM from a start without randomness.

    Args:
      features: numbers ``[N, d]``.
      labels: integers ``[N]``.
      components: of the mixture; default: five per class, and at most one per two examples.
      energy: the share of the variance to keep.
      iterations: the most of EM.

    Raises:
      DataError: features are not finite or constant, there are fewer examples than components, or one class only.

    Source: Li, Jia, Sang, Zhu, Green, Wang & Gong, Ranking neural checkpoints, CVPR 2021.

    >>> nleep(np.array([[0.0], [0.1], [5.0], [5.1]]), [0, 0, 1, 1], components=2) > -1e-9
    True
    """
    table = as_features(features)
    classes = as_classes(labels, len(table))
    count = min(5 * len(classes.values), len(table) // 2) if components is None else components
    if count > len(table) or count < 1:
        raise DataError(
            f"nleep got {len(table)} examples for a mixture of {count} components. Expected at least one example per "
            "component, and one component: write components=..."
        )
    check_varies(table)
    reduced = principal_scores(table, energy=energy)[0]
    mixture = gaussian_mixture(reduced, count, iterations=iterations)

    def chunks() -> Iterable[tuple[slice, np.ndarray]]:
        for rows, part in row_chunks(reduced):
            yield rows, responsibilities(mixture, part)

    return _expected(chunks, classes.codes, len(classes.values), len(mixture.weights))
