"""What a teacher says of every example, and of every way in which it is augmented, computed once."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, TransferError, describe, is_whole
from transferjax._report import Report
from transferjax._types import Array, Batch, Model
from transferjax.io._feature_cache import ADDRESS, FeatureCache
from transferjax.io._host import to_host
from transferjax.objectives import losses
from transferjax.objectives._beside import OUTPUTS, check_model
from transferjax.objectives._distill import TEACHER, teaching
from transferjax.tree import Selector, as_selector

CHECKSUM = "checksum of the inputs"
"""The name under which it is kept with each row; no module path has spaces."""
LOOKED_AT = 256
"""About how many elements of each array of an example it is made of."""


class TeacherCache:
    """A teacher's outputs and features, kept by example id and augmentation, so that many epochs cost one pass of it.

    :meth:`taught` gives the batches to a student whose objective is ``distill(student, None, loss, at)``. Student and
    teacher see the same pixels: each example is augmented in ``variants`` ways, by its id and the number of the way
    only, so that the same one comes again bit for bit. Rows are bound to the teacher's weights, its program and that
    of the augmentation; a folder that another one filled raises. So does an id that comes with other inputs than
    before, as the ids of two sources of which each counts from 0.

    Args:
      teacher: a Model.
      path: of a folder, as of ``FeatureCache``; ``None`` keeps rows in memory only.
      at: the teacher's module paths that are compared, beside its outputs.
      top_k: keep so many of the largest logits, and how much all others weigh, which depends on the temperature;
        ``losses.kd`` takes them. ``None``: all.
      temperature: of the loss that ``top_k`` is for.
      augment: ``(batch, key) -> batch`` that does not mix examples, of ``tj.data`` or your own, which draws by
        ``tj.data.example_keys(batch, key)``; ``None``: none.
      variants: in how many ways each example is augmented. Which one comes is the batch's entry ``epoch`` modulo this,
        or, where there is none, how often :meth:`taught` has met the example.
      seed: of the augmentation.
      memory_bytes: as of ``FeatureCache``.

    Raises:
      TransferError: an argument does not fit.

    Source: Beyer et al., Knowledge distillation: A good teacher is patient and consistent, 2021, arXiv:2106.05237.

    >>> import transferjax as tj
    >>> model = tj.interop.pure(lambda params, x: x @ params, jnp.eye(2))
    >>> cache = TeacherCache(model)
    >>> batch = {"inputs": np.eye(2, dtype=np.float32), "id": np.array([7, 8])}
    >>> [out["teacher"]["outputs"].tolist() for out in cache.taught([batch])]
    [[[1.0, 0.0], [0.0, 1.0]]]
    """

    def __init__(
        self,
        teacher: Model,
        path: str | os.PathLike[str] | None = None,
        *,
        at: Selector | str | None = None,
        top_k: int | None = None,
        temperature: float | None = None,
        augment: Callable[[Any, Array], Any] | None = None,
        variants: int = 1,
        seed: int = 0,
        memory_bytes: int = 1 << 30,
    ) -> None:
        check_model("TeacherCache", teacher, at)
        if not is_whole(variants):
            raise TransferError(f"TeacherCache() expects variants, a whole number of at least 1, got {variants!r}.")
        if variants > 1 and augment is None:
            raise TransferError(
                f"TeacherCache() got {variants} variants and no augment=. Expected augment=tj.data.random_flip(), or 1."
            )
        if top_k is not None and (not is_whole(top_k) or temperature is None):
            raise TransferError(
                f"TeacherCache() got top_k={top_k!r} and temperature={temperature!r}. Expected a whole number of at "
                "least 1 and the temperature of the loss."
            )
        self.variants, self.cache = int(variants), None
        self._path, self._memory, self._seed = path, memory_bytes, int(seed)
        self._teach, self._augment = teaching(teacher, None if at is None else as_selector(at)), augment
        self._top = None if top_k is None else (int(top_k), float(temperature or 1.0))
        self._met: dict[int, int] = {}
        self._said = jax.jit(_said, static_argnums=1)
        self._varied = None if augment is None else jax.jit(augment)

    def taught(self, batches: Iterable[Batch]) -> Generator[dict[str, Any], None, None]:
        """Each batch as the student gets it, with what the teacher says of it under ``teacher``.

        Args:
          batches: dicts with ``inputs`` and ``id`` (integers ``[B]``).

        Yields:
          The batch, augmented, and ``teacher``: arrays ``[B, ...]`` by name (``outputs``, module paths). At the end of
          the batches, or when the iterator is closed, what is not on disk yet is written.

        Raises:
          DataError: a batch has no ``inputs`` or no ``id``, or has been taught already; an id comes with other inputs
            than before; or the augmentation mixes examples.
          CheckpointError: the folder was filled by another teacher or augmentation.
        """
        try:
            for batch in batches:
                if not isinstance(batch, Mapping) or not {"inputs", "id"} <= set(batch):
                    has = sorted(batch) if isinstance(batch, Mapping) else describe(batch)
                    raise DataError(f"a batch has {has}; expected a dict with 'inputs' and 'id'.")
                if TEACHER in batch:
                    raise DataError(
                        f"a batch has '{TEACHER}' already, from another TeacherCache. Expected one without; "
                        "several teachers are distill(student, [one, other], loss)."
                    )
                ids = to_host("id", batch["id"]).astype(np.int64)
                ways = self._ways(batch, ids)
                given = self._given(batch, ways)
                cache = self._bound(batch, given)
                rows, sums = ids * self.variants + ways, _checksums(batch["inputs"])
                absent = cache.missing(rows)
                if absent.size:
                    first = {row: at for at, row in reversed(list(enumerate(rows.tolist())))}
                    taken = [first[row] for row in absent.tolist()]
                    said = self._said(self._teach, self._top, given["inputs"])
                    found = {name: np.asarray(array)[taken] for name, array in said.items()}
                    cache.add(absent, {**found, CHECKSUM: sums[taken]})
                kept = cache.read(rows)
                _check_same(ids, sums, kept.pop(CHECKSUM))
                yield {**given, TEACHER: _whole(kept, self._top)}
        finally:
            if self.cache is not None:
                self.cache.flush()

    def report(self) -> Report:
        """One row per array of an example, as of ``FeatureCache``.

        Raises:
          DataError: nothing was taught yet.
        """
        if self.cache is None:
            raise DataError("this TeacherCache has seen no batch. Go over cache.taught(batches) first.")
        found = self.cache.report()
        return Report("Teacher cache", found.columns, found.rows, {**found.metadata, "variants": self.variants})

    def _ways(self, batch: Batch, ids: np.ndarray) -> np.ndarray:
        """The number of the way in which each example comes this time, ``[B]``."""
        if self.variants == 1:
            return np.zeros(ids.shape, np.int64)
        if "epoch" in batch:
            return np.broadcast_to(np.asarray(batch["epoch"], np.int64) % self.variants, ids.shape)
        met = np.array([self._met.get(id_, 0) for id_ in ids.tolist()], np.int64)
        self._met |= {id_: count + 1 for id_, count in zip(ids.tolist(), met.tolist())}
        return met % self.variants

    def _given(self, batch: Batch, ways: np.ndarray) -> dict[str, Any]:
        """The batch with every example augmented in its way."""
        if self._varied is None:
            return dict(batch)
        found: dict[str, Any] = {}
        numbers = _numbers(batch)
        for way in np.unique(ways).tolist():
            one = dict(self._varied(numbers, self._key(way)))
            found = _merged(found, one, ways == way) if found else one
        return {**batch, **found}

    def _key(self, way: int) -> Array:
        return jax.random.fold_in(jax.random.key(self._seed), way)

    def _bound(self, batch: Batch, given: Mapping[str, Any]) -> FeatureCache:
        """The rows; at the first batch they are bound to what fills them."""
        if self.cache is None:
            self._check_alone(batch)
            outline = lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), jnp.result_type(x))
            one = jax.tree.map(outline, given["inputs"])
            program = str(jax.make_jaxpr(_said, static_argnums=1)(self._teach, self._top, one))
            varied, consts = self._variation(jax.tree.map(outline, _numbers(batch)))
            how = f"{varied} in {self.variants} variants of seed {self._seed}, the best {self._top}"
            fingerprint = FeatureCache.fingerprint_of([*jax.tree.leaves(self._teach), *consts], how, program)
            self.cache = FeatureCache(self._path, fingerprint=fingerprint, memory_bytes=self._memory)
        return self.cache

    def _variation(self, one: Batch) -> tuple[str, list[Any]]:
        """The augmentation's program as text, and its constants."""
        if self._augment is None:
            return "none", []
        closed = jax.make_jaxpr(self._augment)(one, self._key(0))
        return ADDRESS.sub("", str(closed.jaxpr)), list(closed.consts)

    def _check_alone(self, batch: Batch) -> None:
        """Whether what becomes of an example is its own matter: the batch in another order gives the same."""
        count = len(np.asarray(batch["id"]))
        if self._varied is None or count < 2:
            return
        given = _numbers(batch)
        turned = jax.tree.map(lambda x: np.asarray(x)[::-1], given)
        one, other = (self._varied(part, self._key(0))["inputs"] for part in (given, turned))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            if not np.array_equal(np.asarray(a), np.asarray(b)[::-1]):
                raise DataError(
                    f"the augmentation {self._augment!r} mixes examples of a batch, or draws by their place in it, so "
                    "that what a teacher says of one cannot be kept. Expected one that looks at each alone, drawing by "
                    "tj.data.example_keys(batch, key); mixup and cutmix need distill(student, teacher, loss)."
                )


def _numbers(batch: Batch) -> dict[str, Any]:
    """What is augmented: all that has a row for each example."""
    return {name: value for name, value in batch.items() if name != "epoch"}


def _checksums(inputs: Any) -> np.ndarray:
    """What tells one example's inputs from another's, ``[B]`` uint32, of some hundred elements spread over each."""
    parts = []
    for leaf in jax.tree.leaves(inputs):
        flat = leaf.reshape(len(leaf), -1) if hasattr(leaf, "reshape") else np.asarray(leaf).reshape(len(leaf), -1)
        parts.append(np.asarray(flat[:, :: flat.shape[1] // LOOKED_AT | 1]))
    rows = range(len(parts[0]) if parts else 0)
    return np.array([zlib.crc32(b"".join(part[row].tobytes() for part in parts)) for row in rows], np.uint32)


def _check_same(ids: np.ndarray, sums: np.ndarray, kept: np.ndarray) -> None:
    other = np.flatnonzero(sums != kept)
    if other.size:
        raise DataError(
            f"example {ids[other[0]]} came with other inputs than those that the teacher saw under this id. Expected "
            "ids that are unique over all sources, and inputs that were not augmented yet: give augment= instead."
        )


def _merged(found: Any, one: Any, mine: np.ndarray) -> Any:
    """Rows of ``one`` where they are its own."""
    return jax.tree.map(lambda a, b: jnp.where(mine.reshape(-1, *(1,) * (b.ndim - 1)), b, a), found, one)


def _said(teach: Any, top: tuple[int, float] | None, inputs: Any) -> dict[str, Array]:
    said = dict(teach(inputs))
    outputs = said.pop(OUTPUTS)
    if top is not None:
        if not hasattr(outputs, "ndim"):
            raise TransferError(f"top_k is of one array of logits; the teacher's outputs are {describe(outputs)}.")
        best = losses.top_k(outputs, *top)
        outputs = {"values": best.values, "indices": best.indices, "rest": best.rest}
    if isinstance(outputs, Mapping):
        return {**said, **{f"{OUTPUTS}/{name}": array for name, array in outputs.items()}}
    return {**said, OUTPUTS: outputs}


def _whole(rows: Mapping[str, np.ndarray], top: tuple[int, float] | None) -> dict[str, Any]:
    """Rows as a teacher gives them: outputs that have names are a dict again, or the best logits."""
    prefix = f"{OUTPUTS}/"
    parts: dict[str, Any] = {
        name.removeprefix(prefix): array for name, array in rows.items() if name.startswith(prefix)
    }
    found: dict[str, Any] = {name: array for name, array in rows.items() if not name.startswith(prefix)}
    if top is not None:
        return {**found, OUTPUTS: losses.TopK(**parts, temperature=top[1])}
    return {**found, OUTPUTS: parts} if parts else found
